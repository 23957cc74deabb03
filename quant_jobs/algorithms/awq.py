"""AWQ (arXiv 2306.00978): the weights that large inputs meet are rounded more finely.

Scaling column j of W by s_j > 1 and channel j of x by 1/s_j leaves y = W x as it is, but the column
is rounded to a step 1/s_j as wide, as long as s_j does not widen its group's range. The search
tries, for the channels' mean magnitudes a_j of x and b_j of W (each W relative to its group's
largest), the scales

    s_j = a_j^r                   r = 0 .. 1; r = 0 is plain rounding
    s_j = a_j^r / b_j^(1-r)       not in the paper: the "duo scaling" of the tools that followed

each normalized so that the largest times the least is 1, and takes the ones with the least squared
error of the output, ||W x - Q(W s) (x / s)||^2, summed over all linears that share them. Then every
group's range is shrunk to where *its* part of the output errs least.

Functions of tensors only: which linears share a scale, and which tensor it divides, is in
`folding.py`; the inputs are `calibration.statistics.InputStatistics`. Sums over linears are float64
and added by the caller in the order of the modules, so that the number of workers changes nothing.

N outputs · K inputs · G groups of g inputs · R sampled tokens · A candidates
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepseek.recipe import Scheme
from quant_jobs.algorithms.folding import MAX_EXPONENT
from quant_jobs.algorithms.ledger import Ledger
from quant_jobs.algorithms.ranges import (
    Range,
    bounds,
    by_chunks,
    chunks,
    grouped,
    least_error,
    nearest,
    range_between,
)

#: Scales that the search tries for one folding group.
NUM_CANDIDATES = 20
#: The clip search's shares of the full range, largest first.
CLIP_SHRINK = tuple((40 - step) / 40 for step in range(21))


def weight_means(weight: Tensor, scheme: Scheme) -> tuple[Tensor, int]:
    """Sum f64 [K] over the rows of |W| / its group's largest, and the number of rows.

    `weight` f32 [N, K]. For b of several linears add both, then divide: b = sum / count.
    """
    total = weight.new_zeros(weight.shape[1], dtype=torch.float64)
    for part in chunks(weight):
        magnitude = grouped(part, scheme).abs()
        peak = magnitude.amax(dim=-1, keepdim=True)
        relative = magnitude / peak.masked_fill(peak == 0, 1.0)
        total += relative.flatten(1).sum(dim=0, dtype=torch.float64)
    return total, len(weight)


def candidate_scales(mean_abs_x: Tensor, mean_abs_w: Tensor, num: int = NUM_CANDIDATES) -> Tensor:
    """The scales to try, f32 [num, K], from a and b of the module's formula, f32 [K] each.

    Row 0 is all ones: plain rounding. Then a^r up to r = 1, then duo scaling from r = 0 to 1.
    Channels that carry nothing (in x or in W) have s = 1; |log2 s| is limited to MAX_EXPONENT, as
    SmoothQuant's. Vectors that cannot be folded as they are go through `folding.foldable` before
    they are compared, so that what wins is what will be used.
    """
    assert num >= 5, num
    alone, duo = num // 2, num - 1 - num // 2
    powers = [(0.0, 0.0)]  # of a and of 1/b
    powers += [(step / alone, 0.0) for step in range(1, alone + 1)]
    powers += [(step / (duo - 1), 1 - step / (duo - 1)) for step in range(duo)]
    dead = (mean_abs_x == 0) | (mean_abs_w == 0)
    log_x = mean_abs_x.double().log2().masked_fill(dead, 0.0)
    log_w = mean_abs_w.double().log2().masked_fill(dead, 0.0)
    rows = []
    for power_x, power_w in powers:
        exponent = power_x * log_x - power_w * log_w
        alive = exponent[~dead]
        if len(alive):
            exponent = exponent - (alive.amax() + alive.amin()) / 2
        rows.append(exponent.masked_fill(dead, 0.0))
    return torch.stack(rows).clamp_(-MAX_EXPONENT, MAX_EXPONENT).exp2_().float()


def scale_losses(
    weights: Sequence[Tensor], x: Tensor, candidates: Tensor, scheme: Scheme
) -> Tensor:
    """Squared output error of each candidate, f64 [A], summed over linears that share an input.

    `weights` f32 [N, K] each, `x` f32 [R, K], `candidates` f32 [A, K]. Groups keep their full range
    here. Losses of further linears are added by the caller, in the order of the modules; the first
    minimum wins.
    """
    total = torch.zeros(len(candidates), dtype=torch.float64, device=x.device)
    for weight in weights:
        loss = torch.zeros_like(total)
        for part in chunks(weight):
            for index, scale in enumerate(candidates):
                groups = grouped(part * scale, scheme)
                plain = range_between(*bounds(groups), scheme)
                restored = nearest(groups, plain, scheme).flatten(1).div_(scale)
                # One product, of the difference: the difference of two products would cancel.
                loss[index] += (x @ restored.sub_(part).T).double().square_().sum()
        total += loss
    return total


def search_clip(weight: Tensor, x: Tensor, scheme: Scheme) -> Range:
    """The ranges [N, G] under which each group's part of the output errs least.

    `weight` f32 [N, K] as it will be rounded and `x` f32 [R, K] as it will arrive, both already
    scaled. A group d = W' - W of a row errs by sum over tokens of (d . x)^2 = d (x^T x) d^T; the
    [g, g] matrix in the middle serves all rows, and is skipped where there are fewer tokens than
    inputs in a group. Where several ranges err alike (a group without input), the largest is kept.
    """
    x_GRg = grouped(x, scheme).transpose(0, 1)
    moments = x_GRg.mT @ x_GRg if x_GRg.shape[1] > x_GRg.shape[2] else None

    def search(part_NGg: Tensor) -> Range:
        part = part_NGg.transpose(0, 1).contiguous()

        def error_of(tried: Range) -> Tensor:
            error = nearest(part, tried, scheme).sub_(part)
            if moments is None:
                return (error @ x_GRg.mT).square_().sum(dim=-1)
            return (error @ moments).mul_(error).sum(dim=-1)

        best = least_error(*bounds(part), scheme, CLIP_SHRINK, error_of)
        return Range(best.scale.T, None if best.zero_point is None else best.zero_point.T)

    return by_chunks(grouped(weight, scheme), search)


def note_clipped(scale: Tensor, module: str, layer: int, ledger: Ledger) -> None:
    """Note the clipped values of a folding group's chosen scale, f32 [K]."""
    clipped = scale.log2().abs() >= MAX_EXPONENT
    ledger.note("clipped_smoothing", layer, module, int(clipped.sum()))
