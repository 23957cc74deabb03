"""Compares a quantized model with its source by their logits over the full vocabulary.

Pure tensor functions: no engine, no files. `evaluate` calls `compare_logits` once per block, so
that one block of logits per model is in memory, and `estimate` at the end.

Standard errors are over *blocks*: tokens of one text share topics and mistakes, so an error over
tokens would be too small. The block is the unit of sampling.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

#: Rows per float64 copy of logits; four copies at once are 4 x 64 x 129280 x 8 bytes = 265 MB.
_ROWS = 64
_RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class TokenScores:
    """One value per predicted token, each [T-1]; nats. `same_top1` is bool."""

    source_nll: Tensor
    quantized_nll: Tensor
    kl: Tensor
    same_top1: Tensor


def compare_logits(source_TV: Tensor, quantized_TV: Tensor, ids_T: Tensor) -> TokenScores:
    """Score a block: logits float32 [T, V] of both models, token ids int64 [T]. The logits at t
    predict token t+1, so T-1 tokens are judged.

    KL(source || quantized) = sum_v p(v) (log p(v) - log q(v)) over the whole vocabulary, in
    float64. Negative rounding errors are set to zero.
    """
    assert source_TV.shape == quantized_TV.shape, (source_TV.shape, quantized_TV.shape)
    assert len(ids_T) == len(source_TV) >= 2
    chunks: list[tuple[Tensor, ...]] = []
    for start in range(0, len(ids_T) - 1, _ROWS):
        stop = min(start + _ROWS, len(ids_T) - 1)
        next_T1 = ids_T[start + 1 : stop + 1, None]
        log_p = source_TV[start:stop].double().log_softmax(-1)
        log_q = quantized_TV[start:stop].double().log_softmax(-1)
        chunks.append(
            (
                -log_p.gather(1, next_T1)[:, 0],
                -log_q.gather(1, next_T1)[:, 0],
                (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0.0),
                log_p.argmax(-1) == log_q.argmax(-1),
            )
        )
    return TokenScores(*(torch.cat(column) for column in zip(*chunks, strict=True)))


@dataclass(frozen=True, slots=True)
class Interval:
    """A value, its standard error over blocks, and its 95 % bootstrap interval."""

    value: float
    standard_error: float
    low: float
    high: float


def estimate(blocks_BT: Tensor, transform: Callable[[float], float] = float) -> Interval:
    """Mean of per-token values [blocks, tokens] under a monotone `transform` (`math.exp` turns a
    mean difference of NLL into a perplexity ratio).

    The standard error is the spread of the block means over sqrt(blocks), carried through the
    transform by its slope at the mean. The interval is the percentile bootstrap (Efron 1979) over
    blocks with a fixed seed: the same scores give the same interval.
    """
    means_B = blocks_BT.double().mean(dim=1)
    count = len(means_B)
    assert count >= 2, "an error bar needs two blocks"
    mean = float(means_B.mean())
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(count, (_RESAMPLES, count), generator=generator)
    resampled = means_B[drawn].mean(dim=1)
    low, high = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.float64))
    spread = float(means_B.std()) / math.sqrt(count)
    step = max(abs(mean), 1.0) * 1e-6
    slope = (transform(mean + step) - transform(mean - step)) / (2 * step)
    return Interval(
        value=transform(mean),
        standard_error=abs(slope) * spread,
        low=transform(float(low)),
        high=transform(float(high)),
    )
