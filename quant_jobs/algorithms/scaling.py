"""How the smoothing scale of a folding group is chosen: SmoothQuant's formula or AWQ's search.

The choice is one function, whether the group's linears are all with one worker or spread over many:
each linear brings its statistics (`weight_statistics`) and, for AWQ, its losses; both are added up
in the order of the linears, so that no number of workers shows.

N outputs · K inputs · A candidates
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deepseek.recipe import Scheme
from quant_jobs.algorithms.awq import candidate_scales, note_fallbacks, weight_means
from quant_jobs.algorithms.folding import FoldingGroup, ScaleMethod, foldable
from quant_jobs.algorithms.ledger import Ledger
from quant_jobs.algorithms.smoothquant import column_amax, smoothing_scale

#: What one linear brings: for SmoothQuant the channel maxima f32 [K] of its weight (count 1), for
#: AWQ the sums f64 [K] of its relative magnitudes and how many rows they are of.
WeightStatistics = tuple[Tensor, int]


def weight_statistics(weight: Tensor, method: ScaleMethod, scheme: Scheme) -> WeightStatistics:
    """What a linear of weight f32 [N, K] brings to the scale of its group."""
    if method.strength is not None:
        return column_amax(weight), 1
    return weight_means(weight, scheme)


def choose_scale(
    group: FoldingGroup,
    method: ScaleMethod,
    statistics: Sequence[WeightStatistics],
    *,
    amax: Tensor,
    mean_abs: Tensor,
    divided: Tensor | None,
    losses_of: Callable[[Tensor], Sequence[Tensor]],
    layer: int,
    ledger: Ledger,
) -> Tensor:
    """The scale f32 [K] that a folding group shares.

    `statistics` are of the group's linears in their order; `amax` and `mean_abs` f32 [K] are the
    channels' largest and mean magnitudes in the input that they share. `divided` is the norm that
    takes 1/s, None where a quantized weight takes it. `losses_of` gives, for AWQ's candidates f32
    [A, K], the losses f64 [A] of each linear that has seen a token, in the order of the linears.
    Dead channels and clipped scales are counted in `ledger`.
    """
    if method.strength is not None:
        amax_w = torch.stack([weight_amax for weight_amax, _ in statistics]).amax(dim=0)
        return smoothing_scale(amax, amax_w, method.strength, group.measured, layer, ledger)
    total = torch.stack([sums for sums, _ in statistics]).sum(dim=0)
    mean_w = (total / sum(count for _, count in statistics)).float()
    candidates = candidate_scales(mean_abs, mean_w)
    candidates = foldable(candidates, divided, group.router is not None)
    losses = torch.stack(list(losses_of(candidates))).sum(dim=0)
    scale = candidates[int(losses.argmin())]
    note_fallbacks(scale, mean_abs, group.measured, layer, ledger)
    return scale
