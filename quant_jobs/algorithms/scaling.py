"""How the smoothing scale of a folding group is chosen: SmoothQuant's formula or AWQ's search.

`choose_scale` serves groups within one worker (`workers/unit_solver.py`) and groups over several
(`job/layer_steps.py`): the caller collects the weight statistics of each linear and, for AWQ, its
losses. Both are added in the order of the linears, so the scale does not depend on the number of
workers. Folding the scale into weights is `folding.py`.

N outputs · K inputs · A candidates
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deepseek.recipe import Scheme
from quant_jobs.algorithms.awq import candidate_scales, note_clipped, weight_means
from quant_jobs.algorithms.folding import FoldingGroup, ScaleMethod, foldable
from quant_jobs.algorithms.ledger import Ledger
from quant_jobs.algorithms.smoothquant import column_amax, smoothing_scale

#: Statistics of one linear's weight: for SmoothQuant its channel maxima f32 [K] and 1, for AWQ the
#: sums f64 [K] of its relative magnitudes and the number of rows summed.
WeightStatistics = tuple[Tensor, int]


def weight_statistics(weight: Tensor, method: ScaleMethod, scheme: Scheme) -> WeightStatistics:
    """The statistics of a weight f32 [N, K] that the scale of its folding group depends on."""
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
    silent: Callable[[], Tensor],
    losses_of: Callable[[Tensor], Sequence[Tensor]],
    layer: int,
    ledger: Ledger,
) -> Tensor:
    """The smoothing scale f32 [K] of a folding group.

    `statistics` are those of the group's linears, in their order; `amax` and `mean_abs` f32 [K] are
    the largest and mean magnitudes of the channels of their common input. `divided` is the norm
    that absorbs 1/s, None if a quantized weight does. `silent()` returns the channels, bool
    [K], that are zero on any data; it is called where calibration left any at zero. `losses_of`
    maps AWQ's candidates f32 [A, K] to the losses f64 [A] of each linear that received a token, in
    the order of the linears. Clipped scales are counted in `ledger`, and dead channels: zero on the
    calibration data only, with weights that are not zero.
    """
    if method.strength is not None:
        amax_w = torch.stack([weight_amax for weight_amax, _ in statistics]).amax(dim=0)
        dead = (amax == 0) & (amax_w != 0)
        ledger.note("dead_channel", layer, group.measured, _count_dead(dead, silent))
        return smoothing_scale(amax, amax_w, method.strength, group.measured, layer, ledger)
    total = torch.stack([sums for sums, _ in statistics]).sum(dim=0)
    mean_w = (total / sum(count for _, count in statistics)).float()
    candidates = candidate_scales(mean_abs, mean_w)
    candidates = foldable(candidates, divided, group.router is not None)
    losses = torch.stack(list(losses_of(candidates))).sum(dim=0)
    scale = candidates[int(losses.argmin())]
    dead = (mean_abs == 0) & (mean_w != 0)
    ledger.note("dead_channel", layer, group.measured, _count_dead(dead, silent))
    note_clipped(scale, group.measured, layer, ledger)
    return scale


def _count_dead(zero_here: Tensor, silent: Callable[[], Tensor]) -> int:
    """How many channels, bool [K], are zero on the calibration data though other data may differ;
    those are not smoothed."""
    return int((zero_here & ~silent()).sum()) if bool(zero_here.any()) else 0
