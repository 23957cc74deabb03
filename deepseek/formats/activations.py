"""How the kernel of a linear rounds its input before the product, by scheme."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from deepseek.formats.fp8 import fake_quantize_fp8
from deepseek.formats.int8 import dequantize_int8, quantize_tokens_int8
from deepseek.formats.int8_block import dequantize_token_groups_int8, quantize_token_groups_int8
from deepseek.recipe import Scheme

#: Input of a linear, f32 [..., K] -> the values that its kernel multiplies, same shape.
RoundInput = Callable[[Tensor], Tensor]


def input_rounding(scheme: Scheme, input_scale: Tensor | None = None) -> RoundInput | None:
    """Return the rounding of a scheme: INT8 with one dynamic scale per token (per token and 128
    channels where the weights are in tiles), FP8 with the static `input_scale` f32 [1], or None
    where the kernel does not round its input. The arithmetic is that of the engine's kernels."""
    if scheme.weights == "int8-block":
        return lambda x: dequantize_token_groups_int8(*quantize_token_groups_int8(x))
    if scheme.activations == "int8":
        return lambda x: dequantize_int8(*quantize_tokens_int8(x))
    if scheme.activations == "fp8":
        assert input_scale is not None, "a static FP8 scale is measured, not made up"
        return lambda x: fake_quantize_fp8(x, input_scale)
    return None
