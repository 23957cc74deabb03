"""INT8: weights with one scale, and perhaps one zero point, per output channel; activations with
one scale per token."""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

from deepseek.formats.scales import (
    SMALLEST_SCALE,
    assert_shapes,
    choose_range,
    choose_scale,
    round_to_int8,
    row_chunks,
    rows_of,
)

INT8_MIN, INT8_MAX = -128, 127


def quantize_int8(
    w: Tensor, *, amax: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Float [N, K] -> (int8 [N, K], float32 scale [N, 1] = amax / 127).

    `amax` or `scale`, each [N, 1], replaces the data's own maximum; larger values then clip.

    Raises:
        CheckpointError: a value, amax or scale cannot be represented.
    """
    assert_shapes((w.shape[0], 1), amax, scale)
    codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    scales = torch.empty((w.shape[0], 1), dtype=torch.float32, device=w.device)
    for rows in row_chunks(w):
        weight = w[rows].float()
        scales[rows] = choose_scale(
            weight.abs().amax(dim=1, keepdim=True),
            INT8_MAX,
            scales.dtype,
            rows_of(amax, rows),
            rows_of(scale, rows),
        )
        codes[rows] = round_to_int8(weight / scales[rows], INT8_MIN, INT8_MAX)
    return codes, scales


def quantize_int8_asym(
    w: Tensor, *, scale: Tensor | None = None, zero_point: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Float [N, K] -> (int8 [N, K], float32 scale [N, 1], int8 zero point [N, 1]).

    scale = (max - min) / 255 with 0 always inside [min, max], so 0 is stored exactly. `scale` and
    `zero_point`, both [N, 1] and given together, replace what the data would give. The error is at
    most half a step, up to float32's own rounding of the scale.

    Raises:
        CheckpointError: a value, scale or zero point cannot be represented.
    """
    assert_shapes((w.shape[0], 1), scale, zero_point)
    codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    scales = torch.empty((w.shape[0], 1), dtype=torch.float32, device=w.device)
    zeros = torch.empty((w.shape[0], 1), dtype=torch.int8, device=w.device)
    for rows in row_chunks(w):
        weight = w[rows].float()
        scales[rows], zeros[rows] = choose_range(
            weight.unsqueeze(1),
            (INT8_MIN, INT8_MAX),
            scales.dtype,
            rows_of(scale, rows),
            rows_of(zero_point, rows),
        )
        steps = weight / scales[rows]
        steps += zeros[rows]  # before rounding, as compressed-tensors does
        codes[rows] = round_to_int8(steps, INT8_MIN, INT8_MAX)
    return codes, scales, zeros


def dequantize_int8(q: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """int8 [..., K], float32 scale and int8 zero point [..., 1] -> float32 [..., K].

    For weights and tokens; exact up to the one rounding of the product.
    """
    steps = q.float()
    if zero_point is not None:
        steps -= zero_point
    return steps.mul_(scale)


def pack_int8(q: Tensor) -> Tensor:
    """Codes int8 [N, K] -> int32 [N, ceil(K/4)]: value + 128, column 0 in the lowest bits.

    compressed-tensors stores 8-bit weight-only linears so (`pack-quantized`); bytes beyond K are 0.
    """
    assert q.dtype == torch.int8, q.dtype
    assert sys.byteorder == "little", "packing views bytes as int32"
    num_words = math.ceil(q.shape[1] / 4)
    packed = torch.zeros((q.shape[0], num_words * 4), dtype=torch.uint8, device=q.device)
    for rows in row_chunks(q):
        # Adding 128 modulo 256 flips the sign bit.
        packed[rows, : q.shape[1]] = q[rows].view(torch.uint8) ^ 0x80
    return packed.view(torch.int32)


def unpack_int8(packed: Tensor, num_columns: int) -> Tensor:
    """int32 [N, ceil(K/4)] -> int8 codes [N, K]; `num_columns` is K."""
    assert packed.dtype == torch.int32, packed.dtype
    assert packed.shape[1] == math.ceil(num_columns / 4), (tuple(packed.shape), num_columns)
    shifted = packed.contiguous().view(torch.uint8)[:, :num_columns]
    return (shifted ^ 0x80).view(torch.int8)


def quantize_tokens_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations [..., K] -> (int8 [..., K], float32 scale [..., 1] = amax / 127), per token.

    The engine's hot path, so it checks nothing: a token with NaN or infinity gets a scale of NaN or
    infinity, and its products are then NaN or infinite instead of quietly wrong. A token's codes
    and scale depend on that token alone, so batching cannot change an answer. A token of zeros has
    scale 2^-126 instead of the weights' 1, which saves an operation.
    """
    x = x.float()
    scale = x.abs().amax(dim=-1, keepdim=True).div_(INT8_MAX).clamp_min_(SMALLEST_SCALE)
    # No clamp: amax / fl(amax / 127) is 127 within a few parts in 2^24, and rounds to 127.
    return (x / scale).round_().to(torch.int8), scale
