"""No tensor of a source is handed out that holds NaN, infinity or a scale that cannot be."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.synthetic import random_tensors, write_checkpoint, write_shards
from torch import Tensor

from deepseek.engine.engine import LLMEngine
from deepseek.errors import CheckpointError
from deepseek.inventory import global_tensors, layer_tensors
from deepseek.source import values
from deepseek.source.checkpoint import CheckpointReader
from deepseek.source.values import LARGEST_SCALE_INV, check_scales, check_values

SHARD = Path("shard.safetensors")
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
MAIN = "model.layers.1."
MTP = "model.layers.2."
#: One tensor of every kind: main layers and MTP layer, tensors outside, weights and scales.
NAMES = (
    "model.embed_tokens.weight",
    "model.norm.weight",
    "lm_head.weight",
    f"{MAIN}input_layernorm.weight",
    f"{MAIN}self_attn.q_a_layernorm.weight",
    f"{MAIN}self_attn.o_proj.weight",
    f"{MAIN}self_attn.o_proj.weight_scale_inv",
    f"{MAIN}mlp.gate.weight",
    f"{MAIN}mlp.gate.e_score_correction_bias",
    f"{MAIN}mlp.experts.3.down_proj.weight",
    f"{MAIN}mlp.experts.3.down_proj.weight_scale_inv",
    f"{MAIN}mlp.shared_experts.up_proj.weight",
    f"{MTP}enorm.weight",
    f"{MTP}eh_proj.weight",
    f"{MTP}shared_head.norm.weight",
    f"{MTP}mlp.experts.0.gate_proj.weight_scale_inv",
)


def refused(check: Callable[[Path, str, Tensor], None], tensor: Tensor) -> str:
    """What the check says about a tensor `x`; empty where it says nothing."""
    try:
        check(SHARD, "x", tensor)
    except CheckpointError as error:
        return str(error)
    return ""


def bits(*patterns: int, dtype: torch.dtype) -> Tensor:
    """A tensor of these bit patterns."""
    data = b"".join(pattern.to_bytes(dtype.itemsize, "little") for pattern in patterns)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.bfloat16])
def test_of_all_bit_patterns_those_are_refused_that_are_not_finite(dtype: torch.dtype) -> None:
    every = bits(*range(1 << 8 * dtype.itemsize), dtype=dtype)
    finite = every.float().isfinite()
    assert refused(check_values, every[finite].clone()) == ""
    for value in every[~finite]:
        what = "NaN" if value.isnan() else "infinity"
        assert f"tensor x holds {what} at [0]" in refused(check_values, value.reshape(1))


@pytest.mark.parametrize("pattern", [0x7F80_0000, 0x7F80_0001, 0x7FFF_FFFF])
@pytest.mark.parametrize("sign", [0, 1 << 31])
def test_float32_is_refused_from_the_bits_of_infinity_on(pattern: int, sign: int) -> None:
    below = bits(sign | 0x7F7F_FFFF, dtype=torch.float32)
    assert abs(float(below)) == torch.finfo(torch.float32).max
    assert refused(check_values, below) == ""
    assert "tensor x holds" in refused(check_values, bits(sign | pattern, dtype=torch.float32))


@pytest.mark.parametrize("dtype", FLOATS)
def test_denormals_negative_zero_and_the_largest_values_are_numbers(dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    smallest = bits(1, 1 | 1 << (8 * dtype.itemsize - 1), dtype=dtype)
    extremes = torch.tensor([info.max, info.min, info.tiny, -0.0, 0.0], dtype=dtype)
    assert smallest[0] > 0 > smallest[1]
    assert refused(check_values, torch.cat([extremes, smallest])) == ""


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, *FLOATS])
def test_one_nan_is_found_wherever_it_lies(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(values, "_CHUNK_BYTES", 64)
    shape = (9, 41)  # the last chunk is a ragged one
    for place in range(math.prod(shape)):
        tensor = torch.ones(shape).to(dtype)
        tensor.view(-1)[place] = math.nan
        row, column = divmod(place, shape[1])
        assert f"holds NaN at [{row}, {column}]" in refused(check_values, tensor)


GOOD_SCALES = (2.0**-126, 1e-5, 1.0, 65504 / 448)
BAD_SCALES = (0.0, -0.0, -1e-4, 2.0**-127, 1e-45, 147.0, 3e34, math.inf, -math.inf, math.nan)


def test_the_largest_value_of_a_tile_is_finite_in_float16() -> None:
    assert math.isfinite(torch.tensor(448 * LARGEST_SCALE_INV).half())
    assert refused(check_scales, torch.tensor([GOOD_SCALES])) == ""


@pytest.mark.parametrize("bad", BAD_SCALES)
def test_a_scale_that_cannot_be_is_refused_with_its_value_and_position(bad: float) -> None:
    scale = torch.full((3, 4), 1e-4)
    scale[2, 1] = bad
    said = refused(check_scales, scale)
    value = f"{float(scale[2, 1]):g}"
    assert said.startswith(f"shard.safetensors: tensor x holds {value} at [2, 1]; a scale of FP8")


def damage(stored: dict[str, Tensor], name: str, what: str) -> None:
    value = {"NaN": math.nan, "infinity": -math.inf}[what]
    stored[name].view(-1)[-1] = value


def read_all(directory: Path) -> None:
    """As a job's driver and an engine read: by layer, and what is outside."""
    reader = CheckpointReader(directory)
    for layer in range(reader.config.num_layers_with_mtp):
        reader.read_layer(layer)
    reader.read_globals()


def load_all(directory: Path) -> None:
    """As a job's workers read."""
    reader = CheckpointReader(directory)
    for layer in range(reader.config.num_layers_with_mtp):
        reader.load(layer_tensors(reader.config, layer))
    reader.load(global_tensors(reader.config))


@pytest.mark.heavy
@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("what", ["NaN", "infinity"])
def test_whichever_tensor_is_damaged_is_named_with_its_shard(
    tmp_path: Path, fp8: bool, what: str
) -> None:
    config = write_checkpoint(tmp_path, fp8=fp8)
    read_all(tmp_path)
    load_all(tmp_path)
    for name in NAMES:
        stored = random_tensors(config)
        if name not in stored or (what != "NaN" and stored[name].dtype == torch.float8_e4m3fn):
            continue  # a BF16 source has no scales, e4m3 no infinity
        damage(stored, name, what)
        write_shards(tmp_path, stored)
        last = [size - 1 for size in stored[name].shape]
        for read in (read_all, load_all):
            with pytest.raises(CheckpointError) as caught:
                read(tmp_path)
            assert f".safetensors: tensor {name} holds {what} at {last}; " in str(caught.value)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [0.0, -1e-4, 1e-40, 1e30, math.inf])
def test_a_scale_is_checked_with_the_tensor_that_it_belongs_to(tmp_path: Path, bad: float) -> None:
    name = f"{MAIN}mlp.experts.3.down_proj.weight_scale_inv"
    config = write_checkpoint(tmp_path)
    stored = random_tensors(config)
    stored[name][1, 0] = bad
    write_shards(tmp_path, stored)
    for read in (read_all, load_all):
        with pytest.raises(CheckpointError, match=rf"tensor {name} holds \S+ at \[1, 0\]"):
            read(tmp_path)


def test_what_the_releases_quantizer_makes_of_a_tile_of_zeros_is_refused(tmp_path: Path) -> None:
    """It computes s = amax / 448 and y = x / s, and has no lower limit for s."""
    name = f"{MAIN}mlp.experts.3.down_proj.weight"
    stored = random_tensors(write_checkpoint(tmp_path))
    tile = torch.zeros(128, 128)
    scale = tile.abs().amax() / 448
    stored[name][:128] = (tile / scale).to(torch.float8_e4m3fn)
    stored[f"{name}_scale_inv"][0] = scale
    write_shards(tmp_path, stored)
    with pytest.raises(CheckpointError, match=rf"tensor {name} holds NaN at \[0, 0\]"):
        CheckpointReader(tmp_path).read_layer(1)


def test_embedding_rows_are_checked_when_they_are_read(tmp_path: Path) -> None:
    name = "model.embed_tokens.weight"
    stored = random_tensors(write_checkpoint(tmp_path))
    stored[name][7, 3] = math.inf
    write_shards(tmp_path, stored)
    reader = CheckpointReader(tmp_path)
    assert torch.equal(reader.embed(torch.tensor([8, 6])), stored[name][[8, 6]].float())
    with pytest.raises(CheckpointError, match=rf"tensor {name} holds infinity at \[7, 3\]"):
        reader.embed(torch.tensor([1, 7]))


@pytest.mark.parametrize("name", [f"{MAIN}mlp.gate.e_score_correction_bias", f"{MTP}enorm.weight"])
def test_no_engine_is_made_of_a_damaged_source(tmp_path: Path, name: str) -> None:
    """What `evaluate` compares with, and `build` from a source, go this way."""
    stored = random_tensors(write_checkpoint(tmp_path))
    damage(stored, name, "NaN")
    write_shards(tmp_path, stored)
    with pytest.raises(CheckpointError, match=f"tensor {name} holds NaN"):
        LLMEngine.from_checkpoint(tmp_path)
