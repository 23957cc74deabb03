"""Tiles of 128 x 128 weights that share one scale, as `fp8-block` and `int8-block` have them.

Tiles begin at the first row and column of each weight; those at its end may be smaller ("ragged").
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Rows and columns of a tile, and the inputs of a token that share one scale.
TILE = 128


def num_tiles(shape: tuple[int, ...]) -> tuple[int, int]:
    """Number of tiles of an [N, K] weight in each direction, ragged ones included."""
    return math.ceil(shape[0] / TILE), math.ceil(shape[1] / TILE)


def as_tiles(w: Tensor) -> Tensor:
    """[n, k] -> [n/128, 128, k/128, 128], padded with zeros, which change no tile's amax."""
    w = torch.nn.functional.pad(w, (0, -w.shape[1] % TILE, 0, -w.shape[0] % TILE))
    return w.reshape(w.shape[0] // TILE, TILE, w.shape[1] // TILE, TILE)


def from_tiles(tiles: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of `as_tiles`: [n/128, 128, k/128, 128] -> [n, k] without the padding."""
    return tiles.flatten(2).flatten(0, 1)[: shape[0], : shape[1]]


def dequantize_tiles(q: Tensor, scale: Tensor) -> Tensor:
    """Codes [N, K] of any dtype and scale [ceil(N/128), ceil(K/128)] -> float32 [N, K]."""
    weight = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    for tile_row, first in enumerate(range(0, q.shape[0], TILE)):
        rows = slice(first, min(first + TILE, q.shape[0]))
        columns = scale[tile_row].float().repeat_interleave(TILE)[: q.shape[1]]
        torch.mul(q[rows].float(), columns, out=weight[rows])
    return weight
