"""INT4: one scale, and perhaps one zero point, per output channel and group of inputs.

Codes are int8 in computations. Stored, they have compressed-tensors' `pack-quantized` form: eight
per int32, value + 8, lowest bits first.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor

from deepseek.errors import RecipeError
from deepseek.formats.scales import (
    assert_shapes,
    choose_range,
    choose_scale,
    round_to_int8,
    row_chunks,
    rows_of,
)

INT4_MIN, INT4_MAX = -8, 7


def quantize_int4(
    w: Tensor,
    group_size: int,
    symmetric: bool = True,
    *,
    amax: Tensor | None = None,
    scale: Tensor | None = None,
    zero_point: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Float [N, K] -> (int8 codes in [-8, 7] [N, K], bfloat16 scale [N, K/g], zero point or None).

    Symmetric: scale = amax / 7, modelopt's convention (compressed-tensors' own is amax / 7.5; a
    reader treats both alike), no zero point. Asymmetric: scale = (max - min) / 15 with 0 always
    inside [min, max], and a zero point int8 [N, K/g] in [-8, 7], so 0 is stored exactly.

    `amax` (symmetric), `scale` (symmetric) or `scale` with `zero_point` (asymmetric), each
    [N, K/g], replace what the data would give; a scale is rounded to bfloat16 first.

    The error is at most half a step. An asymmetric group can exceed that by 6 % of a step, because
    its scale may have been rounded down by 1/256 and the range is 15 steps wide.

    Raises:
        RecipeError: `group_size` does not divide K.
        CheckpointError: a value, amax, scale or zero point cannot be represented.
    """
    groups = num_groups(w.shape[1], group_size)
    assert symmetric or amax is None, "an amax alone says nothing about an asymmetric range"
    assert not symmetric or zero_point is None, "a symmetric format has no zero point"
    assert symmetric or (scale is None) == (zero_point is None), "give both or neither"
    assert_shapes((w.shape[0], groups), amax, scale, zero_point)
    codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    scales = torch.empty((w.shape[0], groups), dtype=torch.bfloat16, device=w.device)
    zeros = None if symmetric else torch.empty(scales.shape, dtype=torch.int8, device=w.device)
    for rows in row_chunks(w):
        grouped = w[rows].float().reshape(-1, groups, group_size)
        given = rows_of(scale, rows)
        if zeros is None:
            peak = grouped.abs().amax(dim=-1)
            scales[rows] = choose_scale(peak, INT4_MAX, scales.dtype, rows_of(amax, rows), given)
        else:
            scales[rows], zeros[rows] = choose_range(
                grouped, (INT4_MIN, INT4_MAX), scales.dtype, given, rows_of(zero_point, rows)
            )
        steps = grouped / scales[rows].float().unsqueeze(-1)
        if zeros is not None:
            steps += zeros[rows].unsqueeze(-1)  # before rounding, as compressed-tensors does
        codes[rows] = round_to_int8(steps, INT4_MIN, INT4_MAX).flatten(1)
    return codes, scales, zeros


def dequantize_int4(q: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """Codes [N, K], scale [N, K/g], zero point [N, K/g] or None -> float32 [N, K].

    Exact: a 5-bit integer times a bfloat16 needs no rounding in float32.
    """
    assert q.shape[1] % scale.shape[1] == 0, (tuple(q.shape), tuple(scale.shape))
    grouped = q.float().reshape(*scale.shape, -1)
    if zero_point is not None:
        grouped -= zero_point.unsqueeze(-1)
    return grouped.mul_(scale.float().unsqueeze(-1)).flatten(1)


def pack_int4(q: Tensor) -> Tensor:
    """Codes [N, K] in [-8, 7] -> int32 [N, ceil(K/8)]: value + 8, column 0 in the lowest bits.

    Nibbles beyond K are 0. Codes outside [-8, 7] are the caller's bug and would corrupt neighbors.
    """
    assert q.dtype == torch.int8, q.dtype
    assert sys.byteorder == "little", "packing views bytes as int32"
    num_words = math.ceil(q.shape[1] / 8)
    packed = torch.empty((q.shape[0], num_words * 4), dtype=torch.uint8, device=q.device)
    for rows in row_chunks(q):
        nibbles = (q[rows] - INT4_MIN).view(torch.uint8)
        assert bool((nibbles < 16).all()), "a code outside [-8, 7]"
        nibbles = torch.nn.functional.pad(nibbles, (0, num_words * 8 - q.shape[1]))
        packed[rows] = nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)
    return packed.view(torch.int32)


def unpack_int4(packed: Tensor, num_columns: int) -> Tensor:
    """int32 [N, ceil(K/8)] -> int8 codes [N, K] in [-8, 7]; `num_columns` is K."""
    assert packed.dtype == torch.int32, packed.dtype
    assert packed.shape[1] == math.ceil(num_columns / 8), (tuple(packed.shape), num_columns)
    codes = torch.empty((packed.shape[0], num_columns), dtype=torch.int8, device=packed.device)
    for rows in row_chunks(codes):
        pairs = packed[rows].contiguous().view(torch.uint8)
        nibbles = torch.stack((pairs & 0xF, pairs >> 4), dim=-1).flatten(1)
        codes[rows] = nibbles[:, :num_columns].view(torch.int8) + INT4_MIN
    return codes


def num_groups(num_inputs: int, group_size: int) -> int:
    """Groups per output channel, K/g.

    Raises:
        RecipeError: `group_size` does not divide K.
    """
    if num_inputs % group_size:
        raise RecipeError(
            f"group_size {group_size} does not divide the {num_inputs} inputs; choose one that does"
        )
    return num_inputs // group_size
