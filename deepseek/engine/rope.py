"""Rotary positions with YaRN, as transformers' DeepseekV3 computes them.

DeepSeek stores the rotary values in interleaved pairs (x0, x1), (x2, x3), ...; `rotate` returns
them de-interleaved (all first members, then all second ones). Queries and keys are permuted alike,
so their products do not change, and the cache holds the de-interleaved form.

YaRN (arXiv 2309.00071) applies at every position whenever the config has it; `deepseek.config` says
why. Angles are computed per step and not kept in a table: a step has few tokens, and a table of
163,840 positions would be memory that the planner does not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from deepseek.config import ModelConfig
from deepseek.config_values import YarnScaling


class Rope:
    """Angles for token positions. `softmax_scale` is the factor on query-key products."""

    def __init__(self, config: ModelConfig) -> None:
        self._inv_freq = inverse_frequencies(config)
        self._amplitude = amplitude(config.yarn)
        self.softmax_scale = softmax_scale(config)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """int64 [T] -> cosines and sines, each f32 [T, rope/2]."""
        angle = positions[:, None].float() * self._inv_freq
        return angle.cos() * self._amplitude, angle.sin() * self._amplitude


def rotate(
    x: Tensor, cos: Tensor, sin: Tensor, round_product: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Rotate interleaved pairs: f32 [..., rope], with cos and sin broadcastable to [..., rope/2].

    Returns [..., rope], de-interleaved. `round_product` rounds each of the four products.
    """
    first, second = x[..., 0::2], x[..., 1::2]
    products = first * cos, second * sin, second * cos, first * sin
    if round_product is not None:
        products = tuple(map(round_product, products))  # type: ignore[assignment]
    return torch.cat((products[0] - products[1], products[2] + products[3]), dim=-1)


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """f32 [rope/2]: radians per position, interpolated as YaRN's "NTK by parts" says."""
    width = config.qk_rope_head_dim
    power = config.rope_theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    extrapolated = 1.0 / power
    yarn = config.yarn
    if yarn is None:
        return extrapolated
    low = math.floor(_dim_of(yarn.beta_fast, config, yarn))
    high = math.ceil(_dim_of(yarn.beta_slow, config, yarn))
    low, high = max(low, 0), min(high, width - 1)
    # transformers widens an empty ramp by the same amount, to avoid dividing by zero.
    ramp = (torch.arange(width // 2, dtype=torch.float32) - low) / (
        (high - low) if high != low else 0.001
    )
    extrapolated_share = 1.0 - ramp.clamp(0.0, 1.0)
    interpolated = 1.0 / (yarn.factor * power)
    return interpolated * (1.0 - extrapolated_share) + extrapolated * extrapolated_share


def softmax_scale(config: ModelConfig) -> float:
    """1 / sqrt(query head width), times YaRN's mscale squared."""
    scale = config.qk_head_dim**-0.5
    if config.yarn is not None and config.yarn.mscale_all_dim:
        scale *= _mscale(config.yarn.factor, config.yarn.mscale_all_dim) ** 2
    return scale


def amplitude(yarn: YarnScaling | None) -> float:
    """YaRN's factor on cosines and sines; 1 where the softmax scale holds all of it."""
    if yarn is None:
        return 1.0
    if yarn.mscale and yarn.mscale_all_dim:
        return _mscale(yarn.factor, yarn.mscale) / _mscale(yarn.factor, yarn.mscale_all_dim)
    return _mscale(yarn.factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _dim_of(rotations: float, config: ModelConfig, yarn: YarnScaling) -> float:
    """Dimension that makes `rotations` rotations within the original context."""
    context = yarn.original_max_position_embeddings
    return (config.qk_rope_head_dim * math.log(context / (rotations * 2 * math.pi))) / (
        2 * math.log(config.rope_theta)
    )
