"""PyTorch's kernels of linears: one class per weight format; `make_linear` chooses the class.

They are the slow reference beside the native kernels, and compute where the extension was not
built, or a target is emulated. The formats themselves are deepseek/formats; model.py and moe.py
call the kernels through `Projection`.

Measurements chose each kernel (bench/linear_formats.py). Per format, on CPUs without AMX:

  f32       F.linear. Weights in BF16 and in FP8 tiles are held in FP32, which is exact: tests hold
            these against transformers. (BF16 products are 2 to 10 times slower than FP32 ones on
            some CPUs and 2 to 3 times faster on others.)
  int8      weight-only: `_weight_int8pack_mm` with BF16 activations, the only fast path of that
            operator (FP32 activations take a scalar loop, 100 times slower). Fastest of all at one
            token; slower than FP32 from about 64 tokens on. Its error is the rounding of
            activations and outputs to BF16, 2.3e-3 relative.
  int8-a8   per-token dynamic activations. With VNNI, `_int_mm` (exact). Without it `_int_mm` is a
            scalar loop (30 times slower than FP32), so the activation codes, integers up to 127,
            which BF16 holds exactly, go through `_weight_int8pack_mm`; the integer sum is rounded
            to BF16 once (1.7e-3, against the 2e-2 of the format itself).
  int8-asym as int8; z * (sum of the inputs) is subtracted from the sums in FP32: 2.4e-3. Rounding
            the sums to BF16 costs more, the farther the zero point z lies from most codes: 2.3e-2
            where one weight of 40 sigma sets the range (the format's own error is 4.6e-2). The same
            speed within 5 %.
  int8-block-a8
            per tile of 128 inputs one product of INT8 codes, exact, times the token's scale and the
            tile's, added up in FP32. With VNNI the product is `_int_mm`; without it an FP32 product
            of the codes, which is exact too (sums stay below 2^21), so the bits do not depend on
            the CPU. Codes lie tile by tile: 2 to 4 times faster than as columns of one matrix.
  int4      `_weight_int4pack_mm_for_cpu` with BF16 activations, scale and zero in BF16. Rounding
            the zero to BF16 costs less than 1e-4; the kernel's error is 2.4e-3, the format's 0.1.
  int4-a8   per-token dynamic activations, symmetric or with zero points. Per group of inputs one
            product of integers, code - zero point with the activation's code, exact; times the
            group's scale, added up in FP32 in ascending order of the groups; times the token's
            scale. Each product and each sum is rounded to FP32 (no fused multiply-add), so that
            the bits depend on nothing. A slow reference: the native kernel is what is fast.
  int4-afp8 the same on e4m3 codes of the input, which BF16 holds exactly, times the input's static
            scale: 1.7e-3, against the 2.6e-2 of rounding to e4m3. `matmul` quantizes the input,
            because the scale belongs to the linear, not to the token. 4 to 8 % slower than int4
            ([4096, 7168], 1 to 256 tokens), most of it torch's cast from e4m3 to BF16.

Batch invariance: each format has one kernel for any number of rows. The low-bit kernels compute a
row alike in any batch. FP32 GEMMs do so only from a few rows on (a single row takes another code
path), so FP32 inputs are padded with zero rows to a multiple that a probe finds at the start
(`RowRule`; 4 here). Greedy tokens are then the same alone, batched, chunked or preempted, bit for
bit.

T tokens · N outputs · K inputs · g group size
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from deepseek.engine.arithmetic import EMBEDDED, Arithmetic
from deepseek.engine.emulated import make_target_linear
from deepseek.formats import (
    TILE,
    quantize_input_fp8,
    quantize_token_groups_int8,
    quantize_tokens_int8,
)
from deepseek.recipe import Scheme

#: Input of a kernel: f32, BF16, INT8 codes with a scale per token, those codes held in BF16, or
#: INT8 codes with a scale per token and 128 channels.
Encoding = Literal["f32", "bf16", "int8", "int8-in-bf16", "int8-tiles"]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Activations [T, K] in one encoding; `scale` is f32 [T, 1] for INT8 codes and f32 [T, K/128]
    for codes in tiles (K padded to a multiple of 128 with zeros), else None."""

    data: Tensor
    scale: Tensor | None = None

    def take(self, rows: Tensor) -> Encoded:
        """Copy the rows at these indices, int64 [R]."""
        scale = None if self.scale is None else self.scale.index_select(0, rows)
        return Encoded(self.data.index_select(0, rows), scale)

    def cut(self, first: int, last: int) -> Encoded:
        """A view of the rows [first, last)."""
        scale = None if self.scale is None else self.scale[first:last]
        return Encoded(self.data[first:last], scale)


def encode(x: Tensor, encodings: Iterable[Encoding]) -> dict[Encoding, Encoded]:
    """Encode f32 [T, K] once in each encoding, for all linears that share the input."""
    encoded: dict[Encoding, Encoded] = {}
    for encoding in encodings:
        if encoding == "f32":
            encoded[encoding] = Encoded(x)
        elif encoding == "bf16":
            encoded[encoding] = Encoded(x.bfloat16())
        elif encoding == "int8-tiles":
            whole = torch.nn.functional.pad(x, (0, -x.shape[-1] % TILE))
            encoded[encoding] = Encoded(*quantize_token_groups_int8(whole))
        else:
            codes, scale = quantize_tokens_int8(x)
            encoded[encoding] = Encoded(codes if encoding == "int8" else codes.bfloat16(), scale)
    return encoded


@dataclass(frozen=True, slots=True)
class RowRule:
    """FP32 products run on a multiple of `multiple` rows; 1 means any number of rows."""

    multiple: int

    def pad(self, x: Tensor, dim: int = 0) -> Tensor:
        """Append zero rows along `dim` up to the next multiple; the caller removes them again."""
        extra = -x.shape[dim] % self.multiple
        if not extra:
            return x
        widths = [0] * (2 * (x.ndim - dim))
        widths[-1] = extra
        return torch.nn.functional.pad(x, widths)


@dataclass(frozen=True, slots=True)
class Kernels:
    """The kernels that compute a step, and the arithmetic that they compute in.

    `isa` names the instruction set of the native kernels, and is None where PyTorch's compute; the
    other fields are of PyTorch's. `is_batch_invariant` is False also where batch invariance was not
    asked for.
    """

    rows: RowRule
    has_vnni: bool
    is_batch_invariant: bool
    arithmetic: Arithmetic = EMBEDDED
    isa: str | None = None

    @property
    def name(self) -> str:
        """For people: `native (avx512)` or `torch`."""
        return "torch" if self.isa is None else f"native ({self.isa})"

    @property
    def layout(self) -> Literal["native", "torch"]:
        """How the tensors lie that they take."""
        return "torch" if self.isa is None else "native"

    @classmethod
    def detect(
        cls, *, batch_invariant: bool, arithmetic: Arithmetic = EMBEDDED, isa: str | None = None
    ) -> Kernels:
        """Ask torch about this CPU and, for batch invariance, probe its GEMM with the current
        number of threads. `arithmetic` is the one that the kernels emulate."""
        multiple = find_row_multiple(torch.get_num_threads()) if batch_invariant else None
        return cls(
            RowRule(multiple or 1),
            has_vnni=torch.cpu._is_vnni_supported(),
            is_batch_invariant=multiple is not None,
            arithmetic=arithmetic,
            isa=isa,
        )

    def round(self, x: Tensor) -> Tensor:
        """A tensor f32 as it leaves a kernel: `x` itself in FP32, a copy of its values rounded to
        BF16 otherwise."""
        return x if self.arithmetic.activations == "float32" else x.bfloat16().float()

    def round_factor(self, x: Tensor) -> Tensor:
        """As `round`, for what a norm or SwiGLU multiplies last, where the target rounds twice."""
        return self.round(x) if self.arithmetic.elementwise == "twice" else x

    def round_angle(self, x: Tensor) -> Tensor:
        """As `round`, for cosines, sines and what they multiply."""
        return self.round(x) if self.arithmetic.angles == "bfloat16" else x


class Linear(Protocol):
    """y = x W^T for one weight [N, K]."""

    encoding: Encoding

    @property
    def num_bytes(self) -> int: ...

    def matmul(self, x: Encoded) -> Tensor:
        """Activations [T, K] in this linear's encoding -> f32 [T, N]."""
        ...


class Float32Linear:
    """Weight f32 [N, K]: unquantized, or dequantized from FP8 tiles."""

    encoding: Encoding = "f32"

    def __init__(self, weight: Tensor, rows: RowRule) -> None:
        self._weight, self._rows = weight, rows

    @property
    def num_bytes(self) -> int:
        return self._weight.nbytes

    def matmul(self, x: Encoded) -> Tensor:
        product = torch.nn.functional.linear(self._rows.pad(x.data), self._weight)
        return product[: x.data.shape[0]]


class Int8Linear:
    """Codes int8 [N, K] and scale f32 [N]; BF16 activations (W8A16)."""

    encoding: Encoding = "bf16"

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self._codes, self._scale = codes, scale
        # The operator's own scale is BF16. Ours is FP32 and multiplies the operator's result.
        self._ones = torch.ones(codes.shape[0], dtype=torch.bfloat16)

    @property
    def num_bytes(self) -> int:
        return self._codes.nbytes + self._scale.nbytes

    def matmul(self, x: Encoded) -> Tensor:
        sums = torch._weight_int8pack_mm(x.data, self._codes, self._ones)
        return torch.mul(sums, self._scale)


class Int8AsymLinear(Int8Linear):
    """`Int8Linear` with a zero point int8 [N]: weight = (code - zero point) * scale (W8A16)."""

    def __init__(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        super().__init__(codes, scale)
        self._zero_point = zero_point

    @property
    def num_bytes(self) -> int:
        return super().num_bytes + self._zero_point.nbytes

    def matmul(self, x: Encoded) -> Tensor:
        sums = torch._weight_int8pack_mm(x.data, self._codes, self._ones)
        total = x.data.float().sum(dim=-1, keepdim=True)
        return (sums - total * self._zero_point).mul_(self._scale)


class Int8DynamicLinear(Int8Linear):
    """`Int8Linear` with INT8 activations (W8A8), their codes held in BF16: CPUs without VNNI."""

    encoding: Encoding = "int8-in-bf16"

    def matmul(self, x: Encoded) -> Tensor:
        assert x.scale is not None
        return super().matmul(x).mul_(x.scale)


class Int8VnniLinear:
    """The weight of `Int8Linear` with INT8 activations (W8A8), exact sums: CPUs with VNNI."""

    encoding: Encoding = "int8"

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self._codes, self._scale = codes, scale

    @property
    def num_bytes(self) -> int:
        return self._codes.nbytes + self._scale.nbytes

    def matmul(self, x: Encoded) -> Tensor:
        assert x.scale is not None
        sums = torch._int_mm(x.data, self._codes.T)
        return torch.mul(sums, self._scale).mul_(x.scale)


class Int8BlockLinear:
    """Codes int8 [K/128, N, 128] and scale f32 [K/128, N], each tile's once per output; INT8
    activations with a scale per token and 128 channels. Exact sums within a tile."""

    encoding: Encoding = "int8-tiles"

    def __init__(self, codes: Tensor, scale: Tensor, *, has_vnni: bool) -> None:
        self._codes, self._scale, self._has_vnni = codes, scale, has_vnni

    @property
    def num_bytes(self) -> int:
        return self._codes.nbytes + self._scale.nbytes

    def matmul(self, x: Encoded) -> Tensor:
        assert x.scale is not None
        total = x.scale.new_zeros(x.data.shape[0], self._codes.shape[1])
        data = x.data if self._has_vnni else x.data.float()
        for tile, (codes, scale) in enumerate(zip(self._codes, self._scale, strict=True)):
            inputs = data[:, tile * TILE : (tile + 1) * TILE]
            sums = (
                torch._int_mm(inputs.contiguous(), codes.T).float()
                if self._has_vnni
                else torch.nn.functional.linear(inputs, codes.float())
            )
            total += sums.mul_(x.scale[:, tile : tile + 1]).mul_(scale)
        return total


class Int4Linear:
    """Packed uint8 [N, K/2] in this CPU's tile order and scale with zero, BF16 [K/g, N, 2]."""

    encoding: Encoding = "bf16"

    def __init__(self, packed: Tensor, scale_zero: Tensor, group_size: int) -> None:
        self._packed, self._scale_zero, self._group_size = packed, scale_zero, group_size

    @property
    def num_bytes(self) -> int:
        return self._packed.nbytes + self._scale_zero.nbytes

    def matmul(self, x: Encoded) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.data, self._packed, self._group_size, self._scale_zero
        ).float()


class Int4DynamicLinear:
    """Codes + 8, uint8 [K/g, N, g/2], column 2 i of a group in the low bits, scale BF16 [K/g, N],
    and perhaps zero point int8 [K/g, N]; INT8 activations with a scale per token (W4A8).

    y = token_scale * (((0 + dot_0 scale_0) + dot_1 scale_1) + ...) in FP32, where dot_g is the
    exact integer sum of group g, at most 127 * 15 * 128 < 2^18.
    """

    encoding: Encoding = "int8"

    def __init__(
        self, codes: Tensor, scale: Tensor, zero_point: Tensor | None, *, has_vnni: bool
    ) -> None:
        self._codes, self._scale, self._zero_point = codes, scale, zero_point
        self._has_vnni = has_vnni

    @property
    def num_bytes(self) -> int:
        zero_bytes = 0 if self._zero_point is None else self._zero_point.nbytes
        return self._codes.nbytes + self._scale.nbytes + zero_bytes

    def matmul(self, x: Encoded) -> Tensor:
        assert x.scale is not None
        num_groups, num_outputs, half = self._codes.shape
        total = x.scale.new_zeros(x.data.shape[0], num_outputs)
        data = x.data if self._has_vnni else x.data.float()
        for group in range(num_groups):
            inputs = data[:, group * 2 * half : (group + 1) * 2 * half].contiguous()
            steps = self._steps(group)
            sums = (
                torch._int_mm(inputs, steps.T).float()
                if self._has_vnni
                else torch.nn.functional.linear(inputs, steps.float())
            )
            total += sums.mul_(self._scale[group].float())
        return total.mul_(x.scale)

    def _steps(self, group: int) -> Tensor:
        """Code - zero point of one group, int8 [N, g]."""
        pairs = self._codes[group]
        unsigned = torch.stack((pairs & 15, pairs >> 4), dim=-1).flatten(1)
        steps = unsigned.view(torch.int8) - 8
        return steps if self._zero_point is None else steps - self._zero_point[group, :, None]


class Int4StaticFp8Linear(Int4Linear):
    """`Int4Linear` with FP8 inputs (W4A8): e4m3 with one static scale, f32 [1], saturating."""

    encoding: Encoding = "f32"

    def __init__(
        self, packed: Tensor, scale_zero: Tensor, group_size: int, input_scale: Tensor
    ) -> None:
        super().__init__(packed, scale_zero, group_size)
        self._input_scale = input_scale

    @property
    def num_bytes(self) -> int:
        return super().num_bytes + self._input_scale.nbytes

    def matmul(self, x: Encoded) -> Tensor:
        codes = quantize_input_fp8(x.data, self._input_scale).bfloat16()
        return super().matmul(Encoded(codes)).mul_(self._input_scale)


def make_linear(scheme: Scheme, tensors: Mapping[str, Tensor], kernels: Kernels) -> Linear:
    """Choose the kernel of one packed linear and give it its tensors, by suffix as
    `packed_layout.packed_shapes` lists them. The kernel holds them; nothing is copied. In a
    target's arithmetic it is an emulation (emulated.py)."""
    if kernels.arithmetic != EMBEDDED:
        return make_target_linear(scheme, tensors, kernels)
    match scheme.weights:
        case "int4" | "int4-asym" if scheme.activations == "int8":
            weights = tensors["codes"], tensors["scale"], tensors.get("zero_point")
            return Int4DynamicLinear(*weights, has_vnni=kernels.has_vnni)
        case "int4" | "int4-asym":
            assert scheme.group_size is not None
            weight = tensors["packed"], tensors["scale_zero"], scheme.group_size
            if scheme.activations == "fp8":
                return Int4StaticFp8Linear(*weight, tensors["input_scale"])
            return Int4Linear(*weight)
        case "int8-asym":
            return Int8AsymLinear(tensors["codes"], tensors["scale"], tensors["zero_point"])
        case "int8" if scheme.activations == "none":
            return Int8Linear(tensors["codes"], tensors["scale"])
        case "int8" if kernels.has_vnni:
            return Int8VnniLinear(tensors["codes"], tensors["scale"])
        case "int8":
            return Int8DynamicLinear(tensors["codes"], tensors["scale"])
        case "int8-block":
            codes, scale = tensors["codes"], tensors["scale"]
            return Int8BlockLinear(codes, scale, has_vnni=kernels.has_vnni)
        case "bf16" | "fp8-block":
            return Float32Linear(tensors["weight"], kernels.rows)
        case "source":
            raise AssertionError("Recipe.resolve makes `source` concrete first")


class Projection:
    """Linears that share their input, outputs side by side: one kernel where they were fused,
    several where their schemes differ. `encodings` are those that `forward` needs."""

    def __init__(self, linears: Sequence[Linear]) -> None:
        assert linears
        self._linears = tuple(linears)
        self.encodings = frozenset(linear.encoding for linear in linears)

    def forward(self, x: Mapping[Encoding, Encoded]) -> Tensor:
        """[T, K] in all of `encodings` -> f32 [T, N], N the sum over the linears."""
        outputs = [linear.matmul(x[linear.encoding]) for linear in self._linears]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


@functools.cache
def find_row_multiple(num_threads: int) -> int | None:
    """Find the smallest number of rows for whose multiples an FP32 GEMM treats every row alike.

    It depends on the BLAS library, the CPU and the number of threads, so it is probed, which takes
    a few milliseconds. None when no candidate has the property.
    """
    assert num_threads == torch.get_num_threads()
    generator = torch.Generator().manual_seed(0)
    for multiple in (1, 4, 8, 16):
        if all(
            _rows_agree(multiple, outputs, inputs, generator)
            for outputs, inputs in ((16, 256), (160, 256), (256, 128), (768, 512))
        ):
            return multiple
    return None


def _rows_agree(
    multiple: int, num_outputs: int, num_inputs: int, generator: torch.Generator
) -> bool:
    """Whether a row's bits are the same in GEMMs and batched GEMMs of any multiple of rows."""
    x = torch.randn(13 * 16, num_inputs, generator=generator)
    weight = torch.randn(num_outputs, num_inputs, generator=generator)
    whole = torch.nn.functional.linear(x, weight)
    for count in (multiple * factor for factor in (1, 2, 3, 5, 13)):
        for first in range(0, x.shape[0] - count + 1, max(count, 64)):
            some_rows = x[first : first + count].clone()
            alone = torch.nn.functional.linear(some_rows, weight)
            stacked = torch.bmm(some_rows.expand(2, -1, -1), weight.T.expand(2, -1, -1))[1]
            expected = whole[first : first + count]
            if not (torch.equal(alone, expected) and torch.equal(stacked, expected)):
                return False
    return True
