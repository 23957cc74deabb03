"""SmoothQuant (arXiv 2211.10438): outliers move from activations into weights, for free.

A linear y = W x is left unchanged by dividing channel j of x by s_j and multiplying column j of W:

    s_j = amax(x_j)^a / amax(W_:j)^(1-a)          a = `smoothing` of the recipe, 0.5 by default

The division is folded into the tensor that makes x (`folding.py`).

Deviation from the paper: s is rounded to a power of two. Dividing BF16 norms and multiplying BF16
router weights is then exact, so the folded layer computes the same function to the bit and routing
cannot change; the price is an s within a factor sqrt(2) of the formula's, in a flat optimum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_jobs.algorithms.folding import MAX_EXPONENT
from quant_jobs.algorithms.ledger import Ledger


def column_amax(weight: Tensor) -> Tensor:
    """The largest magnitude in each column, f32 [K], of a weight f32 [N, K]; unlike abs(), it does
    not copy the weight."""
    return torch.maximum(-weight.amin(dim=0), weight.amax(dim=0))


def smoothing_scale(
    amax_x: Tensor, amax_w: Tensor, strength: float, module: str, layer: int, ledger: Ledger
) -> Tensor:
    """s float32 [K] from the channel maxima of inputs and weights; see the module's formula.

    A channel that carries nothing (in x or in W) has s = 1.
    """
    exponent = strength * amax_x.double().log2() - (1 - strength) * amax_w.double().log2()
    dead = (amax_x == 0) | (amax_w == 0)
    exponent = exponent.masked_fill(dead, 0.0).round()
    clipped = exponent.abs() > MAX_EXPONENT
    ledger.note("clipped_smoothing", layer, module, int(clipped.sum()))
    exponent = exponent.clamp(-MAX_EXPONENT, MAX_EXPONENT)
    return torch.ldexp(torch.ones_like(amax_x), exponent.to(torch.int32))
