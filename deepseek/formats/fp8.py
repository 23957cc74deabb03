"""FP8 (e4m3): one scale per tile of 128x128 weights, as in DeepSeek's release, or one per tensor.

The release and the format's name (`fp8-block`) call a tile a block.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from deepseek.formats.scales import assert_shapes, choose_scale, row_chunks, rows_of
from deepseek.formats.tiles import TILE, as_tiles, dequantize_tiles, from_tiles, num_tiles

FP8_MAX = 448.0
#: Rows and columns of an FP8 tile. Tiles at the edges of a weight may be smaller.
FP8_BLOCK = TILE


def quantize_fp8_block(
    w: Tensor, *, amax: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Float [N, K] -> (e4m3 [N, K], float32 scale [ceil(N/128), ceil(K/128)] = amax / 448).

    DeepSeek's release calls the scale `weight_scale_inv`; it is a multiplier. That tensor, passed
    as `scale` with the release's dequantized weight, gives the release's codes back.
    `amax` or `scale`, shaped like the result's scale, replaces the data's own maximum; larger
    values then clip.

    Raises:
        CheckpointError: a value, amax or scale cannot be represented.
    """
    assert_shapes(num_tiles(w.shape), amax, scale)
    codes = torch.empty(w.shape, dtype=torch.float8_e4m3fn, device=w.device)
    scales = torch.empty(num_tiles(w.shape), dtype=torch.float32, device=w.device)
    for rows in row_chunks(w, multiple=FP8_BLOCK):
        tiles = as_tiles(w[rows].float())
        tile_rows = slice(rows.start // FP8_BLOCK, math.ceil(rows.stop / FP8_BLOCK))
        scales[tile_rows] = choose_scale(
            tiles.abs().amax(dim=(1, 3)),
            FP8_MAX,
            scales.dtype,
            rows_of(amax, tile_rows),
            rows_of(scale, tile_rows),
        )
        tiles = _to_e4m3(tiles / scales[tile_rows][:, None, :, None])
        codes[rows] = from_tiles(tiles, (rows.stop - rows.start, w.shape[1]))
    return codes, scales


def dequantize_fp8_block(q: Tensor, scale: Tensor) -> Tensor:
    """e4m3 [N, K] and scale [ceil(N/128), ceil(K/128)] -> float32 [N, K].

    This is also the exact reader of the release's `weight` and `weight_scale_inv`.
    """
    assert_shapes(num_tiles(q.shape), scale)
    return dequantize_tiles(q, scale)


def quantize_fp8_tensor(x: Tensor, *, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Float [...] -> (e4m3 [...], float32 scale [] = amax / 448). A given scale may clip values.

    Raises:
        CheckpointError: a value or the scale cannot be represented.
    """
    assert_shapes((), scale)
    x = x.float()
    scale = choose_scale(x.abs().amax(), FP8_MAX, torch.float32, None, scale)
    return _to_e4m3(x / scale), scale


def dequantize_fp8_tensor(q: Tensor, scale: Tensor) -> Tensor:
    """e4m3 [...] and scale [] -> float32 [...]."""
    return q.float().mul_(scale)


def quantize_input_fp8(x: Tensor, input_scale: Tensor) -> Tensor:
    """Activations [..., K] and a static scale float32 [1] -> e4m3 [..., K], saturating at +-448.

    The engine's hot path, so it checks nothing. NaN stays NaN; infinity saturates like every value
    beyond 448 * scale, as it does in the kernels of TensorRT-LLM.
    """
    return _to_e4m3(x.float() / input_scale)


def fake_quantize_fp8(x: Tensor, input_scale: Tensor) -> Tensor:
    """Round `x` as a linear with static FP8 inputs does: to e4m3 and back, float32 [..., K].

    `input_scale` is the float32 [1] of the artifact, amax / 448 of the calibrated input.
    """
    return dequantize_fp8_tensor(quantize_input_fp8(x, input_scale), input_scale)


def _to_e4m3(steps: Tensor) -> Tensor:
    # torch 2.13 saturates in this cast; older versions gave NaN.
    return steps.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
