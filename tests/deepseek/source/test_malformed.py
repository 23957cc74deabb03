"""Whatever the files of a source hold, opening it succeeds or says one sentence, at once."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.release import V3
from support.synthetic import config_dict, write_checkpoint

from deepseek.config import ModelConfig
from deepseek.config_values import YarnScaling
from deepseek.errors import CheckpointError, ConfigError, IntServeError
from deepseek.limits import MAX_TENSORS
from deepseek.source.checkpoint import CheckpointReader
from deepseek.source.origin import read_source_config
from deepseek.tensor_files import MAX_HEADER_BYTES, DamagedFileError, read_header

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00004.safetensors"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("small") / "model"
    write_checkpoint(directory, hidden=128)
    return directory


@pytest.fixture
def source(small: Path, tmp_path: Path) -> Path:
    return shutil.copytree(small, tmp_path / "model")


def refusal(source: Path, kind: type[IntServeError] = CheckpointError) -> str:
    """The one sentence with which the reader refuses a directory."""
    with pytest.raises(kind) as caught:
        CheckpointReader(source)
    sentence = str(caught.value)
    assert sentence.isprintable(), repr(sentence)
    assert len(sentence) < 600
    return sentence


def outcome(read: Callable[[], object]) -> str:
    """The sentence of the error, or nothing; any exception that is not ours ends the test."""
    try:
        read()
    except IntServeError as error:
        return str(error)
    return ""


DEEP = b"[" * 100_000

NOT_JSON: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is not valid JSON"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "is not UTF-8 text (byte 0)"),
    "Latin-1": (b'{"a": "\xe9"}', "is not UTF-8 text (byte 7)"),
    "null": (b"null", "must hold a JSON object, not null"),
    "a list": (b"[{}]", "must hold a JSON object, not a list"),
    "a number": (b"7", "must hold a JSON object, not a number"),
    "cut off": (b'{"a": [1, ', "is not valid JSON"),
    "NaN": (b'{"a": NaN}', "NaN is no JSON number"),
    "deep": (b'{"a": ' + DEEP, "is nested deeper than 64 levels"),
    "twice": (b'{"a": 1, "a": 2}', "key 'a' is given twice"),
    "half a surrogate": (b'{"\\ud800": 1}', "half of a surrogate pair"),
    "a long integer": (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
}


@pytest.mark.parametrize("name", NOT_JSON)
@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_a_file_that_is_no_json_object_is_named(source: Path, file: str, name: str) -> None:
    content, message = NOT_JSON[name]
    (source / file).write_bytes(content)
    sentence = refusal(source, ConfigError if file == "config.json" else CheckpointError)
    assert message in sentence
    assert str(source / file) in sentence


@pytest.mark.parametrize("file", ["config.json", INDEX])
def test_a_byte_order_mark_is_no_error(source: Path, file: str) -> None:
    (source / file).write_bytes(b"\xef\xbb\xbf" + (source / file).read_bytes())
    CheckpointReader(source)


WEIGHT_MAPS: dict[str, tuple[Any, str]] = {
    "null": (None, "and is null"),
    "a list": ([], "and is a list"),
    "text": ("model.safetensors", "and is a string"),
    "empty": ({}, "and is an empty object"),
    "a number as shard": ({"x": 1}, "the shard of x must be the name of a file, not a number"),
    "null as shard": ({"x": None}, "not null"),
    "a list as shard": ({"x": [FIRST]}, "not a list"),
    "no name": ({"x": ""}, "names the shard '', which is no file's name"),
    "a NUL": ({"x": "a\0.safetensors"}, r"'a\x00.safetensors', which is no file's name"),
    "control characters": ({"x\n": "a\n\x1b.safetensors"}, r"'a\n\x1b.safetensors'"),
    "a long name": ({"x": "a" * 300 + ".safetensors"}, "which is no file's name"),
    "a path": ({"x": "sub/a.safetensors"}, "outside its own directory"),
    "the parent": ({"x": "../a.safetensors"}, "outside its own directory"),
    "the parent itself": ({"x": ".."}, "outside its own directory"),
    "an absolute path": ({"x": "/etc/a.safetensors"}, "outside its own directory"),
    "another format": ({"x": "pytorch_model.bin"}, "only .safetensors files are read"),
    "a file that is absent": ({"x": "a.safetensors"}, "a.safetensors, which is absent"),
}


@pytest.mark.parametrize("name", WEIGHT_MAPS)
def test_an_index_with_a_wrong_weight_map_is_refused(source: Path, name: str) -> None:
    weight_map, message = WEIGHT_MAPS[name]
    (source / INDEX).write_text(json.dumps({"metadata": 7, "weight_map": weight_map}))
    assert message in refusal(source)


def test_an_index_of_more_tensors_than_any_model_is_refused_unread(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepseek.source.index.MAX_TENSORS", 10)
    assert "more than the 10 of any model that is read" in refusal(source)


# --- config.json ---

FIELDS = sorted(
    {field.name for field in dataclasses.fields(ModelConfig)} - {"yarn", "weight_block_size"}
)
YARN_FIELDS = sorted(field.name for field in dataclasses.fields(YarnScaling))
WRONG: dict[str, Any] = {
    "text": "61",
    "a list": [61, [62]],
    "an object": {"a": 61},
    "NaN": float("nan"),
    "infinity": float("inf"),
    "negative": -1,
    "huge": 10**30,
    "longer than a line": 10**4000,
    "huge and no integer": 1e300,
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_value_of_any_field_is_refused_by_the_name_of_the_field(kind: str) -> None:
    configs = [(name, V3 | {name: WRONG[kind]}) for name in FIELDS]
    scaling = [(name, V3["rope_scaling"] | {name: WRONG[kind]}) for name in YARN_FIELDS]
    configs += [(name, V3 | {"rope_scaling": changed}) for name, changed in scaling]
    for name, raw in configs:
        with pytest.raises(ConfigError) as caught:
            ModelConfig.from_dict(raw)
        sentence = str(caught.value)
        assert name in sentence, (name, sentence)
        assert len(sentence) < 400, sentence
        assert sentence.isprintable()


@pytest.mark.parametrize("value", [None, True, 0.5])
def test_a_value_of_another_kind_is_refused_or_stands_for_none(value: object) -> None:
    optional = {"bos_token_id", "eos_token_id", "num_nextn_predict_layers", "q_lora_rank"}
    optional |= {"index_n_heads", "index_head_dim", "index_topk"}
    fractional = {"rms_norm_eps", "rope_theta", "routed_scaling_factor"}
    for name in FIELDS:
        allowed = (
            (value is None and name in optional)
            or (value is True and name == "norm_topk_prob")
            or (value == 0.5 and name in fractional)
        )
        raw = V3 | {name: value}
        if allowed and value is not True:
            ModelConfig.from_dict(raw)
        elif not allowed:
            with pytest.raises(ConfigError, match=name):
                ModelConfig.from_dict(raw)


@pytest.mark.parametrize("key", sorted(V3))
def test_no_key_of_the_release_takes_a_value_of_any_kind_without_a_sentence(key: str) -> None:
    for value in [*WRONG.values(), None, True, [], {}, "", [[]], [None], {"": {}}]:
        raw = V3 | {key: value}
        assert outcome(lambda raw=raw: ModelConfig.from_dict(raw)).isprintable(), (key, value)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 10_000_000}, "num_hidden_layers = 10000000 is more than 1,024 (the"),
        ({"n_routed_experts": 8_000_000}, "n_routed_experts = 8000000 is more than 4,096 (the"),
        ({"num_nextn_predict_layers": 10**6}, "num_nextn_predict_layers = 1000000 is more than 16"),
        (
            {"num_hidden_layers": 1000, "n_routed_experts": 4096},
            f"1001 layers of 4096 experts are about 24,640,619 tensors, more than {MAX_TENSORS:,}",
        ),
        ({"max_position_embeddings": 1 << 25}, "max_position_embeddings = 33554432 is more than"),
    ],
)
def test_an_absurd_size_costs_one_sentence_and_no_time(
    tmp_path: Path, change: dict[str, int], message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(V3 | change))
    with pytest.raises(ConfigError) as caught:
        read_source_config(tmp_path)
    assert message in str(caught.value)


def test_the_limits_leave_room_for_a_model_many_times_as_large() -> None:
    ModelConfig.from_dict(
        V3 | {"num_hidden_layers": 200, "n_routed_experts": 512, "hidden_size": 32768}
    )


# --- shards ---


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


HEADERS: dict[str, tuple[Any, str]] = {
    "float offsets": ({"x": entry(data_offsets=[0.0, 8.0])}, "has the data_offsets [0.0, 8.0]"),
    "boolean offsets": ({"x": entry(data_offsets=[False, 8])}, "has the data_offsets [False, 8]"),
    "offsets as text": ({"x": entry(data_offsets=["0", "8"])}, "has the data_offsets"),
    "negative offsets": ({"x": entry(data_offsets=[-8, 0])}, "has the data_offsets [-8, 0]"),
    "one offset": ({"x": entry(data_offsets=[8])}, "has the data_offsets [8]"),
    "null offsets": ({"x": entry(data_offsets=None)}, "has the data_offsets None"),
    "offsets the wrong way": ({"x": entry(data_offsets=[8, 0])}, "has -8 bytes"),
    "offsets beyond any file": ({"x": entry(data_offsets=[0, 1 << 70])}, "has the data_offsets"),
    "offsets beyond the file": (
        {"x": entry(shape=[20], data_offsets=[0, 80])},
        "it is cut off",
    ),
    "a shape of floats": ({"x": entry(shape=[2.0])}, "has the shape [2.0], which is none"),
    "a boolean shape": ({"x": entry(shape=[True, 2])}, "has the shape [True, 2], which is none"),
    "a shape that is text": ({"x": entry(shape="2")}, "has the shape '2', which is none"),
    "a negative shape": ({"x": entry(shape=[-2])}, "has the shape [-2], which is none"),
    "a huge product": ({"x": entry(shape=[1 << 40, 1 << 40])}, "which its shape contradicts"),
    "many dimensions": ({"x": entry(shape=[1] * 9)}, "has the shape"),
    "dimensions without end": ({"x": entry(shape=[1 << 61] * 100_000)}, "has the shape"),
    "E8M0 scales": ({"x": entry(dtype="F8_E8M0", shape=[8])}, "type F8_E8M0, which is not supp"),
    "an unsigned type": ({"x": entry(dtype="U32")}, "in the type U32, which is not supported"),
    "complex numbers": ({"x": entry(dtype="C64", shape=[1])}, "type C64, which is not supported"),
    "an unknown type": ({"x": entry(dtype="F31")}, "tensor x has the unknown type 'F31'"),
    "a type that is no text": ({"x": entry(dtype=["F32"])}, "has the unknown type ['F32']"),
    "a list for a tensor": ({"x": [1]}, "tensor x must have dtype, shape and data_offsets"),
    "null for a tensor": ({"x": None}, "tensor x must have dtype, shape and data_offsets"),
    "a key too many": ({"x": entry(zip=1)}, "tensor x must have dtype, shape and data_offsets"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "x": entry()}, "__metadata__ must map"),
    "metadata that is a list": ({"__metadata__": [], "x": entry()}, "__metadata__ must map"),
    "null metadata": ({"__metadata__": None, "x": entry()}, "__metadata__ must map"),
    "a list": ([], "its header is a list, not an object"),
    "a string": ("x", "its header is a string, not an object"),
    "a name to be obeyed": ({"\x1b[2J\n": entry(shape=[3])}, r"tensor '\x1b[2J\n' has 8 bytes"),
}
RAW_HEADERS: dict[str, tuple[bytes, str]] = {
    "UTF-16": ('{"x": 1}'.encode("utf-16"), "is not a safetensors file"),
    "deep": (DEEP, "nested"),
    "NaN": (b'{"x": NaN}', "NaN is no JSON number"),
    "twice": (b'{"x": 1, "x": 2}', "a name appears twice"),
    "a long integer": (b'{"x": ' + b"9" * 5000 + b"}", "is not a safetensors file"),
    "spaces": (b" " * 100, "is not a safetensors file"),
}


def header_file(path: Path, header: bytes, data: bytes = bytes(8)) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


@pytest.mark.parametrize("name", [*HEADERS, *RAW_HEADERS])
def test_a_malformed_header_is_refused_in_one_sentence_that_names_the_shard(
    source: Path, name: str
) -> None:
    if name in HEADERS:
        value, message = HEADERS[name]
        header = json.dumps(value).encode()
    else:
        header, message = RAW_HEADERS[name]
    (source / INDEX).write_text(json.dumps({"weight_map": {"x": FIRST}}))
    header_file(source / FIRST, header)
    sentence = refusal(source)
    assert message in sentence
    assert str(source / FIRST) in sentence
    assert "not supported" not in sentence or "download" not in sentence, "the file is whole"


def test_a_length_that_lies_is_refused_without_reading(source: Path) -> None:
    for length in (0, 1 << 63, (1 << 64) - 1, MAX_HEADER_BYTES + 1):
        (source / FIRST).write_bytes(length.to_bytes(8, "little") + b"{}")
        assert "not a safetensors file" in refusal(source)


def test_a_header_longer_than_the_family_needs_is_refused_unread(source: Path) -> None:
    path = source / FIRST
    path.write_bytes((61 << 20).to_bytes(8, "little"))
    os.truncate(path, 8 + (61 << 20))
    assert "has a header of 63,963,136 bytes, more than the 33,554,432" in refusal(source)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("filler", [b"[0,0,0,0,0,0,0,0],", b'"a":{},', b"0,", b"[],"])
def test_a_dense_header_is_refused_before_it_is_parsed(tmp_path: Path, filler: bytes) -> None:
    """Parsed, each of these makes millions of objects."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = header_file(tmp_path / "a", b"[" + filler * ((30 << 20) // len(filler)))
    with pytest.raises(DamagedFileError, match="its header is no table of tensors"):
        read_header(path)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert kilobytes < 200 << 10


def put(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


def link_outside(path: Path) -> None:
    elsewhere = path.parent.parent / f"elsewhere-{path.name}"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


PLACES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pipe": (put(os.mkfifo), "is a pipe, not a regular file"),
    "a directory": (put(Path.mkdir), "is a directory, not a regular file"),
    "a device": (put(lambda path: path.symlink_to("/dev/zero")), "a link to a file outside"),
    "a link elsewhere": (link_outside, "is a link to a file outside its directory"),
    "a link to itself": (put(lambda path: path.symlink_to(path.name)), "cannot be read"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("file", ["config.json", INDEX, FIRST])
def test_a_file_is_a_regular_file_of_its_directory(source: Path, file: str, name: str) -> None:
    change, message = PLACES[name]
    change(source / file)
    sentence = refusal(source, ConfigError if file == "config.json" else CheckpointError)
    assert message in sentence
    assert str(source / file) in sentence


def test_a_snapshot_of_a_hub_cache_is_read(small: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a" / "blobs", tmp_path / "models--a" / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    shutil.copytree(small, blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    reader = CheckpointReader(snapshot)
    assert reader.read_globals().keys() == CheckpointReader(small).read_globals().keys()
    (blobs / FIRST).rename(tmp_path / FIRST)
    (blobs / FIRST).symlink_to(tmp_path / FIRST)
    assert "is a link to a file outside its directory" in refusal(snapshot)


READS: dict[str, Callable[[CheckpointReader], object]] = {
    "read_layer": lambda reader: reader.read_layer(0),
    "load": lambda reader: reader.load(
        [tensor.spec for tensor in CheckpointReader(reader.directory).read_layer(0).values()]
    ),
    "fingerprint": lambda reader: reader.fingerprint,
}


@pytest.mark.parametrize("read", ["read_layer", "fingerprint"])
@pytest.mark.parametrize("change", [link_outside, put(os.mkfifo)])
@pytest.mark.timeout(20)
def test_a_shard_that_was_checked_is_not_followed_elsewhere_later(
    source: Path, read: str, change: Callable[[Path], None]
) -> None:
    reader = CheckpointReader(source)
    for path in source.glob("*.safetensors"):
        change(path)
    with pytest.raises(CheckpointError, match="changed or became unreadable while it was in use"):
        READS[read](reader)


@pytest.mark.parametrize("read", READS)
def test_a_shard_whose_header_changed_is_noticed_when_it_is_read(source: Path, read: str) -> None:
    reader = CheckpointReader(source)
    load = READS["load"] if read == "load" else READS[read]
    whole = {path: path.read_bytes() for path in source.glob("*.safetensors")}
    for path, content in whole.items():
        path.write_bytes(content.replace(b'"pt"', b'"tp"'))
    with pytest.raises(CheckpointError, match="its header is another one"):
        load(reader)


# --- anything at all ---

SMALL_CONFIG = json.dumps(config_dict(hidden=128)).encode()
_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def mutated(data: st.DataObject, content: bytes, start: int = 0) -> bytes:
    """`content` with bytes replaced, removed, doubled, or a JSON value in place of another."""
    position = data.draw(st.integers(start, max(start, len(content) - 1)))
    end = data.draw(st.integers(position, min(len(content), position + 40)))
    piece = data.draw(
        st.binary(max_size=8)
        | _values.map(lambda value: json.dumps(value).encode())
        | st.sampled_from([content[position:end] * 2, b"", b'"', b"\xff", b"9" * 20, b"null"])
    )
    return content[:position] + piece + content[end:]


@pytest.mark.heavy
@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data(), file=st.sampled_from(["config.json", INDEX, FIRST]))
def test_any_change_of_any_byte_gives_a_model_or_one_sentence(
    source: Path, data: st.DataObject, file: str
) -> None:
    path = source / file
    whole = path.read_bytes()
    if file == FIRST:
        length = 8 + int.from_bytes(whole[:8], "little")
        text = mutated(data, whole[8:length])
        prefix = data.draw(st.sampled_from([len(text).to_bytes(8, "little"), whole[:8]]))
        path.write_bytes(prefix + text + whole[length:])
    else:
        path.write_bytes(mutated(data, whole))
    sentences = [outcome(lambda: CheckpointReader(source))]
    sentences.append(outcome(lambda: read_source_config(source)))
    path.write_bytes(whole)
    for sentence in sentences:
        assert sentence.isprintable(), repr(sentence)
        assert len(sentence) < 1000


@settings(max_examples=100, deadline=None, derandomize=True)
@given(key=st.sampled_from(sorted(V3)), value=_values)
def test_any_value_of_any_key_gives_a_model_or_one_sentence(key: str, value: object) -> None:
    sentence = outcome(lambda: ModelConfig.from_dict(V3 | {key: value}))
    assert sentence.isprintable(), repr(sentence)
