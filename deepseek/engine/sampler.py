"""From logits to tokens, row by row, each by its own request's parameters.

Randomness has no state: the number that picks the token at a position is a hash of the request's
seed and that position. So the same seed gives the same tokens whatever else is in the batch, after
a preemption, and when another replica continues from the tokens so far. The engine's logits do not
depend on the batch either (linear.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek.engine.request import Choice, SamplingParams

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Draw:
    """How to choose one row's token: its request's parameters, seed, and the token's position."""

    sampling: SamplingParams
    seed: int
    position: int


def choose(logits: Tensor, draws: Items[Draw]) -> list[Choice | None]:
    """Logits f32 [R, V] -> a choice per row, None where the logits are not finite."""
    assert logits.shape[0] == len(draws)
    values = logits.numpy()
    # The first of equals, or the first NaN. NumPy's is vectorized; torch's takes ten times as long.
    greedy = values.argmax(axis=1).tolist()
    choices: list[Choice | None] = []
    for row, (draw, token) in enumerate(zip(draws, greedy, strict=True)):
        # NaN and +inf are where the maximum is; -inf is where there is nothing else.
        if not math.isfinite(values.item(row, token)):
            choices.append(None)
            continue
        if draw.sampling.temperature > 0:
            token = sample(logits[row], draw.sampling, uniform(draw.seed, draw.position))
        choices.append(_with_logprobs(logits[row], token, draw.sampling.logprobs))
    return choices


def sample(logits: Tensor, sampling: SamplingParams, fraction: float) -> int:
    """The token at `fraction` in [0, 1) of the cumulated probability, after temperature, top-k and
    top-p, in that order. Logits f32 [V].

    Top-p keeps the smallest set of most likely tokens whose probabilities reach it.
    """
    scaled = (logits.double() - logits.max()) / sampling.temperature
    tokens: Tensor | None = None
    if sampling.top_k or sampling.top_p < 1:
        scaled, tokens = scaled.sort(descending=True, stable=True)
    if sampling.top_k:
        scaled = scaled[: sampling.top_k]
    cumulated = scaled.softmax(dim=-1).cumsum(dim=-1)
    kept = len(cumulated)
    if sampling.top_p < 1:
        kept = min(kept, int((cumulated < sampling.top_p).sum()) + 1)
    target = fraction * cumulated[kept - 1]
    index = min(int(torch.searchsorted(cumulated, target, right=True)), kept - 1)
    return index if tokens is None else int(tokens[index])


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits: two rounds of SplitMix64 (Steele, Lea and Flood,
    OOPSLA 2014) over seed and position."""
    mixed = _splitmix(_splitmix(seed & _MASK) ^ (position & _MASK))
    return (mixed >> 11) * 2.0**-53


def _splitmix(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def score(logits: Tensor, tokens: Tensor, count: int) -> list[Choice]:
    """Logprob and rank of one given token per row, and the `count` best alternatives.

    Logits f32 [R, V], tokens int64 [R]."""
    logprobs = logits.log_softmax(dim=-1)
    own = logprobs.gather(1, tokens[:, None])
    ranks = (logprobs >= own).sum(dim=-1)
    best = logprobs.topk(min(count, logprobs.shape[-1]))
    columns = (tokens, own[:, 0], best.indices, best.values, ranks)
    return [
        Choice(token, logprob, tuple(zip(indices, values, strict=True)), rank)
        for token, logprob, indices, values, rank in zip(
            *(column.tolist() for column in columns), strict=True
        )
    ]


def _with_logprobs(logits: Tensor, token: int, count: int | None) -> Choice:
    if count is None:
        return Choice(token)
    return score(logits[None], torch.tensor([token]), count)[0]
