"""Logprobs of a prompt's own tokens, chunk by chunk, and their names.

The engine scores every chunk of a prefill in its step: the logits at one position say how likely
the next token of the prompt was. Only `SLICE` rows of logits exist at a time, [SLICE, vocabulary],
and what is kept of them is each token's logprob and rank and the best alternatives. A row's bits
depend on neither the slice nor the chunk (linear.py).
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items

import torch
from torch import Tensor

from deepseek.engine.detokenizer import Tokenizer
from deepseek.engine.request import Sequence, TokenLogprob, TopLogprob
from deepseek.engine.sampler import Choice, score
from deepseek.engine.scheduler import Chunk
from deepseek.engine.token_names import TokenNames

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


class LogprobNamer:
    """Gives the tokens of a `Choice` their texts and bytes; empty without a tokenizer."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._names = None if tokenizer is None else TokenNames(tokenizer)

    def name_last(self, sequence: Sequence, choice: Choice) -> TokenLogprob:
        """Of the sequence's last token."""
        stop = sequence.num_tokens - 1
        return self.name(choice, sequence.tokens(max(0, stop - 4), stop))

    def name_prompt(
        self, sequence: Sequence, first: int, choices: Items[Choice]
    ) -> list[TokenLogprob]:
        """Of the prompt's tokens from position `first` on."""
        prompt = sequence.request.prompt_ids
        return [
            self.name(choice, prompt[max(0, position - 4) : position])
            for position, choice in enumerate(choices, first)
        ]

    def name(self, choice: Choice, context: Items[int]) -> TokenLogprob:
        """Of a token after the tokens of `context`."""
        assert choice.logprob is not None
        text, data = self._name(choice.token_id, context)
        top = []
        for token, logprob in choice.top:
            name = self._name(token, context)
            top.append(TopLogprob(token, name[0], logprob, name[1]))
        return TokenLogprob(choice.token_id, text, choice.logprob, tuple(top), data, choice.rank)

    def _name(self, token_id: int, context: Items[int]) -> tuple[str, bytes | None]:
        return ("", None) if self._names is None else self._names.name(token_id, context)
