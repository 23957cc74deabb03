"""Settings of the service: strict, frozen, and no API key is ever shown."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from support.configs import make_config

from deepseek.errors import ConfigError
from deepseek.recipe import KVFormat
from serve_app.config import EchoOptions, EmbeddedOptions, ServeConfig, load_config
from serve_app.schema import config_schema

ECHO = "pools: {default: {engine: {kind: echo}}}\n"


def settings(**sections: Any) -> dict[str, Any]:
    """What the command line gives in addition to an echo engine."""
    return {"pools": {"default": {"engine": {"kind": "echo"}}}, **sections}


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (ECHO + "prot: 80\n", "prot"),
        (ECHO + "http: {prot: 80}\n", "http.prot"),
        ("pools: {default: {engine: {kind: echo, ttft: 1}}}\n", "pools.default.engine.ttft"),
        ("pools: {echo: {engine: {kind: echo}, echo: 1}}\n", "pools.echo.echo"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_its_path(
    tmp_path: Path, text: str, place: str
) -> None:
    with pytest.raises(ConfigError, match=rf"serve\.yaml: unknown key '{place}'"):
        load_config(write(tmp_path, text), {})


@pytest.mark.parametrize("text", ["[1]", "a: [", "\x00"])
def test_a_file_that_is_no_mapping_is_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="serve.yaml"):
        load_config(write(tmp_path, text), {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("http: {port: 1, port: 2}\n", r"serve\.yaml gives the key 'port' twice"),
        ("requests: {timeout_s: .inf}\n", r"serve\.yaml holds \.inf"),
        (ECHO + "requests: {timeout_s: 1e400}\n", "requests.timeout_s: .*finite"),
        (ECHO + "http: {port: true}\n", "http.port: Input should not be true, a boolean"),
        (
            "pools: {default: {engine: {kind: echo, ttft_s: yes}}}\n",
            "pools.default.engine.ttft_s: Input should not be true, a boolean",
        ),
        ("http: {port: 1:30}\n", "holds 1:30, which YAML reads as a number of base 60"),
    ],
)
def test_what_yaml_reads_otherwise_than_it_looks_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text), {})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("port: 80\n", "'port' is now http.port"),
        ("engine: runs/engine\n", "'engine' is now pools.default.engine.directory"),
        (ECHO + "timeout_s: 5\n", "unknown key 'timeout_s'; it is requests.timeout_s"),
        (ECHO + "http: {prot: 80}\n", "unknown key 'http.prot'; did you mean http.port?"),
        (ECHO + "colour: red\n", "unknown key 'colour'; remove or correct it"),
        (
            "pools: {default: {engine: {kind: embedded, directory: e, ttft_s: 1}}}\n",
            "unknown key 'pools.default.engine.ttft_s'; remove or correct it",
        ),
        (
            "pools: {default: {engine: {kind: echo, ttft: 1}}}\n",
            "unknown key 'pools.default.engine.ttft'; did you mean pools.default.engine.ttft_s?",
        ),
        ("pools: {default: {}}\n", "pools.default.engine: is missing; add {kind: embedded, dir"),
        (
            "pools: {default: {engine: runs/engine}}\n",
            "pools.default.engine: kind must be embedded, trtllm, vllm or echo; write {kind: embed",
        ),
        (
            "pools: {default: {engine: {kind: embedded}}}\n",
            "pools.default.engine.directory: is missing; name the engine directory that `build`",
        ),
        ("pools: {My Pool: {engine: {kind: echo}}}\n", "pools.My Pool: is no name; use lower-case"),
        (
            "pools: {default: {engine: {kind: trtllm, directory: e}}}\n",
            "pools.default.engine.python: is missing; name the Python of the engine's environment",
        ),
        (
            "pools: {default: {engine: {kind: trtllm, directory: e, python: p, kv_tokens: 1}}}\n",
            "unknown key 'pools.default.engine.kv_tokens'",
        ),
        (
            "pools: {default: {engine: {kind: vllm, directory: e, python: p, kv_cache: int8}}}\n",
            "pools.default.engine.kv_cache: Input should be 'bf16' or 'fp8'",
        ),
        (
            "pools: {default: {engine: {kind: echo}, labels: {a b: c}}}\n",
            "pools.default.labels.a b: is no name of a label of nodes; write one as in `ray start",
        ),
        (
            'pools: {default: {engine: {kind: echo}, labels: {hardware: "in(a,b)"}}}\n',
            "pools.default.labels.hardware: is no value of a label of nodes; write letters, digits",
        ),
        (
            "pools: {a: {engine: {kind: echo}}, b: {engine: {kind: trtllm, directory: e, "
            "python: p}}}\n",
            "pools has engines of the kinds echo and trtllm, and all pools serve the same model",
        ),
        (
            "pools: {a: {engine: {kind: echo}, spill_over: [b]}}\n",
            "pools.a.spill_over names 'b', and the pools are a",
        ),
        (
            "pools: {a: {engine: {kind: echo}, spill_over: [a]}}\n",
            "pools.a.spill_over names the pool itself; remove it",
        ),
        (
            "pools: {a: {engine: {kind: echo}, spill_over: [b, b]}, b: {engine: {kind: echo}}}\n",
            "pools.a.spill_over names a pool twice; remove one",
        ),
        (
            "pools: {a: {engine: {kind: echo}}, b: {engine: {kind: embedded, directory: e}}}\n",
            "pools has engines of the kinds echo and embedded, and all pools serve the same model",
        ),
        (
            "pools: {a: {engine: {kind: echo}, max_request_tokens: 5000}}\n",
            "pools.a: max_request_tokens 5000 is more than the engine's max_model_len 4096; lower",
        ),
        (ECHO + 'routing: {session_header: "a b"}\n', "routing.session_header: "),
        ("pools: {}\n", "name an engine: --engine DIR, --echo, or pools.default.engine in a file"),
        ("pools:\n", "name an engine: --engine DIR, --echo, or pools.default.engine in a file"),
        (ECHO + "http:\n", "http: holds nothing; remove it, or write its keys below it"),
        (ECHO + "http: 80\n", "http: must be a mapping of keys to values"),
        (ECHO + "pools.default.replicas: 2\n", "unknown key 'pools.default.replicas'; keys are"),
        (
            ECHO + "admission: {max_wait_s: 700}\n",
            "admission.max_wait_s 700 is longer than requests.timeout_s 600, after which no req",
        ),
        (
            ECHO + "resume: {wait_s: 30}\nrequests: {timeout_s: 20}\n",
            "resume.wait_s 30 is longer than requests.timeout_s 20",
        ),
        (
            'model_name: "a\\nb"\n' + ECHO,
            "model_name: is no name; write 1 to 256 characters that can",
        ),
        (ECHO + 'http: {host: "a b"}\n', "http.host: is no address and no name; write one such as"),
        (ECHO + 'keys: {file: ""}\n', "keys.file: names no file; write its path, or leave the key"),
        (ECHO + 'telemetry: {access_log: "a\\0b"}\n', "telemetry.access_log: is no path: it holds"),
        (ECHO + "shutdown_s: 1e12\n", "shutdown_s: Input should be less than or equal to 10000000"),
        ("applications: []\n", "this is a file for `serve deploy`; a configuration is what stand"),
    ],
)
def test_a_mistake_is_one_sentence_with_its_path_and_what_to_change(
    tmp_path: Path, text: str, sentence: str
) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as refused:
        load_config(file, {})
    assert str(refused.value).startswith(f"{file}: {sentence}")
    assert "\n" not in str(refused.value)


def every_key(section: dict[str, Any], *above: str) -> Iterator[tuple[str, ...]]:
    """The path of every key that is no section, as in a file with an embedded engine."""
    schema = config_schema()
    for key, field in section["properties"].items():
        for inner in field.get("oneOf", [field])[:1]:
            if key == "pools":
                yield from every_key(schema["$defs"]["PoolSection"], "pools", "default")
            elif "$ref" in inner:
                yield from every_key(schema["$defs"][inner["$ref"][8:]], *above, key)
            else:
                yield *above, key


@pytest.mark.parametrize("path", list(every_key(config_schema())), ids=".".join)
def test_every_key_takes_a_value_or_says_in_one_sentence_that_it_does_not(
    path: tuple[str, ...],
) -> None:
    values = ([], {}, None, True, "\ud800\n", -1, 0.5, 2**31, 10**30, 1e300, ["x", 1], {"a": {}})
    refused = 0
    for value in values:
        given = settings()
        if path[0] == "pools":
            given["pools"]["default"]["engine"] = {"kind": "embedded", "directory": "e"}
        place = given
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = value
        try:
            ServeConfig.model_validate(given)
        except ConfigError as error:
            said = str(error)
            assert path[-1] in said, said
            assert said == " ".join(said.split()), said
            assert said.startswith((".".join(path), ".".join(path[:-1]))), said
            refused += 1
    assert refused >= 6


def test_a_default_that_a_short_timeout_makes_useless_is_no_mistake() -> None:
    config = load_config(None, settings(requests={"timeout_s": 5}))
    assert config.admission.max_wait_s > config.requests.timeout_s


def test_flags_speak_of_the_only_pool_of_the_file_whatever_its_name(tmp_path: Path) -> None:
    file = write(tmp_path, "pools: {cpu: {replicas: 3, engine: {kind: echo}}}\n")
    engine = {"kind": "embedded", "directory": "built"}
    config = load_config(file, {"pools": {"default": {"engine": engine}}})
    assert list(config.pools) == ["cpu"]
    assert (config.pool.replicas, config.pool.directory) == (3, Path("built"))


def test_flags_of_an_engine_do_not_go_over_a_file_with_several_pools(tmp_path: Path) -> None:
    file = write(tmp_path, "pools: {a: {engine: {kind: echo}}, b: {engine: {kind: echo}}}\n")
    assert list(load_config(file, {"http": {"port": 80}}).pools) == ["a", "b"]
    with pytest.raises(ConfigError, match="has 2 pools, and flags of the engine or its gate speak"):
        load_config(file, {"pools": {"default": {"gate": {"allow_ungated": True}}}})


def test_an_absent_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.yaml", {})


def test_an_engine_is_needed() -> None:
    with pytest.raises(ConfigError, match="name an engine: --engine DIR, --echo, or pools"):
        load_config(None, {})


def test_the_command_line_goes_over_the_file_key_by_key(tmp_path: Path) -> None:
    file = write(tmp_path, ECHO + "http: {port: 1234, host: 0.0.0.0}\nmodel_name: a\n")
    config = load_config(file, {"http": {"port": 4321}})
    assert (config.http.port, config.http.host, config.model_name) == (4321, "0.0.0.0", "a")


def test_an_engine_on_the_command_line_replaces_one_of_another_kind(tmp_path: Path) -> None:
    file = write(tmp_path, "pools: {default: {replicas: 2, engine: {kind: echo, ttft_s: 1.0}}}\n")
    engine = {"kind": "embedded", "directory": "built"}
    pool = load_config(file, {"pools": {"default": {"engine": engine}}}).pool
    assert pool.engine == EmbeddedOptions(directory=Path("built"))
    assert pool.replicas == 2


def test_a_wrong_value_is_named() -> None:
    with pytest.raises(ConfigError, match=r"settings: http\.port: "):
        load_config(None, settings(http={"port": 0}))


def test_api_keys_never_show_but_survive_the_actor_hop() -> None:
    config = load_config(None, settings(keys={"inline": ["sk-very-secret"]}))
    assert "very-secret" not in f"{config!r} {config} {config.model_dump_json()}"
    copy = pickle.loads(pickle.dumps(config))
    assert copy.keys.inline[0].get_secret_value() == "sk-very-secret"
    with pytest.raises(ConfigError, match="empty key"):
        load_config(None, settings(keys={"inline": [""]}))
    for keys in ({"inline": {"sk-very-secret": 1}}, {"inline": "sk-very-secret"},
                 {"sk-very-secret": 1}, "sk-very-secret", {"file": ["sk-very-secret"]},
                 {"variable": "sk-very-secret"}):  # fmt: skip
        with pytest.raises(ConfigError, match="settings: keys") as caught:
            load_config(None, settings(keys=keys))
        assert "very-secret" not in str(caught.value)


def test_the_model_is_named_after_its_directory(tmp_path: Path) -> None:
    (tmp_path / "int4").mkdir()
    assert make_config(engine=tmp_path / "int4").served_name == "int4"
    assert make_config(echo=EchoOptions()).served_name == "echo"
    assert make_config(echo=EchoOptions(), model_name="x").served_name == "x"


def test_an_engine_is_served_on_kv_pages_of_any_format_of_a_recipe() -> None:
    for kv_cache in (None, *get_args(KVFormat)):
        assert make_config(engine=Path("e"), kv_cache=kv_cache).pool.kv_cache == kv_cache
    with pytest.raises(ConfigError, match="kv_cache: Input should be 'bf16', 'fp8' or 'int8'"):
        make_config(engine=Path("e"), kv_cache="fp32")
