"""INT8 in tiles: weights with one scale per tile of 128x128, activations with one scale per token
and 128 channels.

This is the release's own layout with INT8 codes in place of FP8 ones, for GPUs without FP8 tensor
cores: the DeepSeek checkpoints of meituan (`DeepSeek-R1-Block-INT8`) have it, and SGLang serves it
as `blockwise_int8`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deepseek.formats.int8 import INT8_MAX, INT8_MIN
from deepseek.formats.scales import (
    SMALLEST_SCALE,
    assert_shapes,
    choose_scale,
    round_to_int8,
    row_chunks,
    rows_of,
)
from deepseek.formats.tiles import TILE, as_tiles, dequantize_tiles, from_tiles, num_tiles


def quantize_int8_block(
    w: Tensor, *, amax: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Float [N, K] -> (int8 [N, K], float32 scale [ceil(N/128), ceil(K/128)] = amax / 127).

    `amax` or `scale`, shaped like the result's scale, replaces the data's own maximum; larger
    values then clip.

    Raises:
        CheckpointError: a value, amax or scale cannot be represented.
    """
    assert_shapes(num_tiles(w.shape), amax, scale)
    codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    scales = torch.empty(num_tiles(w.shape), dtype=torch.float32, device=w.device)
    for rows in row_chunks(w, multiple=TILE):
        tiles = as_tiles(w[rows].float())
        tile_rows = slice(rows.start // TILE, math.ceil(rows.stop / TILE))
        scales[tile_rows] = choose_scale(
            tiles.abs().amax(dim=(1, 3)),
            INT8_MAX,
            scales.dtype,
            rows_of(amax, tile_rows),
            rows_of(scale, tile_rows),
        )
        tiles = round_to_int8(tiles / scales[tile_rows][:, None, :, None], INT8_MIN, INT8_MAX)
        codes[rows] = from_tiles(tiles, (rows.stop - rows.start, w.shape[1]))
    return codes, scales


def dequantize_int8_block(q: Tensor, scale: Tensor) -> Tensor:
    """int8 [N, K] and scale [ceil(N/128), ceil(K/128)] -> float32 [N, K].

    Exact up to the one rounding of the product.
    """
    assert_shapes(num_tiles(q.shape), scale)
    return dequantize_tiles(q, scale)


def quantize_token_groups_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations [..., K] -> (int8 [..., K], float32 scale [..., ceil(K/128)] = amax / 127), per
    token and 128 channels.

    The engine's hot path, so it checks nothing: a group with NaN or infinity gets a scale of NaN or
    infinity, and its products are then NaN or infinite instead of quietly wrong. A token's codes
    and scales depend on that token alone. A group of zeros has scale 2^-126.
    """
    x = x.float()
    num_inputs = x.shape[-1]
    if num_inputs % TILE:
        x = torch.nn.functional.pad(x, (0, -num_inputs % TILE))
    groups = x.reshape(*x.shape[:-1], x.shape[-1] // TILE, TILE)
    scale = groups.abs().amax(dim=-1, keepdim=True).div_(INT8_MAX).clamp_min_(SMALLEST_SCALE)
    # No clamp: amax / fl(amax / 127) is 127 within a few parts in 2^24, and rounds to 127.
    codes = (groups / scale).round_().to(torch.int8).flatten(-2)
    return codes[..., :num_inputs].contiguous(), scale.squeeze(-1)


def dequantize_token_groups_int8(q: Tensor, scale: Tensor) -> Tensor:
    """int8 [..., K] and scale [..., ceil(K/128)] -> float32 [..., K]."""
    return q.float().mul_(scale.repeat_interleave(TILE, dim=-1)[..., : q.shape[-1]])
