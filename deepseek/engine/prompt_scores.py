"""Logprobs of a prompt's own tokens, chunk by chunk.

The engine scores every chunk of a prefill in its step: the logits at one position say how likely
the next token of the prompt was. Only `SLICE` rows of logits exist at a time, [SLICE, vocabulary],
and what is kept of them is each token's logprob and rank and the best alternatives. A row's bits
depend on neither the slice nor the chunk (linear.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deepseek.engine.request import Choice
from deepseek.engine.sampler import score
from deepseek.engine.scheduler import Chunk

#: Rows of logits at a time, a multiple of every `RowRule.multiple`: 33 MB at 129,280 tokens.
SLICE = 64


def score_chunk(
    chunk: Chunk, hidden: Tensor, logits_of: Callable[[Tensor], Tensor]
) -> list[Choice] | None:
    """Score the prompt tokens that a chunk predicts and that have no logprob yet; often none.

    `hidden` holds the chunk's rows, f32 [length, hidden]; `logits_of` makes logits f32 [R, V] of
    some of them. None where the logits are not finite.
    """
    positions = chunk.sequence.rows_to_score(chunk.start, chunk.stop)
    sampling = chunk.sequence.request.sampling
    if not positions or sampling.prompt_logprobs is None:
        return []
    tokens = chunk.sequence.tokens(positions.start + 1, positions.stop + 1)
    first = positions.start - chunk.start
    scores: list[Choice] = []
    for begin in range(0, len(tokens), SLICE):
        some = tokens[begin : begin + SLICE]
        logits = logits_of(hidden[first + begin : first + begin + len(some)])
        if not bool(logits.amax(dim=-1).isfinite().all()):
            return None
        scores += score(logits, torch.tensor(some), sampling.prompt_logprobs)
    return scores
