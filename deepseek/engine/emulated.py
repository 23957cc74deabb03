"""Linears that compute what a target's kernel computes: the same codes and scales as linear.py, the
target's roundings (arithmetic.py), and speed given up for both.

A `TargetLinear` has a weight, a rule for its input, and one FP32 product:

    y = bf16(round_input(x) W^T * scale)

The weight stays packed, as in linear.py, and is dequantized for each product, so memory does not
change. The products are FP32 on padded rows (`RowRule`), so a token's result does not depend on the
batch. Rules, by weight format, with the kernels whose rules they are:

    int4, int4-asym  (code - zero) * scale, rounded to BF16 where the kernel feeds BF16 tensor cores
                     (Marlin, Machete, TensorRT-LLM's fpA_intB); FP32 where it multiplies each
                     group's FP32 sum by the scale (W4A8: mixed-input grouped GEMM)
    int8, int8-asym  code - zero, the FP32 sum times the scale (Marlin, per channel), or the weight
                     rounded to BF16 first (fpA_intB)
    int8, W8A8       codes of both sides, exact integer sums, then both scales in FP32
    int4, W4A8 INT8  as int4: only the engine's own kernels multiply codes of both sides. vLLM loads
                     it and chooses its kernels by the weight, transformers dequantizes; the others
                     refuse it
    int8-block       codes of both sides, exact sums per tile of 128, times both scales in FP32
    fp8-block        the dequantized input times the dequantized weight: the tiles' FP32 sums times
                     both scales, up to the order of FP32 additions
    bf16             BF16 weight, FP32 sum

T tokens · N outputs · K inputs · g group size
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from deepseek.engine.target_inputs import (
    ceil_power_of_two,
    keep_input,
    round_static_fp8,
    round_tiles_fp8,
    round_token_int8,
    truncate_groups_int8,
)
from deepseek.formats import FP8_BLOCK, FP8_MAX, dequantize_fp8_block, quantize_fp8_block
from deepseek.recipe import Scheme

if TYPE_CHECKING:
    from deepseek.engine.linear import Encoded, Encoding, Kernels

#: f32 [T, K] -> the values that the product reads, f32 [T, K], and the factor of its result, f32
#: [T, 1] or [1], or None.
RoundInput = Callable[[Tensor], tuple[Tensor, Tensor | None]]
#: Integer products are exact in FP32 as long as they have at most this many terms: 127 * 128 * 1024
#: is below 2^24.
_EXACT_TERMS = 1024
_IDENTITY_ROWS = 256


class _Weight(Protocol):
    """A weight as it is stored. `values` is f32 [N, K], made anew where it is packed; `scale` is
    the factor f32 [N] of the result, or None."""

    scale: Tensor | None
    num_bytes: int

    def values(self) -> Tensor: ...


class TargetLinear:
    """One linear of a target. Its result has left the kernel: it is rounded."""

    encoding: Encoding = "f32"

    def __init__(
        self, weight: _Weight, round_input: RoundInput, kernels: Kernels, *, extra_bytes: int = 0
    ) -> None:
        self._weight, self._round_input, self._kernels = weight, round_input, kernels
        self._extra_bytes = extra_bytes

    @property
    def num_bytes(self) -> int:
        return self._weight.num_bytes + self._extra_bytes

    def matmul(self, x: Encoded) -> Tensor:
        values, scale = self._round_input(x.data)
        product = self._product(values)
        if self._weight.scale is not None:
            product = product * self._weight.scale
        if scale is not None:
            product = product * scale
        return self._kernels.round(product)

    def _product(self, values: Tensor) -> Tensor:
        padded = self._kernels.rows.pad(values)
        return torch.nn.functional.linear(padded, self._weight.values())[: values.shape[0]]


class ExactTargetLinear(TargetLinear):
    """W8A8: integer values on both sides, and their exact sums."""

    def _product(self, values: Tensor) -> Tensor:
        total = None
        weight = self._weight.values()
        for first in range(0, values.shape[1], _EXACT_TERMS):
            part = slice(first, first + _EXACT_TERMS)
            padded = self._kernels.rows.pad(values[:, part].contiguous())
            sums = torch.nn.functional.linear(padded, weight[:, part].contiguous())
            exact = sums[: values.shape[0]].to(torch.int32)
            total = exact if total is None else total + exact
        assert total is not None
        return total.float()  # INT32 to FP32 in the epilogue, rounded to nearest as there


class Int8TileTargetLinear:
    """INT8 tiles on both sides (SGLang's `blockwise_int8`): codes int8 [K/128, N, 128] and scale
    f32 [K/128, N]; the exact sum of each tile, times both scales, added up in FP32."""

    encoding: Encoding = "f32"

    def __init__(self, codes: Tensor, scale: Tensor, kernels: Kernels) -> None:
        self._codes, self._scale, self._kernels = codes, scale, kernels

    @property
    def num_bytes(self) -> int:
        return self._codes.nbytes + self._scale.nbytes

    def matmul(self, x: Encoded) -> Tensor:
        codes, scale = truncate_groups_int8(x.data)
        total = x.data.new_zeros((x.data.shape[0], self._codes.shape[1]))
        for tile in range(self._codes.shape[0]):
            padded = self._kernels.rows.pad(codes[:, tile].contiguous())
            sums = torch.nn.functional.linear(padded, self._codes[tile].float())
            total += sums[: total.shape[0]] * scale[:, tile, None] * self._scale[tile]
        return self._kernels.round(total)


class PlainWeight:
    """f32 [N, K] as it is multiplied."""

    scale: Tensor | None = None

    def __init__(self, weight: Tensor) -> None:
        self._values = weight
        self.num_bytes = weight.nbytes

    def values(self) -> Tensor:
        return self._values


class Int8Weight:
    """Codes int8 [N, K], scale f32 [N], zero point int8 [N] or None. With `rounded` the scale is
    inside the values, which are BF16; else it multiplies the result."""

    def __init__(
        self, codes: Tensor, scale: Tensor, zero_point: Tensor | None, *, rounded: bool
    ) -> None:
        self._codes, self._scale, self._zero_point = codes, scale, zero_point
        self.scale = None if rounded else scale
        zero_bytes = 0 if zero_point is None else zero_point.nbytes
        self.num_bytes = codes.nbytes + scale.nbytes + zero_bytes

    def values(self) -> Tensor:
        steps = self._codes.float()
        if self._zero_point is not None:
            steps -= self._zero_point[:, None]
        if self.scale is not None:
            return steps
        return steps.mul_(self._scale[:, None]).bfloat16().float()


class Int4Weight:
    """The tensors of `Int4Linear`, held in the order of rows: uint8 [N, K/2], column 2 i in the low
    bits, and scale with zero, BF16 [K/g, N, 2]."""

    scale: Tensor | None = None

    def __init__(
        self, packed: Tensor, scale_zero: Tensor, group_size: int, *, rounded: bool
    ) -> None:
        self._codes = unpack_tiles(packed, group_size)
        self._scale_zero, self._group_size, self._rounded = scale_zero, group_size, rounded
        self.num_bytes = self._codes.nbytes + scale_zero.nbytes

    def values(self) -> Tensor:
        num_outputs = self._codes.shape[0]
        codes = torch.stack((self._codes & 15, self._codes >> 4), dim=-1).view(num_outputs, -1)
        scale, zero = self._scale_zero.float().transpose(0, 1).unbind(dim=-1)  # [N, K/g]
        # The engine stores -zero_point * scale in BF16. Its rounding moves a quotient of at most 8
        # by less than 0.04, so the zero point itself comes back exactly.
        zero_point = torch.where(scale == 0, 0.0, -zero / scale).round_()
        steps = codes.view(num_outputs, -1, self._group_size).float()
        steps -= 8
        steps -= zero_point[..., None]
        values = steps.mul_(scale[..., None]).view(num_outputs, -1)
        return values.bfloat16().float() if self._rounded else values


class Int4GroupWeight:
    """The tensors of `Int4DynamicLinear`, by groups."""

    scale: Tensor | None = None

    def __init__(
        self, codes: Tensor, scale: Tensor, zero_point: Tensor | None, *, rounded: bool
    ) -> None:
        self._codes, self._scale, self._zero_point = codes, scale, zero_point
        self._rounded = rounded
        zero_bytes = 0 if zero_point is None else zero_point.nbytes
        self.num_bytes = codes.nbytes + scale.nbytes + zero_bytes

    def values(self) -> Tensor:
        steps = torch.stack((self._codes & 15, self._codes >> 4), dim=-1).flatten(2).float() - 8
        if self._zero_point is not None:
            steps -= self._zero_point[..., None]
        steps *= self._scale[..., None].float()
        values = steps.transpose(0, 1).flatten(1)
        return values.bfloat16().float() if self._rounded else values


def unpack_tiles(packed: Tensor, group_size: int) -> Tensor:
    """INT4 weights in this CPU's tile order -> uint8 [N, K/2] in the order of rows, column 2 i in
    the low bits; values 0..15.

    The order belongs to torch's operator, so the operator itself is asked: its product with the
    identity, scale 1 and zero 0, is the weight.
    """
    num_outputs, num_inputs = packed.shape[0], packed.shape[1] * 2
    scale_zero = torch.zeros((num_inputs // group_size, num_outputs, 2), dtype=torch.bfloat16)
    scale_zero[..., 0] = 1
    codes = torch.empty((num_outputs, num_inputs // 2), dtype=torch.uint8)
    for first in range(0, num_inputs, _IDENTITY_ROWS):
        count = min(_IDENTITY_ROWS, num_inputs - first)
        rows = torch.zeros((count, num_inputs), dtype=torch.bfloat16)
        rows[torch.arange(count), torch.arange(first, first + count)] = 1
        columns = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, group_size, scale_zero)
        unsigned = (columns.T + 8).to(torch.uint8)
        pairs = slice(first // 2, (first + count) // 2)
        codes[:, pairs] = unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)
    return codes


def make_target_linear(
    scheme: Scheme, tensors: Mapping[str, Tensor], kernels: Kernels
) -> TargetLinear | Int8TileTargetLinear:
    """The linear of `make_linear` in a target's arithmetic, from the same tensors."""
    match scheme.weights:
        case "int4" | "int4-asym" if scheme.activations == "int8":
            return _int4_values(scheme, tensors, kernels)
        case "int4" | "int4-asym":
            return _int4_linear(scheme, tensors, kernels)
        case "int8" | "int8-asym":
            return _int8_linear(scheme, tensors, kernels)
        case "int8-block":
            return Int8TileTargetLinear(tensors["codes"], tensors["scale"], kernels)
        case "fp8-block" if kernels.arithmetic.block_inputs != "none":
            return _tile_linear(tensors["weight"], kernels)
        case "bf16" | "fp8-block":
            values = tensors["weight"]
            if scheme.weights == "bf16" or "fp8-block" in kernels.arithmetic.rounded_weights:
                values = kernels.round(values)
            return TargetLinear(PlainWeight(values), keep_input, kernels)
        case other:
            raise AssertionError(f"no target has a linear in {other}")


def _int4_linear(scheme: Scheme, tensors: Mapping[str, Tensor], kernels: Kernels) -> TargetLinear:
    assert scheme.group_size is not None
    rule = kernels.arithmetic.static_inputs if scheme.activations == "fp8" else "none"
    rounded = rule == "none" and scheme.weights in kernels.arithmetic.rounded_weights
    weight = Int4Weight(
        tensors["packed"], tensors["scale_zero"], scheme.group_size, rounded=rounded
    )
    input_scale = tensors.get("input_scale")
    if input_scale is None:
        return TargetLinear(weight, keep_input, kernels)
    round_input: RoundInput = keep_input
    if rule != "none":
        round_input = functools.partial(round_static_fp8, input_scale=input_scale, rule=rule)
    return TargetLinear(weight, round_input, kernels, extra_bytes=input_scale.nbytes)


def _int4_values(scheme: Scheme, tensors: Mapping[str, Tensor], kernels: Kernels) -> TargetLinear:
    """INT4 with INT8 inputs, of which every target computes the weight's part alone."""
    stored = tensors["codes"], tensors["scale"], tensors.get("zero_point")
    rounded = scheme.weights in kernels.arithmetic.rounded_weights
    return TargetLinear(Int4GroupWeight(*stored, rounded=rounded), keep_input, kernels)


def _int8_linear(scheme: Scheme, tensors: Mapping[str, Tensor], kernels: Kernels) -> TargetLinear:
    stored = tensors["codes"], tensors["scale"], tensors.get("zero_point")
    if scheme.activations == "int8" and kernels.arithmetic.token_inputs == "int8":
        return ExactTargetLinear(Int8Weight(*stored, rounded=False), round_token_int8, kernels)
    rounded = scheme.weights in kernels.arithmetic.rounded_weights
    return TargetLinear(Int8Weight(*stored, rounded=rounded), keep_input, kernels)


def _tile_linear(values: Tensor, kernels: Kernels) -> TargetLinear:
    is_power = kernels.arithmetic.block_inputs == "fp8-pow2"
    weight = PlainWeight(requantize_tiles(values) if is_power else values)
    return TargetLinear(
        weight, lambda x: (round_tiles_fp8(x, power_of_two=is_power), None), kernels
    )


def round_absorbed(
    w_uk: Tensor, w_uv: Tensor, scheme: Scheme, kernels: Kernels
) -> tuple[Tensor, Tensor]:
    """The two halves of kv_b_proj, f32 [H, n, R] and [H, R, v], as the target multiplies them."""
    arithmetic = kernels.arithmetic
    if arithmetic.absorbed == "float32":
        return w_uk, w_uv
    if scheme.weights == "fp8-block" and arithmetic.block_inputs == "fp8-pow2":
        key = w_uk.shape[1]
        whole = torch.cat((w_uk, w_uv.transpose(1, 2)), dim=1)  # [H, n + v, R]
        whole = requantize_tiles(whole.flatten(0, 1)).view_as(whole)
        w_uk, w_uv = whole[:, :key].contiguous(), whole[:, key:].transpose(1, 2).contiguous()
    if scheme.weights == "fp8-block" and arithmetic.absorbed == "fp8":
        return w_uk, w_uv
    return kernels.round(w_uk), kernels.round(w_uv)


def requantize_tiles(weight: Tensor) -> Tensor:
    """Dequantized FP8 tiles f32 [N, K] -> quantized again with scales that are powers of two, as
    vLLM's `requant_weight_ue8m0_inplace` does at load, and dequantized."""
    amax = tile_amax(weight).clamp_min(1e-4)
    scale = ceil_power_of_two(amax * (1.0 / FP8_MAX))
    return dequantize_fp8_block(*quantize_fp8_block(weight, scale=scale))


def tile_amax(weight: Tensor) -> Tensor:
    """f32 [N, K] -> the largest magnitude of each 128x128 tile, f32 [ceil(N/128), ceil(K/128)]."""
    pads = (0, -weight.shape[1] % FP8_BLOCK, 0, -weight.shape[0] % FP8_BLOCK)
    padded = torch.nn.functional.pad(weight, pads)
    tiles = padded.view(padded.shape[0] // FP8_BLOCK, FP8_BLOCK, -1, FP8_BLOCK)
    return tiles.abs().amax(dim=(1, 3))
