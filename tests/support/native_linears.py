"""Linears of the native extension one by one, for tests and benches; deepseek/native/linear.h says
what they compute. What the extension takes on trust is asserted here.

T tokens · N outputs · K inputs · R rows
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from deepseek import _native
from deepseek.engine.native_layout import native_shapes, to_native
from deepseek.formats import (
    TILE,
    dequantize_int4,
    dequantize_int8,
    dequantize_int8_block,
    dequantize_token_groups_int8,
    fake_quantize_fp8,
    quantize_int4,
    quantize_int8,
    quantize_int8_asym,
    quantize_int8_block,
    quantize_token_groups_int8,
    quantize_tokens_int8,
)
from deepseek.recipe import Scheme

#: How the inputs of a linear are rounded: BF16, INT8 with a scale per token, INT8 with a scale per
#: token and 128 channels, e4m3 with the linear's static scale.
Encoding = Literal["bf16", "int8", "int8-tiles", "fp8"]


def encoding_of(scheme: Scheme) -> Encoding:
    """How the kernel of a scheme rounds its inputs."""
    if scheme.weights == "int8-block":
        return "int8-tiles"
    return {"none": "bf16", "int8": "int8", "fp8": "fp8"}[scheme.activations]


class NativeLinear:
    """The weight [N, K] of one native linear. It holds its tensors, which the extension reads in
    place."""

    def __init__(
        self, scheme: Scheme, tensors: Mapping[str, Tensor], num_outputs: int, num_inputs: int
    ) -> None:
        """`tensors` are those of `native_shapes`, by suffix."""
        shapes = native_shapes(scheme, num_outputs, num_inputs)
        assert tensors.keys() == shapes.keys(), (sorted(tensors), sorted(shapes))
        for suffix, (shape, dtype) in shapes.items():
            check_tensor(tensors[suffix], shape, dtype)
        self.scheme, self.encoding = scheme, encoding_of(scheme)
        self.num_outputs, self.num_inputs = num_outputs, num_inputs
        self.tensors = dict(tensors)
        self.input_scale = tensors["input_scale"].item() if "input_scale" in tensors else 1.0
        addresses = {suffix: tensor.data_ptr() for suffix, tensor in tensors.items()}
        self.handle = _native.Linear(
            format=scheme.label,
            outputs=num_outputs,
            inputs=num_inputs,
            group=scheme.group_size or 0,
            weight=next(
                addresses[name] for name in ("weight", "codes", "packed") if name in addresses
            ),
            scale=addresses.get("scale", 0),
            zero_point=addresses.get("zero_point", 0),
            input_scale=self.input_scale,
        )

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def with_tensors(
        self, replace: Callable[[Tensor], tuple[Tensor, Frame]]
    ) -> tuple[NativeLinear, list[Frame]]:
        """The same linear on other tensors, and what came with each of them."""
        replaced = {suffix: replace(tensor) for suffix, tensor in self.tensors.items()}
        tensors = {suffix: tensor for suffix, (tensor, _) in replaced.items()}
        linear = NativeLinear(self.scheme, tensors, self.num_outputs, self.num_inputs)
        return linear, [frame for _, frame in replaced.values()]


class Frame:
    """The bytes around a tensor, all 0xFF: NaN, as floats of any width."""

    WIDTH = 256

    def __init__(self, num_bytes: int) -> None:
        self.bytes = torch.full((num_bytes + 2 * self.WIDTH,), 0xFF, dtype=torch.uint8)

    def is_whole(self) -> bool:
        width = self.WIDTH
        return bool((self.bytes[:width] == 0xFF).all() and (self.bytes[-width:] == 0xFF).all())


def poisoned(tensor: Tensor) -> tuple[Tensor, Frame]:
    """A copy of a tensor that lies in a frame."""
    frame = Frame(tensor.nbytes)
    inside = frame.bytes[Frame.WIDTH : -Frame.WIDTH].view(tensor.dtype).view(tensor.shape)
    return inside.copy_(tensor), frame


def quantize_linear(scheme: Scheme, weight: Tensor) -> tuple[NativeLinear, Tensor]:
    """Quantize f32 [N, K] to nearest -> the native linear, and the values that it holds,
    f32 [N, K]. A static input scale is that of inputs up to 4."""
    plain: dict[str, Tensor]
    match scheme.weights:
        case "int4" | "int4-asym":
            assert scheme.group_size is not None
            codes, scale, zero = quantize_int4(weight, scheme.group_size, scheme.is_symmetric)
            plain, values = {"codes": codes, "scale": scale}, dequantize_int4(codes, scale, zero)
            if zero is not None:
                plain["zero_point"] = zero
            if scheme.activations == "fp8":
                plain["input_scale"] = torch.tensor([4 / 448])
        case "int8":
            codes, scale = quantize_int8(weight)
            plain = {"codes": codes, "scale": scale.flatten()}
            values = dequantize_int8(codes, scale)
        case "int8-asym":
            codes, scale, zero = quantize_int8_asym(weight)
            plain = {"codes": codes, "scale": scale.flatten(), "zero_point": zero.flatten()}
            values = dequantize_int8(codes, scale, zero)
        case "int8-block":
            codes, scale = quantize_int8_block(weight)
            of_outputs = scale.repeat_interleave(TILE, dim=0)[: weight.shape[0]]
            plain, values = (
                {"codes": codes, "scale": of_outputs},
                dequantize_int8_block(codes, scale),
            )
        case _:
            plain, values = {"weight": weight}, weight.bfloat16().float()
    return NativeLinear(scheme, to_native(scheme, plain), *weight.shape), values


def rounded_input(linear: NativeLinear, x: Tensor) -> Tensor:
    """The values that the kernel multiplies, f32 [T, K], by the definition of the formats."""
    match linear.encoding:
        case "int8":
            return dequantize_int8(*quantize_tokens_int8(x))
        case "int8-tiles":
            return dequantize_token_groups_int8(*quantize_token_groups_int8(x))
        case "fp8":
            return fake_quantize_fp8(x, torch.tensor([linear.input_scale]))
        case _:
            return x.bfloat16().float()


def multiply(linear: NativeLinear, x: Tensor, *, threads: int = 1) -> Tensor:
    """f32 [T, K] -> f32 [T, N]."""
    out = torch.full((x.shape[0], linear.num_outputs), torch.nan)
    encoded = NativeInput(x, linear.encoding, input_scale=linear.input_scale, threads=threads)
    run_products([Product(linear, encoded, out)], threads=threads)
    return out


class NativeInput:
    """Inputs f32 [T, K], rounded once for all linears that read them."""

    def __init__(
        self, x: Tensor, encoding: Encoding, *, input_scale: float = 1.0, threads: int = 1
    ) -> None:
        assert x.ndim == 2, tuple(x.shape)
        check_tensor(x, tuple(x.shape), torch.float32)
        self.encoding, self.num_rows, self.num_inputs = encoding, *x.shape
        self.handle = _native.encode(encoding, x.data_ptr(), *x.shape, input_scale, threads)

    def codes(self) -> tuple[Tensor, Tensor]:
        """Copies of the codes, int8 or BF16 [T, K], and of the scales, f32 [T, 1] or [T, K/128]
        (empty for BF16 and FP8)."""
        padded, dtype = self.handle.padded, torch.bfloat16
        num_scales = 0
        if self.encoding in ("int8", "int8-tiles"):
            dtype = torch.int8
            num_scales = 1 if self.encoding == "int8" else padded // TILE
        codes = _copy(self.handle.data, self.num_rows * padded, dtype).view(-1, padded)
        scale = _copy(self.handle.scale, self.num_rows * num_scales, torch.float32)
        assert not codes[:, self.num_inputs :].any(), "padding that is not zero"
        return codes[:, : self.num_inputs].clone(), scale.view(self.num_rows, num_scales)


@dataclass(frozen=True, slots=True)
class Product:
    """One product of `run_products`: `out` f32 [R, N] = the rows of `x` times `linear`."""

    linear: NativeLinear
    x: NativeInput
    out: Tensor


def run_products(products: Sequence[Product], *, threads: int = 1) -> None:
    """Compute all products in one call; none may read what another writes."""
    _native.run_gemms([checked(product) for product in products], threads)


def checked(product: Product) -> _native.Gemm:
    """A product as the extension takes it, for a caller who runs it again and again and keeps its
    tensors."""
    linear, x = product.linear, product.x
    assert (x.encoding, x.num_inputs) == (linear.encoding, linear.num_inputs), "another input"
    check_tensor(product.out, (x.num_rows, linear.num_outputs), torch.float32)
    return _native.Gemm(
        weight=linear.handle, input=x.handle, rows=x.num_rows, out=product.out.data_ptr()
    )


def check_tensor(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Assert what native code takes on trust."""
    assert tuple(tensor.shape) == shape, (tuple(tensor.shape), shape)
    assert tensor.dtype == dtype, (tensor.dtype, dtype)
    assert tensor.device.type == "cpu", tensor.device
    assert tensor.is_contiguous(), "a native kernel reads contiguous tensors"


def _copy(address: int, count: int, dtype: torch.dtype) -> Tensor:
    """A copy of `count` values at an address of the extension's."""
    if not count:
        return torch.empty(0, dtype=dtype)
    data = ctypes.string_at(address, count * dtype.itemsize)
    return torch.frombuffer(bytearray(data), dtype=dtype)
