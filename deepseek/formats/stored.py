"""One linear's weight as the named tensors of a compressed-tensors checkpoint, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from deepseek.errors import ArtifactError
from deepseek.formats.fp8 import dequantize_fp8_block, quantize_fp8_block
from deepseek.formats.int4 import dequantize_int4, num_groups, pack_int4, quantize_int4, unpack_int4
from deepseek.formats.int8 import (
    dequantize_int8,
    pack_int8,
    quantize_int8,
    quantize_int8_asym,
    unpack_int8,
)
from deepseek.formats.int8_block import dequantize_int8_block, quantize_int8_block
from deepseek.formats.scales import check_magnitude, given_scale, row_chunks
from deepseek.formats.tiles import num_tiles
from deepseek.formats.zero_points import pack_zero_point, unpack_zero_point
from deepseek.recipe import Scheme

#: Suffix -> (shape, dtype) of each tensor that one weight is stored as.
Stored = dict[str, tuple[tuple[int, ...], torch.dtype]]


def compress(
    weight: Tensor,
    scheme: Scheme,
    *,
    amax: Tensor | None = None,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> dict[str, Tensor]:
    """Float [N, K] -> the tensors to store, by suffix, exactly as `stored_shapes` lists them.

    `amax`, `scale` and `zero_point` are passed to the format's `quantize_*` function, which gives
    their shapes. A bfloat16 weight that stays bfloat16 is not copied.

    `input_scale`, float32 [1], belongs to a scheme with FP8 activations. It depends on all experts
    of a layer together, so a weight may be compressed before it is known. A caller that leaves it
    out adds it to the result (`stored["input_scale"] = ...`) before the layer is published.

    Raises:
        RecipeError: the group size does not divide K.
        CheckpointError: a value, amax, scale or zero point cannot be represented. The message gives
            the reason ("holds NaN, ..."); the caller puts the tensor's name in front.
    """
    assert input_scale is None or scheme.activations == "fp8", scheme.label
    match scheme.weights:
        case "int4" | "int4-asym":
            stored = _compress_int4(weight, scheme, amax, scale, zero_point)
            if input_scale is not None:
                assert tuple(input_scale.shape) == (1,), tuple(input_scale.shape)
                stored["input_scale"] = given_scale(input_scale, torch.float32)
            return stored
        case "int8-asym":
            assert amax is None, "an amax alone says nothing about an asymmetric range"
            codes, scale, zeros = quantize_int8_asym(weight, scale=scale, zero_point=zero_point)
            return _packed_int8(codes, scale) | {"weight_zero_point": pack_zero_point(zeros, 8)}
        case "int8":
            assert zero_point is None, "int8 weights are symmetric"
            codes, scale = quantize_int8(weight, amax=amax, scale=scale)
            if scheme.activations == "none":
                return _packed_int8(codes, scale)
            return {"weight": codes, "weight_scale": scale}
        case "int8-block":
            assert zero_point is None, "int8 weights are symmetric"
            codes, scale = quantize_int8_block(weight, amax=amax, scale=scale)
            return {"weight": codes, "weight_scale": scale}
        case "fp8-block":
            assert zero_point is None, "fp8 weights are symmetric"
            codes, scale = quantize_fp8_block(weight, amax=amax, scale=scale)
            return {"weight": codes, "weight_scale": scale}
        case "bf16":
            assert amax is scale is zero_point is None, "bfloat16 weights have no scale"
            for rows in row_chunks(weight):
                check_magnitude(weight[rows].abs().amax())
            return {"weight": weight.to(torch.bfloat16)}
        case "source":
            raise AssertionError("Recipe.resolve makes `source` concrete first")


def decompress(tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> Tensor:
    """The tensors of `compress` -> float32 [N, K]; `shape` is (N, K), from the inventory.

    `input_scale` does not affect the weight and may still be absent, as after `compress`.

    Raises:
        ArtifactError: a tensor is missing, unknown, or of another shape or dtype than the scheme
            stores. The message names the suffix; the caller puts the module in front.
    """
    _check_stored(tensors, scheme, shape)
    match scheme.weights:
        case "int4" | "int4-asym":
            zero_point = tensors.get("weight_zero_point")
            return dequantize_int4(
                unpack_int4(tensors["weight_packed"], shape[1]),
                tensors["weight_scale"],
                None if zero_point is None else unpack_zero_point(zero_point, shape[0]),
            )
        case "int8" | "int8-asym":
            zero_point = tensors.get("weight_zero_point")
            return dequantize_int8(
                int8_codes(tensors, shape),
                tensors["weight_scale"],
                None if zero_point is None else unpack_zero_point(zero_point, shape[0], 8),
            )
        case "int8-block":
            return dequantize_int8_block(tensors["weight"], tensors["weight_scale"])
        case "fp8-block":
            return dequantize_fp8_block(tensors["weight"], tensors["weight_scale"])
        case _:
            return tensors["weight"].float()


def int8_codes(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """The codes int8 [N, K] of an INT8 linear, stored packed (weight-only) or plain (with INT8
    activations).

    Weight-only INT8 is packed because that is the form in which vLLM and transformers accept an
    8-bit weight without activation quantization.
    """
    if "weight_packed" in tensors:
        return unpack_int8(tensors["weight_packed"], shape[1])
    return tensors["weight"]


def stored_shapes(scheme: Scheme, num_outputs: int, num_inputs: int) -> Stored:
    """The tensors that an [N, K] weight is stored as: suffix -> (shape, dtype).

    Raises:
        RecipeError: the group size does not divide the inputs.
    """
    shape = (num_outputs, num_inputs)
    match scheme.weights:
        case "int4" | "int4-asym":
            assert scheme.group_size is not None
            groups = num_groups(num_inputs, scheme.group_size)
            stored: Stored = {
                "weight_packed": ((num_outputs, math.ceil(num_inputs / 8)), torch.int32),
                "weight_scale": ((num_outputs, groups), torch.bfloat16),
                "weight_shape": ((2,), torch.int64),
            }
            if scheme.weights == "int4-asym":
                stored["weight_zero_point"] = ((math.ceil(num_outputs / 8), groups), torch.int32)
            if scheme.activations == "fp8":
                stored["input_scale"] = ((1,), torch.float32)
            return stored
        case "int8" if scheme.activations == "int8":
            return {
                "weight": (shape, torch.int8),
                "weight_scale": ((num_outputs, 1), torch.float32),
            }
        case "int8" | "int8-asym":
            stored = {
                "weight_packed": ((num_outputs, math.ceil(num_inputs / 4)), torch.int32),
                "weight_scale": ((num_outputs, 1), torch.float32),
                "weight_shape": ((2,), torch.int64),
            }
            if scheme.weights == "int8-asym":
                stored["weight_zero_point"] = ((math.ceil(num_outputs / 4), 1), torch.int32)
            return stored
        case "int8-block":
            return {
                "weight": (shape, torch.int8),
                "weight_scale": (num_tiles(shape), torch.float32),
            }
        case "fp8-block":
            return {
                "weight": (shape, torch.float8_e4m3fn),
                "weight_scale": (num_tiles(shape), torch.float32),
            }
        case "bf16":
            return {"weight": (shape, torch.bfloat16)}
        case "source":
            raise AssertionError("Recipe.resolve makes `source` concrete first")


def stored_bytes(scheme: Scheme, num_outputs: int, num_inputs: int) -> int:
    """Bytes of all tensors that an [N, K] weight is stored as, scales and zero points included."""
    stored = stored_shapes(scheme, num_outputs, num_inputs).values()
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in stored)


def _compress_int4(
    weight: Tensor,
    scheme: Scheme,
    amax: Tensor | None,
    scale: Tensor | None,
    zero_point: Tensor | None,
) -> dict[str, Tensor]:
    assert scheme.group_size is not None
    codes, scale, zero_point = quantize_int4(
        weight,
        scheme.group_size,
        scheme.weights == "int4",
        amax=amax,
        scale=scale,
        zero_point=zero_point,
    )
    tensors = {
        "weight_packed": pack_int4(codes),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if zero_point is not None:
        tensors["weight_zero_point"] = pack_zero_point(zero_point)
    return tensors


def _packed_int8(codes: Tensor, scale: Tensor) -> dict[str, Tensor]:
    return {
        "weight_packed": pack_int8(codes),
        "weight_scale": scale,
        "weight_shape": torch.tensor(codes.shape, dtype=torch.int64),
    }


def _check_stored(tensors: Mapping[str, Tensor], scheme: Scheme, shape: tuple[int, int]) -> None:
    expected = stored_shapes(scheme, *shape)
    if "input_scale" not in tensors:
        expected.pop("input_scale", None)
    for suffix in sorted(expected.keys() ^ tensors.keys()):
        problem = "is missing" if suffix in expected else "is unknown"
        raise ArtifactError(f"{suffix} {problem} for weights {scheme.label}; quantize again")
    for suffix, (stored_shape, dtype) in expected.items():
        tensor = tensors[suffix]
        if tuple(tensor.shape) != stored_shape or tensor.dtype != dtype:
            raise ArtifactError(
                f"{suffix} is {tensor.dtype} {tuple(tensor.shape)}, but weights {scheme.label} of "
                f"shape {shape} store {dtype} {stored_shape}; quantize again"
            )
    if "weight_shape" in tensors and tuple(tensors["weight_shape"].tolist()) != shape:
        raise ArtifactError(
            f"weight_shape says {tuple(tensors['weight_shape'].tolist())}, but the weight is "
            f"{shape}; quantize again"
        )
