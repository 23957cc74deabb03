"""GPTQ (arXiv 2210.17323): rounds one input column at a time, and lets later columns compensate its
error.

With H = X X^T the Gram matrix of the inputs (damped), and U the upper Cholesky factor of H^-1
(H^-1 = U^T U), column j of W is rounded to q_j, and its error e = (w_j - q_j) / U_jj is taken out
of every later column: w_k -= e U_jk. Columns go in blocks of 128: inside a block at every column,
behind it in one product per block. The range of a group is chosen when the group is reached, from
the weights as updated by then; the range of a channel or a tile (INT8) once, before.

Many weights are solved at once, one batch entry each: the experts of a layer take as many kernel
launches as one of them does. Entries never touch each other.

Everything is done in place, because these matrices are the largest of a worker (18,432 inputs: 1.36
GB): the factor overwrites the Gram matrix and needs one more matrix of its size; the rounded values
overwrite the weights.

Deviations from the paper: an input that was never active (a zero on the diagonal) has its weights
rounded to nearest instead of set to zero, for an expert sees more tokens than calibration showed
it; `act_order` keeps the groups of the original order and chooses their ranges up front, so that no
target needs an index of groups.

n batch entries · N outputs · K inputs · g group size
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek.formats import TILE
from deepseek.formats.scales import largest
from deepseek.recipe import Scheme
from quant_jobs.algorithms.ranges import Range, choose_range, code_limits, group_ranges

#: Columns between two updates of all that follows.
BLOCK = 128

#: Where the Hessian is not positive definite, damping grows tenfold up to this, then is given up.
MAX_DAMPING = 1.0


@dataclass(frozen=True, slots=True)
class Factor:
    """The factor of one input: `upper` f32 [K, K] with H^-1 = U^T U of the damped H. With
    `act_order` its inputs are in the `order` int64 [K]. `damping` is the one that was used.
    `failed`: H could not be inverted, so U is the identity and rounding is to nearest."""

    upper: Tensor
    order: Tensor | None
    damping: float
    failed: bool


@dataclass(frozen=True, slots=True)
class Rounded:
    """One solved linear: `weight` f32 [N, K] is on the grid of `scale` f32 [N, K/g] or [N, 1], and
    `zero_point` int8 alike, None for symmetric formats. Every row has the scale of its tile, f32
    [N, ceil(K/128)]."""

    weight: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def split(self, num: int) -> list[Rounded]:
        """The `num` linears that were solved stacked along their outputs, apart again."""
        zero_points: Sequence[Tensor | None] = [None] * num
        if self.zero_point is not None:
            zero_points = [part.contiguous() for part in self.zero_point.chunk(num)]
        parts = zip(self.weight.chunk(num), self.scale.chunk(num), zero_points, strict=True)
        return [Rounded(w.contiguous(), s.contiguous(), z) for w, s, z in parts]


def inverse_factor(gram: Tensor, damping: float, *, act_order: bool = False) -> Factor:
    """Damp and invert a Gram matrix f32 [K, K], in place: its memory becomes the factor's.
    `damping` is a share of the mean diagonal.

    Serves every linear that reads the input, gate and up alike; and with coverage policy `all`,
    where all experts see the same tokens, a whole layer.
    """
    order = None
    if act_order:
        order = gram.diagonal().argsort(descending=True, stable=True)
        torch.index_select(gram[order], 1, order, out=gram)
    used = _invert(gram, damping)
    if used is None:
        gram.zero_().fill_diagonal_(1.0)
    return Factor(gram, order, damping if used is None else used, used is None)


def _invert(gram: Tensor, damping: float) -> float | None:
    """Overwrite a Gram matrix [K, K] with the upper Cholesky factor of its damped inverse. Returns
    the damping that was used; None if no damping makes it invertible: then it is unchanged."""
    if not bool(largest(gram).isfinite()):
        return None
    diagonal = gram.diagonal()
    dead = diagonal == 0
    mean = float(diagonal.double().mean())
    # Column by column, as LAPACK wants it: each step then works in this one piece of memory.
    work = torch.empty_like(gram).mT
    info = torch.empty((), dtype=torch.int32, device=gram.device)
    while damping <= MAX_DAMPING:
        work.copy_(gram)
        # A dead input stands alone: its row and column are zero but for the 1 on the diagonal.
        work.diagonal().add_(damping * mean).masked_fill_(dead, 1.0)
        torch.linalg.cholesky_ex(work, out=(work, info))
        if not int(info):
            torch.cholesky_inverse(work, out=work)
            torch.linalg.cholesky_ex(work, upper=True, out=(work, info))
            # Row by row again: torch would copy the other to find its extremes.
            if not int(info) and bool(largest(work.mT).isfinite()):
                gram.copy_(work)
                return damping
        damping *= 10
    return None


def gptq(
    weight: Tensor, factors: Sequence[Factor], scheme: Scheme, *, stacked: int = 1
) -> list[Rounded]:
    """Round weights f32 [n, N, K], contiguous, under the factors of their inputs (n of them, or one
    for all), in place: the results' weights are parts of `weight`. `stacked` linears make up each
    weight along its outputs; tiles begin anew in each.

    Raises:
        CheckpointError: a weight is NaN, infinite or beyond the format's range.
    """
    num, _, inputs = weight.shape
    if len(factors) == 1:
        factors = [factors[0]] * num
    upper = [factor.upper for factor in factors]
    orders = [factor.order for factor in factors if factor.order is not None]
    is_tiled = scheme.weights == "int8-block"
    size = TILE if is_tiled else scheme.group_size or inputs

    def all_ranges() -> Range:
        if is_tiled:
            return _tile_ranges_by_row(weight, scheme, stacked)
        return choose_range(weight.view(num, len(weight[0]), -1, size), scheme)

    if not orders:
        known = None if scheme.group_size else all_ranges()
        group = torch.arange(inputs, device=weight.device).expand(num, -1) // size
        ranges = _round_columns(weight, upper, group, known, size, scheme)
    else:
        order = torch.stack(orders)
        known = all_ranges()
        place = order[:, None].expand_as(weight)
        moved = weight.gather(2, place)
        ranges = _round_columns(moved, upper, order // size, known, size, scheme)
        weight.scatter_(2, place, moved)
    zero_points = ranges.zero_point
    return [
        Rounded(weight[i], ranges.scale[i], None if zero_points is None else zero_points[i])
        for i in range(num)
    ]


def _tile_ranges_by_row(weight: Tensor, scheme: Scheme, stacked: int) -> Range:
    """The ranges of the tiles of weights [n, N, K], given to each of their rows: [n, N, K/128]."""
    num, outputs, inputs = weight.shape
    rows = outputs // stacked
    by_linear = [
        group_ranges(linear, scheme).scale.repeat_interleave(TILE, dim=0)[:rows]
        for linear in weight.view(num * stacked, rows, inputs)
    ]
    return Range(torch.stack(by_linear).view(num, outputs, -1), None)


def _round_columns(
    weight: Tensor,
    upper: Sequence[Tensor],
    group: Tensor,
    known: Range | None,
    size: int,
    scheme: Scheme,
) -> Range:
    """The column loop: rounds `weight` [n, N, K] in place and returns the ranges.

    `group` int64 [n, K] is the group of each column. `known` ranges [n, N, K/g], or None: each is
    chosen when its first column is reached.
    """
    num, outputs, inputs = weight.shape
    lowest, highest = code_limits(scheme)
    chosen: list[Range] = []
    scale = zero_point = None
    for first in range(0, inputs, BLOCK):
        last = min(first + BLOCK, inputs)
        # Columns lie together here: [n, columns, N].
        block = weight[:, :, first:last].transpose(1, 2).contiguous()
        inverse = torch.stack([entry[first:last, first:last] for entry in upper])
        errors = torch.empty_like(block)
        for column in range(last - first):
            if known is None and (first + column) % size == 0:
                ahead = block[:, column : column + size].transpose(1, 2)
                chosen.append(choose_range(ahead, scheme))
                scale, zero_point = chosen[-1]
            elif known is not None:
                index = group[:, first + column, None, None].expand(num, outputs, 1)
                scale = known.scale.gather(2, index)[..., 0]
                if known.zero_point is not None:
                    zero_point = known.zero_point.gather(2, index)[..., 0]
            assert scale is not None
            steps = block[:, column] / scale
            if zero_point is None:
                restored = steps.round_().clamp_(lowest, highest).mul_(scale)
            else:
                steps = steps.add_(zero_point).round_().clamp_(lowest, highest)
                restored = steps.sub_(zero_point).mul_(scale)
            error = (block[:, column] - restored) / inverse[:, column, column, None]
            block[:, column] = restored
            errors[:, column] = error
            rest = block[:, column + 1 :]
            rest.sub_(inverse[:, column, column + 1 :, None] * error[:, None])
        weight[:, :, first:last] = block.transpose(1, 2)
        if last < inputs:
            # Entry by entry: a batched product may round differently with the size of the batch.
            for entry in range(num):
                weight[entry, :, last:].addmm_(
                    errors[entry].T, upper[entry][first:last, last:], alpha=-1
                )
    if known is not None:
        return known
    zero_points = [ranges.zero_point for ranges in chosen if ranges.zero_point is not None]
    scales = torch.stack([ranges.scale for ranges in chosen], dim=-1)
    return Range(scales, torch.stack(zero_points, dim=-1) if zero_points else None)
