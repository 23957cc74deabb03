"""The tensors of a step: the chunks that the scheduler chose through the model, over the cache.

Knows sequences and pages, but not requests: what a token means for its request, engine.py says.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import Protocol

import torch
from torch import Tensor

from deepseek.config import ModelConfig
from deepseek.engine.batch import Batch, Span, make_batch
from deepseek.engine.kv_cache import LatentCache
from deepseek.engine.prompt_scores import score_chunk
from deepseek.engine.request import Choice
from deepseek.engine.sampler import Draw, choose
from deepseek.engine.scheduler import Chunk, Schedule


class StepModel(Protocol):
    """What computes a step: `Model` with PyTorch's kernels, or `NativeModel`. `allocated_bytes` are
    the bytes of its tensors by inventory group."""

    config: ModelConfig
    allocated_bytes: dict[str, int]

    def forward(self, batch: Batch, cache: LatentCache) -> Tensor:
        """Run the step and write its latents into the cache -> final hidden states, normed,
        f32 [T, hidden]."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Final hidden states f32 [R, hidden] -> logits f32 [R, vocabulary]."""
        ...


class Runner:
    """A model and the cache that its latents go to."""

    def __init__(self, model: StepModel, cache: LatentCache) -> None:
        self.model = model
        self.cache = cache

    @torch.inference_mode()
    def compute(
        self, schedule: Schedule
    ) -> tuple[dict[str, Choice | None], list[list[Choice] | None]]:
        """Run the step -> the next token of every request whose chunk chooses one, and the scores
        of each chunk's prompt tokens; None in either place for logits that are not finite."""
        self.cache.clear(schedule.new_pages)
        chunks = schedule.chunks
        hidden, last_rows = self._forward(chunks)
        ends = list(zip(chunks, last_rows, strict=True))
        choosing = [(chunk, row) for chunk, row in ends if chunk.chooses]
        rows = [row for _, row in choosing]
        if rows == list(range(len(hidden))):  # a decode, mostly
            last = hidden
        else:
            last = hidden.index_select(0, torch.tensor(rows, dtype=torch.int64))
        draws = [
            Draw(chunk.sequence.request.sampling, chunk.sequence.seed, chunk.stop)
            for chunk, _ in choosing
        ]
        choices = choose(self.model.logits(last), draws)
        names = [chunk.sequence.request.request_id for chunk, _ in choosing]
        scores = [
            score_chunk(chunk, hidden[row + 1 - chunk.length : row + 1], self.model.logits)
            for chunk, row in ends
        ]
        return dict(zip(names, choices, strict=True)), scores

    @torch.inference_mode()
    def score(self, chunks: Items[Chunk], new_pages: list[int]) -> Tensor:
        """Logits f32 [T, V] after each token of the chunks, which are computed one by one."""
        self.cache.clear(new_pages)
        return torch.cat([self.model.logits(self._forward([chunk])[0]) for chunk in chunks])

    def _forward(self, chunks: Items[Chunk]) -> tuple[Tensor, list[int]]:
        """Final hidden states f32 [T, hidden] of the chunks' tokens; a chunk's rows are consecutive
        and end at its place in the list."""
        spans = [
            Span(chunk.sequence.tokens(chunk.start, chunk.stop), chunk.start, chunk.sequence.pages)
            for chunk in chunks
        ]
        batch = make_batch(spans, self.cache.page_tokens)
        return self.model.forward(batch, self.cache), batch.last_rows
