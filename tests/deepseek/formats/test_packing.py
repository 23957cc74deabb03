"""Our bytes against the installed compressed-tensors: packing, codes and dequantized values."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.naive_quantized import NaiveQuantizationCompressor
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams

from deepseek.formats import (
    compress,
    decompress,
    pack_int4,
    pack_int8,
    pack_zero_point,
    quantize_int4,
    quantize_int8_asym,
    unpack_int4,
    unpack_int8,
    unpack_zero_point,
)
from deepseek.recipe import Scheme

#: Our scheme -> (their compressor, their arguments).
ORACLES = {
    "int8": (PackedQuantizationCompressor, {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "int8-asym": (
        PackedQuantizationCompressor,
        {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False},
    ),
    "int8-a8": (NaiveQuantizationCompressor, {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "fp8-block": (
        NaiveQuantizationCompressor,
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]},
    ),
    "int8-block": (
        NaiveQuantizationCompressor,
        {"num_bits": 8, "type": "int", "strategy": "block", "block_structure": [128, 128]},
    ),
    "int4": (PackedQuantizationCompressor, {"num_bits": 4, "type": "int", "strategy": "group"}),
    "int4-asym": (
        PackedQuantizationCompressor,
        {"num_bits": 4, "type": "int", "strategy": "group", "symmetric": False},
    ),
}
CASES = [
    ("int8", None, (160, 256)),
    ("int8", None, (13, 77)),
    *[("int8-asym", None, shape) for shape in ((160, 256), (13, 77), (5, 128))],
    ("int8-a8", None, (160, 256)),
    ("int8-a8", None, (13, 77)),
    ("fp8-block", None, (128, 256)),
    ("fp8-block", None, (160, 256)),
    ("fp8-block", None, (200, 130)),
    ("fp8-block", None, (1, 1)),
    *[("int8-block", None, shape) for shape in ((128, 256), (160, 256), (200, 130), (1, 1))],
    *[("int4", group, (130, 384)) for group in (32, 64, 128)],
    *[("int4-asym", group, (130, 384)) for group in (32, 64, 128)],
    ("int4-asym", 32, (3, 32)),
]


def gaussian(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scheme_of(weights: str, group_size: int | None) -> Scheme:
    if weights == "int8-a8":
        return Scheme(weights="int8", activations="int8")
    if weights == "int8-block":
        return Scheme(weights="int8-block", activations="int8")
    return Scheme(weights=weights, group_size=group_size)


def oracle(weights: str, group_size: int | None):  # type: ignore[no-untyped-def]
    compressor, arguments = ORACLES[weights]
    args = QuantizationArgs(**arguments, group_size=group_size)
    return compressor, QuantizationScheme(targets=["Linear"], weights=args)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes, so that -0 differs from 0 and NaN equals itself."""
    return tensor.clone(memory_format=torch.contiguous_format).view(torch.uint8)


def test_each_code_at_each_nibble_is_stored_as_value_plus_8_lowest_first() -> None:
    for position in range(8):
        for code in range(-8, 8):
            row = torch.zeros((1, 8), dtype=torch.int8)
            row[0, position] = code
            word = sum(8 << (4 * at) for at in range(8) if at != position)
            word |= (code + 8) << (4 * position)
            packed = pack_int4(row)
            assert packed.item() & 0xFFFFFFFF == word, f"{position=} {code=}"
            assert torch.equal(unpack_int4(packed, 8), row), f"{position=} {code=}"


@pytest.mark.parametrize("num_columns", [1, 7, 8, 9, 31, 32, 33, 130])
def test_packing_equals_compressed_tensors_for_every_rest(num_columns: int) -> None:
    generator = torch.Generator().manual_seed(num_columns)
    codes = torch.randint(-8, 8, (19, num_columns), generator=generator, dtype=torch.int8)
    packed = pack_int4(codes)
    assert torch.equal(packed, pack_to_int32(codes, 4))
    assert torch.equal(unpack_int4(packed, num_columns), codes)
    assert torch.equal(unpack_from_int32(packed, 4, codes.shape), codes)


@pytest.mark.parametrize("num_columns", [1, 3, 4, 5, 130, 256])
def test_packing_8_bits_equals_compressed_tensors_for_every_rest(num_columns: int) -> None:
    codes = torch.arange(3 * num_columns).remainder(256).sub(128).to(torch.int8).view(3, -1)
    packed = pack_int8(codes)
    assert torch.equal(packed, pack_to_int32(codes, 8))
    assert torch.equal(unpack_int8(packed, num_columns), codes)
    assert torch.equal(unpack_from_int32(packed, 8, codes.shape), codes)


@pytest.mark.parametrize("num_groups", [1, 5])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("num_rows", [1, 7, 8, 9, 130])
def test_zero_points_pack_along_the_outputs_as_in_compressed_tensors(
    num_rows: int, bits: int, num_groups: int
) -> None:
    generator = torch.Generator().manual_seed(num_rows)
    limit, shape = 1 << (bits - 1), (num_rows, num_groups)
    zeros = torch.randint(-limit, limit, shape, generator=generator, dtype=torch.int8)
    packed = pack_zero_point(zeros, bits)
    assert packed.shape == (-(-num_rows * bits // 32), num_groups)
    assert packed.is_contiguous()
    assert torch.equal(packed, pack_to_int32(zeros, bits, packed_dim=0))
    assert torch.equal(unpack_zero_point(packed, num_rows, bits), zeros)
    # Of up to 8 rows compressed-tensors 0.20 cannot unpack its own result either (strides).
    theirs = packed.T.clone(memory_format=torch.contiguous_format).T
    assert torch.equal(unpack_from_int32(theirs, bits, zeros.shape, packed_dim=0), zeros)


def test_a_code_that_does_not_fit_a_nibble_is_never_packed() -> None:
    for code in (-9, 8, 127, -128):
        with pytest.raises(AssertionError, match="outside"):
            pack_int4(torch.tensor([[0, code]], dtype=torch.int8))


@pytest.mark.parametrize(("weights", "group_size", "shape"), CASES)
def test_compressed_tensors_makes_the_same_tensors_from_our_scales(
    weights: str, group_size: int | None, shape: tuple[int, int]
) -> None:
    weight = gaussian(shape)
    ours = compress(weight, scheme_of(weights, group_size))
    state = {"weight": weight, "weight_scale": ours["weight_scale"]}
    if "weight_zero_point" in ours:
        width = scheme_of(weights, group_size).bits
        state["weight_zero_point"] = unpack_zero_point(ours["weight_zero_point"], shape[0], width)
    compressor, scheme = oracle(weights, group_size)
    theirs = compressor.compress(state, scheme)
    assert theirs.keys() == ours.keys() == set(compressor.compression_param_names(scheme))
    for suffix, tensor in ours.items():
        assert tensor.dtype == theirs[suffix].dtype, suffix
        assert torch.equal(bits(tensor), bits(theirs[suffix])), suffix


@pytest.mark.parametrize(("weights", "group_size", "shape"), CASES)
def test_compressed_tensors_reads_the_same_values_from_our_tensors(
    weights: str, group_size: int | None, shape: tuple[int, int]
) -> None:
    """It computes in the scale's dtype; our float32 is exact, so rounding it gives its values."""
    ours = scheme_of(weights, group_size)
    tensors = compress(gaussian(shape, seed=1), ours)
    compressor, scheme = oracle(weights, group_size)
    theirs = compressor.decompress(dict(tensors), scheme)["weight"]
    assert theirs.dtype == tensors["weight_scale"].dtype
    assert torch.equal(bits(decompress(tensors, ours, shape).to(theirs.dtype)), bits(theirs))


@pytest.mark.parametrize("shift", [-9.0, -1.0, 0.0, 1.0, 9.0])
def test_asymmetric_int8_parameters_are_those_of_compressed_tensors(shift: float) -> None:
    weight = gaussian((64, 256)) + shift
    args = QuantizationArgs(num_bits=8, strategy="channel", symmetric=False)
    scale, zero_point = calculate_qparams(weight.amin(1, True), weight.amax(1, True), args)
    _, ours, ours_zero = quantize_int8_asym(weight)
    assert torch.equal(ours, scale)
    assert torch.equal(ours_zero.int(), zero_point.int())


@pytest.mark.parametrize("shift", [-9.0, -1.0, 0.0, 1.0, 9.0])
def test_asymmetric_parameters_are_those_of_compressed_tensors_up_to_the_stored_scale(
    shift: float,
) -> None:
    """Their zero point comes from the float32 scale, ours from the bfloat16 one that is stored: at
    most one apart, and rarely."""
    grouped = (gaussian((64, 8, 32)) + shift).contiguous()
    args = QuantizationArgs(num_bits=4, strategy="group", group_size=32, symmetric=False)
    scale, zero_point = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
    _, ours, ours_zero = quantize_int4(grouped.flatten(1), 32, symmetric=False)
    assert torch.equal(ours, scale.to(torch.bfloat16))
    assert ours_zero is not None
    apart = (ours_zero.int() - zero_point.int()).abs()
    assert apart.max() <= 1
    assert (apart > 0).float().mean() < 0.05
