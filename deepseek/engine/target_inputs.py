"""How a target's kernel rounds its input: pure tensor functions, one for each rule.

Each returns the values that the product reads, still f32, so that the product is an FP32 one. Every
token is rounded for itself, so a result does not depend on the batch.

T tokens · K channels
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from deepseek.formats import FP8_BLOCK, FP8_MAX, INT8_MAX, INT8_MIN, TILE
from deepseek.formats.scales import SMALLEST_SCALE


def keep_input(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Weight-only: the input is what the kernel before has rounded."""
    return x, None


def round_token_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """f32 [T, K] -> INT8 codes, f32 [T, K], and their scale amax / 127, f32 [T, 1].

    The codes are x * (127 / amax), as vLLM's `scaled_int8_quant` and SGLang's
    `per_token_quant_int8` compute them, not x / scale. A token of zeros has codes 0.
    """
    amax = x.abs().amax(dim=-1, keepdim=True)
    inverse = torch.where(amax == 0, 0.0, 127.0 / amax.clamp_min(SMALLEST_SCALE))
    return (x * inverse).round_().clamp_(-128, 127), amax / 127


def round_static_fp8(
    x: Tensor, input_scale: Tensor, rule: Literal["divide", "reciprocal", "bf16-reciprocal"]
) -> tuple[Tensor, Tensor]:
    """f32 [T, K] and a static scale f32 [1] -> values of e4m3, f32 [T, K], saturated at +-448, and
    that scale. `rule` is `Arithmetic.static_inputs`.

    The rounded reciprocal and the scale do not cancel: a gain error of up to 0.39 %.
    """
    match rule:
        case "divide":
            steps = x / input_scale
        case "reciprocal":
            steps = x * (1.0 / input_scale)
        case "bf16-reciprocal":
            steps = (x * (1.0 / input_scale).bfloat16().float()).bfloat16().float()
    return to_e4m3(steps).float(), input_scale


def round_tiles_fp8(x: Tensor, *, power_of_two: bool) -> Tensor:
    """f32 [..., K] -> the same, each 128 channels of a token rounded to e4m3 with one scale.

    The scale is amax / 448 in FP32, amax at least 1e-10 (`per_token_group_quant_fp8` of vLLM and
    SGLang); with `power_of_two` rounded up to a power of two. The last tile may be shorter.
    """
    extra = -x.shape[-1] % FP8_BLOCK
    padded = torch.nn.functional.pad(x, (0, extra)) if extra else x
    tiles = padded.reshape(*x.shape[:-1], -1, FP8_BLOCK)
    scale = tiles.abs().amax(dim=-1, keepdim=True).clamp_min(1e-10) * (1.0 / FP8_MAX)
    if power_of_two:
        scale = ceil_power_of_two(scale)
    rounded = to_e4m3(tiles / scale).float() * scale
    return rounded.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]


def ceil_power_of_two(scale: Tensor) -> Tensor:
    """The smallest powers of two that are not below these positive normal numbers, exactly; NaN and
    infinity stay what they are."""
    mantissa, exponent = torch.frexp(scale)  # mantissa in [0.5, 1)
    power = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).to(exponent.dtype))
    return torch.where(scale.isfinite(), power, scale)


def to_e4m3(steps: Tensor) -> Tensor:
    """Float -> e4m3, saturating at +-448; NaN stays NaN."""
    return steps.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def truncate_groups_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """f32 [T, K] -> INT8 codes per token and 128 channels, f32 [T, ceil(K/128), 128], zeros beyond
    K, and their scale amax / 127, f32 [T, ceil(K/128)].

    The codes are cut toward zero, not rounded: SGLang's `per_token_group_quant_int8` casts the
    quotient to an integer as it is. amax is at least 1e-10.
    """
    padded = torch.nn.functional.pad(x, (0, -x.shape[-1] % TILE))
    groups = padded.view(x.shape[0], -1, TILE)
    scale = groups.abs().amax(dim=-1, keepdim=True).clamp_min(1e-10) / INT8_MAX
    return (groups / scale).clamp_(INT8_MIN, INT8_MAX).trunc_(), scale.squeeze(-1)
