"""The range of a group of weights: up to its maximum, a percentile, or the least rounding error.

A group is what shares one scale: `group_size` inputs of one output channel (INT4), the whole
channel (INT8), or a tile of 128 inputs of 128 channels (`int8-block`). What is chosen here is
passed to `deepseek.formats.compress`, which makes the codes.

    max         the largest weight: nothing clips; the formats' own choice, to the bit
    percentile  a percentile of the magnitudes; with zero points, of the low and the high values
    mse         of the ranges shrunk in steps of 2 % down to a half, that with the least squared
                rounding error

Scales are rounded to the dtype that stores them *before* anything is measured with them, so an
error found here is the one that the artifact has. No inputs are looked at: that is AWQ's clip
search (`awq.py`), which goes through the same `least_error` with another error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek.formats import TILE, num_tiles
from deepseek.formats.scales import check_magnitude, nonzero, round_to_int8
from deepseek.recipe import Scheme

#: The `mse` search's shares of the full range, largest first.
MSE_SHRINK = tuple((100 - 2 * step) / 100 for step in range(26))

#: Elements that are searched at once: small enough for memory and caches, large enough for a GPU.
_CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 23}


class Range(NamedTuple):
    """`scale` float32 [...], one per group, already what its stored dtype can hold; `zero_point`
    int8 [...] for the asymmetric formats: weight = (code - zero_point) * scale."""

    scale: Tensor
    zero_point: Tensor | None


def group_ranges(weight: Tensor, scheme: Scheme) -> Range:
    """`choose_range` for a weight float32 [N, K]: [N, K/g] for the grouped formats, [ceil(N/128),
    ceil(K/128)] for tiles, else [N, 1].

    Raises:
        CheckpointError: NaN, infinity or magnitudes above 2^126.
    """
    if scheme.weights == "int8-block":
        return _tile_ranges(weight, scheme)
    return choose_range(grouped(weight, scheme), scheme)


def _tile_ranges(weight: Tensor, scheme: Scheme) -> Range:
    """One row of tiles at a time. Ragged tiles have ranges of their own weights only: padding would
    move a percentile."""
    scale = weight.new_empty(num_tiles(weight.shape), dtype=torch.float32)
    whole = weight.shape[1] // TILE * TILE
    for tile_row in range(len(scale)):
        strip = weight[tile_row * TILE : (tile_row + 1) * TILE]
        if whole:
            tiles = strip[:, :whole].reshape(len(strip), -1, TILE).transpose(0, 1).flatten(1)
            scale[tile_row, : whole // TILE] = choose_range(tiles, scheme).scale
        if whole < weight.shape[1]:
            scale[tile_row, -1:] = choose_range(strip[:, whole:].reshape(1, -1), scheme).scale
    return Range(scale, None)


def choose_range(weight: Tensor, scheme: Scheme) -> Range:
    """The range of each group by `scheme.clip`: float32 [..., k], a group per row -> [...].

    A group of zeros has scale 1; 0 is always represented exactly.

    Raises:
        CheckpointError: NaN, infinity or magnitudes above 2^126.
    """
    flat = by_chunks(weight.reshape(-1, weight.shape[-1]), lambda part: _choose(part, scheme))
    shape = weight.shape[:-1]
    zero_point = None if flat.zero_point is None else flat.zero_point.view(shape)
    return Range(flat.scale.view(shape), zero_point)


def grouped(weight: Tensor, scheme: Scheme) -> Tensor:
    """[N, K] -> [N, K/g, g], a view; g is K for a format with one scale per channel."""
    return weight.reshape(len(weight), -1, scheme.group_size or weight.shape[1])


def bounds(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest value of each group [..., k] -> both [...].

    Raises:
        CheckpointError: NaN, infinity or magnitudes above 2^126.
    """
    low, high = weight.amin(dim=-1), weight.amax(dim=-1)
    check_magnitude(torch.maximum(-low, high))
    return low, high


def range_between(low: Tensor, high: Tensor, scheme: Scheme) -> Range:
    """The range, as it will be stored, of groups whose values lie in [low, high], both [...].

    Symmetric: scale = max(-low, high) / 7 or 127. Asymmetric: scale = (high - low) / 15 or 255 with
    0 made part of [low, high].
    """
    lowest, highest = code_limits(scheme)
    dtype = torch.bfloat16 if scheme.bits == 4 else torch.float32
    if scheme.is_symmetric:
        peak = torch.maximum(-low, high)
        return Range(nonzero(peak / highest, peak).to(dtype).float(), None)
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    width = high - low
    scale = nonzero(width / (highest - lowest), width).to(dtype).float()
    return Range(scale, round_to_int8(lowest - low / scale, lowest, highest))


def code_limits(scheme: Scheme) -> tuple[int, int]:
    """The least and the largest code: (-8, 7) or (-128, 127)."""
    return -(1 << (scheme.bits - 1)), (1 << (scheme.bits - 1)) - 1


def nearest(weight: Tensor, chosen: Range, scheme: Scheme) -> Tensor:
    """Each weight of [..., k] as it will be read back under the ranges [...], float32."""
    lowest, highest = code_limits(scheme)
    scale = chosen.scale.unsqueeze(-1)
    steps = weight / scale
    if chosen.zero_point is None:
        return steps.round_().clamp_(lowest, highest).mul_(scale)
    zero_point = chosen.zero_point.unsqueeze(-1)
    steps += zero_point  # before rounding, as the formats do
    return steps.round_().clamp_(lowest, highest).sub_(zero_point).mul_(scale)


def least_error(
    low: Tensor,
    high: Tensor,
    scheme: Scheme,
    shrink: Sequence[float],
    error_of: Callable[[Range], Tensor],
) -> Range:
    """Of [low, high] times each of `shrink` (largest first), the range with the least error [...].

    Where several err alike the largest is kept.
    """
    best = range_between(low * shrink[0], high * shrink[0], scheme)
    least = error_of(best)
    for factor in shrink[1:]:
        tried = range_between(low * factor, high * factor, scheme)
        error = error_of(tried)
        better = error < least
        least = torch.where(better, error, least)
        scale = torch.where(better, tried.scale, best.scale)
        zero_point = None
        if tried.zero_point is not None and best.zero_point is not None:
            zero_point = torch.where(better, tried.zero_point, best.zero_point)
        best = Range(scale, zero_point)
    return best


def chunks(weight: Tensor) -> Iterator[Tensor]:
    """Slices along the first dimension, of about as many elements as are searched at once."""
    height = max(_CHUNK_ELEMENTS[weight.device.type] // weight[0].numel(), 1)
    for first in range(0, len(weight), height):
        yield weight[first : first + height]


def by_chunks(weight: Tensor, find: Callable[[Tensor], Range]) -> Range:
    """The ranges that `find` gives for each of `chunks`, joined along the first dimension."""
    ranges = [find(part) for part in chunks(weight)]
    zero_points = [part.zero_point for part in ranges if part.zero_point is not None]
    scale = torch.cat([part.scale for part in ranges])
    return Range(scale, torch.cat(zero_points) if zero_points else None)


def _choose(weight: Tensor, scheme: Scheme) -> Range:
    low, high = bounds(weight)
    match scheme.clip:
        case "max":
            return range_between(low, high, scheme)
        case "percentile":
            return range_between(*_percentiles(weight, low, high, scheme), scheme)
        case "mse":
            return least_error(
                low,
                high,
                scheme,
                MSE_SHRINK,
                lambda tried: (nearest(weight, tried, scheme) - weight).square_().sum(dim=-1),
            )


def _percentiles(
    weight: Tensor, low: Tensor, high: Tensor, scheme: Scheme
) -> tuple[Tensor, Tensor]:
    """Low and high end by `scheme.percentile`, between ranks by linear interpolation; the group's
    own ends where the percentile leaves it no range, as in a group with one weight that is not 0.
    """
    share = scheme.percentile / 100
    if scheme.is_symmetric:
        upper = _quantile(weight.abs().sort(dim=-1).values, share)
        lower = -upper
    else:
        ranked = weight.sort(dim=-1).values
        lower, upper = _quantile(ranked, 1 - share), _quantile(ranked, share)
    empty = (lower >= 0) & (upper <= 0)
    return torch.where(empty, low, lower), torch.where(empty, high, upper)


def _quantile(ranked: Tensor, share: float) -> Tensor:
    """torch.quantile of sorted values [..., k] -> [...], but with the rank not rounded to float32:
    in a channel of 16,384 that is 1/1000 of a rank."""
    rank = share * (ranked.shape[-1] - 1)
    below, above = ranked[..., math.floor(rank)], ranked[..., math.ceil(rank)]
    return below.lerp(above, rank - math.floor(rank))
