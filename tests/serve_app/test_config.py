"""Settings of the service: strict, frozen, and no API key is ever shown."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from deepseek.errors import ConfigError
from deepseek.recipe import KVFormat
from serve_app.config import ServeConfig, load_config


def test_an_unknown_key_is_an_error_that_names_it(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("echo: {}\nprot: 80\n")
    with pytest.raises(ConfigError, match=r"serve\.yaml: unknown key 'prot'"):
        load_config(file, {})
    file.write_text("echo: {ttft: 1}\n")
    with pytest.raises(ConfigError, match="unknown key 'echo.ttft'"):
        load_config(file, {})


@pytest.mark.parametrize("text", ["[1]", "a: [", "\x00"])
def test_a_file_that_is_no_mapping_is_an_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match="serve.yaml"):
        load_config(file, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo: {}\nport: 1\nport: 2\n", r"serve\.yaml gives the key 'port' twice"),
        ("echo: {}\ntimeout_s: .inf\n", r"serve\.yaml holds \.inf"),
        ("echo: {}\ntimeout_s: 1e400\n", "timeout_s: Input should be a finite"),
        ("echo: {}\nport: true\n", "port: Input should not be true, a boolean"),
        ("echo: {ttft_s: yes}\n", "echo.ttft_s: Input should not be true, a boolean"),
        ("echo: {}\nport: 1:30\n", "holds 1:30, which YAML reads as a number of base 60"),
    ],
)
def test_what_yaml_reads_otherwise_than_it_looks_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(file, {})


def test_an_absent_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "none.yaml", {})


def test_exactly_one_of_engine_and_echo_is_needed() -> None:
    for given in ({}, {"echo": {}, "engine": "x"}):
        with pytest.raises(ConfigError, match="either an engine directory or echo"):
            load_config(None, given)


def test_the_command_line_goes_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("echo: {}\nport: 1234\nmodel_name: a\n")
    config = load_config(file, {"port": 4321})
    assert (config.port, config.model_name) == (4321, "a")


def test_a_wrong_value_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="settings: port: "):
        load_config(None, {"echo": {}, "port": 0})


def test_api_keys_never_show_but_survive_the_actor_hop() -> None:
    config = load_config(None, {"echo": {}, "api_keys": ["sk-very-secret"]})
    assert "very-secret" not in f"{config!r} {config} {config.model_dump_json()}"
    copy = pickle.loads(pickle.dumps(config))
    assert copy.api_keys[0].get_secret_value() == "sk-very-secret"
    with pytest.raises(ConfigError, match="empty key"):
        load_config(None, {"echo": {}, "api_keys": [""]})
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"echo": {}, "api_keys": {"sk-very-secret": 1}})
    assert "very-secret" not in str(caught.value)


def test_the_model_is_named_after_its_directory(tmp_path: Path) -> None:
    (tmp_path / "int4").mkdir()
    assert ServeConfig.model_validate({"engine": tmp_path / "int4"}).served_name == "int4"
    assert ServeConfig.model_validate({"echo": {}}).served_name == "echo"
    assert ServeConfig.model_validate({"echo": {}, "model_name": "x"}).served_name == "x"


def test_an_engine_is_served_on_kv_pages_of_any_format_of_a_recipe() -> None:
    for kv_cache in (None, *get_args(KVFormat)):
        assert ServeConfig(engine=Path("e"), kv_cache=kv_cache).kv_cache == kv_cache
    with pytest.raises(ValidationError, match="'bf16', 'fp8' or 'int8'"):
        ServeConfig(engine=Path("e"), kv_cache="fp32")
