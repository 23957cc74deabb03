"""SmoothQuant (arXiv 2211.10438): outliers move from activations into weights, for free.

A linear y = W x is left unchanged by dividing channel j of x by s_j and multiplying column j of W:

    s_j = amax(x_j)^a / amax(W_:j)^(1-a)          a = `smoothing` of the recipe, 0.5 by default

The division is folded into whatever makes x (`folding.py`).

Deviation from the paper: s is rounded to a power of two. Dividing BF16 norms and multiplying BF16
router weights is then exact, so the folded layer computes the same function to the bit and routing
cannot change; the price is an s within a factor sqrt(2) of the formula's, in a flat optimum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from quant_jobs.calibrate import InputStatistics, input_of
from quant_jobs.folding import MAX_EXPONENT, FoldingSet, Smoothing, Wanted
from quant_jobs.ledger import Ledger


def solve_smoothing(
    wanted: list[tuple[FoldingSet, Wanted]],
    weight_of: Callable[[str], Tensor],
    statistics: Mapping[str, InputStatistics],
    layer: int,
    ledger: Ledger,
) -> Smoothing:
    """The vectors of one layer's SmoothQuant sets. `weight_of` gives the float32 weight [N, K] of a
    module; an input that no token reached is absent from `statistics`, and its set stays as it is.
    """
    smoothing = Smoothing()
    for one, how in wanted:
        if how.strength is None:
            continue
        seen = statistics.get(input_of(one.measured))
        if seen is None:
            ledger.note("unseen_expert", layer, one.measured)
            continue
        peaks = [weight_of(name).abs().amax(dim=0) for name in one.consumers]
        amax_w = torch.stack(peaks).amax(dim=0)
        scale = smoothing_scale(seen.amax, amax_w, how.strength, one.measured, layer, ledger)
        smoothing.add(one, scale)
    return smoothing


def smoothing_scale(
    amax_x: Tensor, amax_w: Tensor, strength: float, module: str, layer: int, ledger: Ledger
) -> Tensor:
    """s float32 [K] from the channel maxima of inputs and weights; see the module's formula.

    A channel that carries nothing (in x or in W) has s = 1.
    """
    exponent = strength * amax_x.double().log2() - (1 - strength) * amax_w.double().log2()
    dead = (amax_x == 0) | (amax_w == 0)
    exponent = exponent.masked_fill(dead, 0.0).round()
    ledger.note("dead_channel", layer, module, int((amax_x == 0).sum()))
    clipped = exponent.abs() > MAX_EXPONENT
    ledger.note("clipped_smoothing", layer, module, int(clipped.sum()))
    exponent = exponent.clamp(-MAX_EXPONENT, MAX_EXPONENT)
    return torch.ldexp(torch.ones_like(amax_x), exponent.to(torch.int32))
