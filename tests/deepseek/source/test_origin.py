"""What a directory is: refused by the name of its method, or read as its tensors say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.copies import COPIES, MTP, cast_to_bf16, drop_mtp, write_copy
from support.quantizing import SmallModel, make_small_model
from support.synthetic import config_dict, random_tensors, write_checkpoint, write_shards

from deepseek.config import ModelConfig
from deepseek.errors import CheckpointError
from deepseek.source.checkpoint import CheckpointReader
from deepseek.source.origin import read_source_config, refuse_quantized

MODELOPT = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}

#: What a directory holds: config.json's quantization_config, other files, what the sentence says.
QUANTIZED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "compressed-tensors": ({"quant_method": "compressed-tensors"}, {}, "'compressed-tensors'"),
    "awq": ({"quant_method": "awq", "bits": 4}, {}, "'awq'"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, {}, "'gptq'"),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, {}, "'bitsandbytes'"),
    "fbgemm_fp8": ({"quant_method": "fbgemm_fp8"}, {}, "'fbgemm_fp8'"),
    "modelopt in config.json": ({"quant_method": "modelopt", "quant_algo": "FP8"}, {}, "'modelopt"),
    "an algorithm only": ({"quant_algo": "NVFP4"}, {}, "'NVFP4'"),
    "an unknown method": ({"quant_method": "future\n\x1b[2J"}, {}, r"'future\n\x1b[2J'"),
    "a method that is no text": ({"quant_method": ["fp8"]}, {}, "['fp8']"),
    "modelopt's file": (None, {"hf_quant_config.json": MODELOPT}, "modelopt, 'NVFP4'"),
    "modelopt's file beside FP8": ("fp8", {"hf_quant_config.json": MODELOPT}, "modelopt, 'NVFP4'"),
    "modelopt's file, malformed": (None, {"hf_quant_config.json": [1]}, "modelopt, hf_quant"),
    "our artifact": (None, {"intserve.json": {}}, "is a quantized checkpoint of IntServe"),
    "our engine": ("fp8", {"engine.json": {}, "intserve.json": {}}, "is an engine that IntServe"),
}


def make_quantized(directory: Path, name: str) -> Path:
    """A directory as such a release has it; its tensors do not matter any more."""
    quantization, files, _ = QUANTIZED[name]
    raw = config_dict(fp8=quantization == "fp8")
    if isinstance(quantization, dict):
        raw["quantization_config"] = quantization
    directory.mkdir(exist_ok=True)
    for file, content in ({"config.json": raw} | files).items():
        (directory / file).write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("reader", [CheckpointReader, read_source_config])
def test_a_quantized_directory_is_refused_by_its_method_and_told_what_to_give(
    tmp_path: Path, name: str, reader: Callable[[Path], object]
) -> None:
    with pytest.raises(CheckpointError) as caught:
        reader(make_quantized(tmp_path, name))
    sentence = str(caught.value)
    assert QUANTIZED[name][2] in sentence
    assert "give the unquantized release" in sentence or "it was made from" in sentence
    assert sentence.isprintable()


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"quantization_config": 7}'])
def test_a_config_that_cannot_be_read_is_not_called_quantized(tmp_path: Path, content: str) -> None:
    refuse_quantized(tmp_path)
    (tmp_path / "config.json").write_text(content)
    refuse_quantized(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return make_small_model(tmp_path_factory.mktemp("model"))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("copy", COPIES)
def test_a_copy_is_read_as_its_tensors_say_with_one_line_for_each_difference(
    model: SmallModel, tmp_path: Path, copy: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = write_copy(model, tmp_path / "found", copy)
    told = write_copy(model, tmp_path / "told", copy, told=True)
    readers = [CheckpointReader(found.directory) for _ in range(2)]
    assert read_source_config(found.directory) == readers[0].config
    messages = warnings(caplog)
    assert len(messages) == len(COPIES[copy][1]), "once per process and difference"
    assert all(str(found.directory) in message and "\n" not in message for message in messages)
    other = CheckpointReader(told.directory)
    assert readers[0].config == other.config
    assert readers[0].config_bytes is None
    assert ModelConfig.from_dict(readers[0].config_content) == other.config
    for layer in range(other.config.num_layers_with_mtp):
        assert readers[0].num_bytes(layer) == other.num_bytes(layer)
    assert warnings(caplog) == messages, "a config that is true is no difference"


def test_a_worker_is_silent(
    model: SmallModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = write_copy(model, tmp_path / "copy", "both")
    CheckpointReader(copy.directory, warn=False)
    assert not warnings(caplog)


def test_a_single_file_is_read_as_its_header_says(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, fp8=False, by_layer=False, num_nextn_predict_layers=0)
    (tmp_path / "config.json").write_text(json.dumps(config_dict()))
    config = read_source_config(tmp_path)
    assert (config.weight_block_size, config.num_nextn_predict_layers) == (None, 0)
    assert CheckpointReader(tmp_path).config == config


def test_a_config_alone_is_taken_at_its_word(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_dict()))
    assert read_source_config(tmp_path) == ModelConfig.from_directory(tmp_path)


def half_of_mtp(stored: dict[str, torch.Tensor]) -> None:
    names = sorted(name for name in stored if name.startswith(MTP))
    for name in names[::2]:
        del stored[name]


def half_bf16(stored: dict[str, torch.Tensor]) -> None:
    whole = dict(stored)
    cast_to_bf16(whole)
    for name in [name for name in stored if ".0." in name]:
        del stored[name]
    stored.update({name: tensor for name, tensor in whole.items() if ".0." in name})


def no_scales(stored: dict[str, torch.Tensor]) -> None:
    for name in [name for name in stored if name.endswith("_scale_inv")]:
        del stored[name]


def one_fp8(stored: dict[str, torch.Tensor]) -> None:
    cast_to_bf16(stored)
    name = "model.layers.1.self_attn.o_proj.weight"
    stored[name] = stored[name].to(torch.float8_e4m3fn)


def no_mtp_and_no_norm(stored: dict[str, torch.Tensor]) -> None:
    drop_mtp(stored)
    del stored["model.norm.weight"]


MIXTURES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], None], str]] = {
    "half of the MTP layer": (
        half_of_mtp,
        r"tensor model\.layers\.3\.\S+ .*is missing",
    ),
    "one layer in BF16": (half_bf16, r"tensor model\.layers\.\S+_scale_inv .*is missing"),
    "FP8 without any scales": (no_scales, r"_scale_inv \(and \d+ more\) is missing"),
    "no MTP layer and no norm": (no_mtp_and_no_norm, r"tensor model\.norm\.weight is missing"),
    "all BF16 but one": (one_fp8, r"_scale_inv \(and \d+ more\) is missing"),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_stays_an_error_and_warns_of_nothing(
    model: SmallModel, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    change, message = MIXTURES[name]
    stored = random_tensors(model.config)
    change(stored)
    (tmp_path / "config.json").write_bytes((model.directory / "config.json").read_bytes())
    write_shards(tmp_path, stored)
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(tmp_path)
    assert not warnings(caplog)
