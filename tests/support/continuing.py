"""Runs that end on one engine and go on on another; a model whose answer is written beforehand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deepseek.engine.batch import Batch
from deepseek.engine.kv_cache import LatentCache
from deepseek.engine.model import Model
from deepseek.engine.request import (
    FinishReason,
    Request,
    StepOutput,
    TokenLogprob,
)


@dataclass(frozen=True)
class Answer:
    """All that a client is told of one request."""

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...]
    reason: FinishReason | None
    prompt_tokens: int
    completion_tokens: int

    def __add__(self, rest: Answer) -> Answer:
        """The counts are totals: those of the rest count."""
        return Answer(
            self.token_ids + rest.token_ids,
            self.text + rest.text,
            self.logprobs + rest.logprobs,
            rest.reason,
            rest.prompt_tokens,
            rest.completion_tokens,
        )


def answer(outputs: Iterable[StepOutput]) -> Answer:
    """What the outputs of one request say together."""
    outputs = list(outputs)
    return Answer(
        tuple(token for output in outputs for token in output.token_ids),
        "".join(output.text for output in outputs),
        tuple(item for output in outputs for item in output.logprobs),
        outputs[-1].finish_reason,
        outputs[-1].prompt_tokens,
        outputs[-1].completion_tokens,
    )


def continued(request: Request, begun: Answer, name: str, num_shown: int | None = None) -> Request:
    """The request that goes on after `begun`, of whose text all was passed on unless told."""
    shown = len(begun.text) if num_shown is None else num_shown
    return replace(request, request_id=name, output_ids=begun.token_ids, num_shown=shown)


def splits(request: Request, outputs: Sequence[StepOutput]) -> dict[str, tuple[Answer, Request]]:
    """For every number of outputs before the last: what they said, and the request for the rest."""
    parts = {}
    for count in range(1, len(outputs)):
        begun = answer(outputs[:count])
        name = f"{request.request_id}-{count}"
        parts[name] = (begun, continued(request, begun, name))
    return parts


class Scripted:
    """A model that says `script` after a prompt of `prompt_tokens` tokens, and computes nothing
    else: its logits depend on the position alone. `num_steps` counts its forward passes."""

    def __init__(self, model: Model, prompt_tokens: int, script: Sequence[int]) -> None:
        self.config = model.config
        self.allocated_bytes = model.allocated_bytes
        self.num_steps = 0
        chance = torch.Generator().manual_seed(3)
        length = prompt_tokens + len(script)
        self._rows = torch.randn((length, model.config.vocab_size), generator=chance)
        for position, token in enumerate(script, prompt_tokens - 1):
            self._rows[position, token] += 30.0

    def forward(self, batch: Batch, cache: LatentCache) -> Tensor:
        self.num_steps += 1
        return batch.positions[:, None].float()

    def logits(self, hidden: Tensor) -> Tensor:
        return self._rows[hidden[:, 0].long()]
