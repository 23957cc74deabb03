"""The kernels: one class per weight format, chosen in one place (`make_linear`).

`make_linear` is the seam for a native extension: return another class with the same three members
(`encoding`, `num_bytes`, `matmul`) and nothing else in the engine changes.

What was measured decides (bench/linear_formats.py). Per format, on CPUs without AMX:

  f32       F.linear. BF16 products are 2 to 10 times slower than FP32 ones here, so bf16 and FP8
            block weights are held in FP32.
  int8      weight-only: `_weight_int8pack_mm` with BF16 activations, the one fast path of that
            operator (FP32 activations take a scalar loop, 100 times slower). Fastest of all at one
            token; slower than FP32 from about 64 tokens on. Its error is the rounding of
            activations and outputs to BF16, 2.3e-3 relative.
  int8-a8   per-token dynamic activations. With VNNI, `_int_mm` (exact). Without it `_int_mm` is a
            scalar loop (30 times slower than FP32), so the activation codes, integers up to 127,
            which BF16 holds exactly, go through `_weight_int8pack_mm`; the integer sum is rounded
            to BF16 once (1.7e-3, against the 2e-2 of the format itself).
  int8-asym as int8; the zero point is taken off the sums, z * (sum of the inputs), in FP32: 2.4e-3.
            The sums' rounding to BF16 weighs more, the farther z lies from the bulk of the codes:
            2.3e-2 where one weight of 40 sigma sets the range (the format's own error is 4.6e-2).
            The same speed within 5 %.
  int4      `_weight_int4pack_mm_for_cpu` with BF16 activations, scale and zero in BF16. Rounding
            the zero to BF16 costs less than 1e-4; the kernel's error is 2.4e-3, the format's 0.1.
  int4-afp8 the same on e4m3 codes of the input, which BF16 holds exactly, times the input's static
            scale: 1.7e-3, against the 2.6e-2 of rounding to e4m3. Quantized inside the product: the
            scale belongs to the linear, not to the token. 4 to 8 % slower than int4 ([4096, 7168],
            1 to 256 tokens), most of it torch's cast from e4m3 to BF16.

Batch invariance: one kernel per format whatever the number of rows. The low-bit kernels compute a
row alike in any batch. FP32 GEMMs do so only from a few rows on (one row goes another way), so
those are padded with zero rows to a multiple of what a probe at start finds (`RowRule`; 4 here).
Greedy tokens are then the same alone, batched, chunked or preempted, bit for bit.

T tokens · N outputs · K inputs · g group size
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from deepseek.formats import quantize_input_fp8, quantize_tokens_int8
from deepseek.recipe import Scheme

#: What a kernel takes: f32, BF16, INT8 codes with a scale per token, or those codes held in BF16.
Encoding = Literal["f32", "bf16", "int8", "int8-in-bf16"]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Activations [T, K] as a kernel takes them; `scale` is f32 [T, 1] for INT8 codes."""

    data: Tensor
    scale: Tensor | None = None

    def take(self, rows: Tensor) -> Encoded:
        """The rows at these indices, int64 [R]."""
        scale = None if self.scale is None else self.scale.index_select(0, rows)
        return Encoded(self.data.index_select(0, rows), scale)

    def cut(self, first: int, last: int) -> Encoded:
        """Rows [first, last), not copied."""
        scale = None if self.scale is None else self.scale[first:last]
        return Encoded(self.data[first:last], scale)


def encode(x: Tensor, encodings: Iterable[Encoding]) -> dict[Encoding, Encoded]:
    """f32 [T, K] in each of the encodings, made once for all linears that share the input."""
    found: dict[Encoding, Encoded] = {}
    for encoding in encodings:
        if encoding == "f32":
            found[encoding] = Encoded(x)
        elif encoding == "bf16":
            found[encoding] = Encoded(x.bfloat16())
        else:
            codes, scale = quantize_tokens_int8(x)
            found[encoding] = Encoded(codes if encoding == "int8" else codes.bfloat16(), scale)
    return found


@dataclass(frozen=True, slots=True)
class RowRule:
    """FP32 products run on multiples of `multiple` rows; 1 means as they come."""

    multiple: int

    def pad(self, x: Tensor, dim: int = 0) -> Tensor:
        """Append zero rows along `dim` up to the next multiple; the caller cuts them off again."""
        extra = -x.shape[dim] % self.multiple
        if not extra:
            return x
        widths = [0] * (2 * (x.ndim - dim))
        widths[-1] = extra
        return torch.nn.functional.pad(x, widths)


@dataclass(frozen=True, slots=True)
class Kernels:
    """What this machine's kernels are like. `is_batch_invariant` says what was found, or wanted."""

    rows: RowRule
    has_vnni: bool
    is_batch_invariant: bool

    @classmethod
    def detect(cls, *, batch_invariant: bool) -> Kernels:
        """Look at this CPU and, for batch invariance, at its GEMM with the current thread count."""
        multiple = find_row_multiple(torch.get_num_threads()) if batch_invariant else None
        return cls(
            RowRule(multiple or 1),
            has_vnni=torch.cpu._is_vnni_supported(),
            is_batch_invariant=multiple is not None,
        )


class Linear(Protocol):
    """y = x W^T for one weight [N, K]."""

    encoding: Encoding

    @property
    def num_bytes(self) -> int: ...

    def matmul(self, x: Encoded) -> Tensor:
        """Activations [T, K] in this linear's encoding -> f32 [T, N]."""
        ...


class Float32Linear:
    """Weight f32 [N, K]: unquantized, or dequantized from FP8 blocks."""

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
        # The operator's own scale is BF16; ours is FP32 and is applied to its result.
        self._ones = torch.ones(codes.shape[0], dtype=torch.bfloat16)

    @property
    def num_bytes(self) -> int:
        return self._codes.nbytes + self._scale.nbytes

    def matmul(self, x: Encoded) -> Tensor:
        sums = torch._weight_int8pack_mm(x.data, self._codes, self._ones)
        return torch.mul(sums, self._scale)


class Int8AsymLinear(Int8Linear):
    """The same with a zero point int8 [N]: weight = (code - zero point) * scale (W8A16)."""

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
    """The same weight with INT8 activations (W8A8), their codes held in BF16: CPUs without VNNI."""

    encoding: Encoding = "int8-in-bf16"

    def matmul(self, x: Encoded) -> Tensor:
        assert x.scale is not None
        return super().matmul(x).mul_(x.scale)


class Int8VnniLinear:
    """The same weight with INT8 activations in exact integer arithmetic: CPUs with VNNI."""

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


class Int4StaticFp8Linear(Int4Linear):
    """The same with FP8 inputs (W4A8): e4m3 with one static scale, f32 [1], saturating."""

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
    """The kernel for one packed linear (tensors as `packed_layout.packed_shapes` lists them)."""
    match scheme.weights:
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
        case "bf16" | "fp8-block":
            return Float32Linear(tensors["weight"], kernels.rows)
        case "source":
            raise AssertionError("Recipe.resolve makes `source` concrete first")


class Projection:
    """Linears that share their input, outputs side by side: one kernel where they were fused,
    several where their schemes differ."""

    def __init__(self, parts: Sequence[Linear]) -> None:
        assert parts
        self._parts = tuple(parts)
        self.encodings = frozenset(part.encoding for part in parts)

    def forward(self, x: Mapping[Encoding, Encoded]) -> Tensor:
        """[T, K] in all of `encodings` -> f32 [T, N], N the sum over the parts."""
        outputs = [part.matmul(x[part.encoding]) for part in self._parts]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


@functools.cache
def find_row_multiple(num_threads: int) -> int | None:
    """Smallest number of rows from whose multiples on an FP32 GEMM treats every row alike.

    Probed, since it depends on the BLAS library, the CPU and the number of threads; None when no
    candidate does. Takes a few milliseconds.
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
    """Whether a GEMM and a batched GEMM give the same bits for a row in products of any size."""
    x = torch.randn(13 * 16, num_inputs, generator=generator)
    weight = torch.randn(num_outputs, num_inputs, generator=generator)
    whole = torch.nn.functional.linear(x, weight)
    for count in (multiple * factor for factor in (1, 2, 3, 5, 13)):
        for first in range(0, x.shape[0] - count + 1, max(count, 64)):
            part = x[first : first + count].clone()
            alone = torch.nn.functional.linear(part, weight)
            stacked = torch.bmm(part.expand(2, -1, -1), weight.T.expand(2, -1, -1))[1]
            expected = whole[first : first + count]
            if not (torch.equal(alone, expected) and torch.equal(stacked, expected)):
                return False
    return True
