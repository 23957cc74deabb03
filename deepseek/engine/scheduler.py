"""Which tokens run in the next step. Pure bookkeeping: no tensors, no clock.

Every step has a budget of tokens. Decodes go first, one token each: a client that is being streamed
to feels every pause, and a decode costs little of the budget. What is left of it goes to prefills
in order of arrival, cut into chunks, so a long prompt slows the streams down by at most one budget
per step and never stops them. Waiting requests are admitted in order while the running ones leave
room; nothing overtakes.

When pages run out, the youngest running sequence gives all of its own back and waits at the front
of the queue; its tokens are computed anew later (recompute, not swap: latents are cheap to make and
the cache is on the same memory anyway). The oldest is never preempted, so something always ends.

A sequence that starts takes the pages that hold its beginning already (prefix.py). Those that
nobody uses count as free until then, and are handed out like any other.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from deepseek.engine.pages import PagePool
from deepseek.engine.request import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Positions [start, start + length) of one sequence, to be computed in this step."""

    sequence: Sequence
    start: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.length

    @property
    def completes(self) -> bool:
        """Whether all tokens of the sequence are computed after this chunk."""
        return self.stop == self.sequence.num_tokens

    @property
    def chooses(self) -> bool:
        """Whether the step's logits at the last position choose the sequence's next token."""
        return self.completes and self.sequence.request.sampling.max_tokens > 0


@dataclass(slots=True)
class Schedule:
    """One step: its chunks, the pages newly handed out, and who lost theirs."""

    chunks: list[Chunk] = field(default_factory=list)
    new_pages: list[int] = field(default_factory=list)
    preempted: list[Sequence] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)


class Scheduler:
    """Queues of sequences over a pool of pages.

    `max_batched_tokens` bounds the tokens of one step, `max_batch_size` the sequences that run at
    once. `num_preemptions` counts since the start; so do the prompt tokens of the requests that
    started, those that were found computed (`num_cached_tokens`) and the rest.
    """

    def __init__(self, pool: PagePool, *, max_batch_size: int, max_batched_tokens: int) -> None:
        assert max_batched_tokens >= max_batch_size >= 1
        self.pool = pool
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.num_preemptions = 0
        self.num_cached_tokens = 0
        self.num_uncached_tokens = 0
        self._max_batch_size = max_batch_size
        self._max_batched_tokens = max_batched_tokens

    def add(self, sequence: Sequence) -> None:
        assert self.pool.pages_for(sequence.num_tokens) <= self.pool.num_pages
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a finished or aborted sequence and free its pages."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self.pool.release(sequence)

    def schedule(self) -> Schedule:
        """Choose the next step; empty only when nothing is running or waiting.

        The caller computes all chunks, then reports with `advance`.
        """
        step = Schedule()
        for sequence in [s for s in self.running if s.num_to_compute == 1]:
            if sequence in self.running:  # it may have been preempted for an older one
                self._schedule_decode(sequence, step)
        for sequence in [s for s in self.running if s.num_to_compute > 1]:
            if sequence in self.running:
                self._schedule_prefill(sequence, step)
        while self.waiting and not step.preempted and self._admit(step):
            pass
        assert step.chunks or not (self.running or self.waiting), "the scheduler is stuck"
        return step

    def advance(self, step: Schedule) -> None:
        """Record that every chunk of the step has been computed."""
        for chunk in step.chunks:
            self.pool.record(chunk.sequence, chunk.stop)

    def _schedule_decode(self, sequence: Sequence, step: Schedule) -> None:
        while self.pool.missing(sequence, sequence.num_tokens) > self.pool.num_free:
            if self._preempt_youngest(step) is sequence:
                return
        self._append(sequence, 1, step)

    def _schedule_prefill(self, sequence: Sequence, step: Schedule) -> None:
        """As long a chunk as budget and free pages allow; preempts only if nothing else can run."""
        while self.pool.room(sequence) < 1 and not step.chunks:
            if self._preempt_youngest(step) is sequence:
                return
        budget = self._max_batched_tokens - step.num_tokens
        length = min(sequence.num_to_compute, budget, self.pool.room(sequence))
        if length > 0:
            self._append(sequence, length, step)

    def _admit(self, step: Schedule) -> bool:
        """Start the first waiting sequence if the step, the batch and the free pages can take it.

        All of its tokens and the next one must fit beside what running prefills still need: a
        prompt that is only half in the cache holds pages and produces nothing.
        """
        sequence = self.waiting[0]
        budget = self._max_batched_tokens - step.num_tokens
        if budget < 1 or len(self.running) >= self._max_batch_size:
            return False
        found = self.pool.find(sequence)
        total = min(self.pool.pages_for(sequence.num_tokens + 1), self.pool.num_pages)
        needed = total - sum(self.pool.num_users(page) > 0 for page in found)
        promised = sum(self.pool.missing(other, other.num_tokens + 1) for other in self.running)
        if needed > self.pool.num_free - promised:
            return False
        self.running.append(self.waiting.popleft())
        self.pool.share(sequence, found)
        self._count(sequence)
        self._append(sequence, min(sequence.num_to_compute, budget), step)
        return True

    def _count(self, sequence: Sequence) -> None:
        """Count a request's prompt once, also where it is preempted and starts again."""
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
            cached = sequence.cached_prompt_tokens
            self.num_cached_tokens += cached
            self.num_uncached_tokens += len(sequence.request.prompt_ids) - cached

    def _append(self, sequence: Sequence, length: int, step: Schedule) -> None:
        start = sequence.num_computed
        step.new_pages += self.pool.grow(sequence, start + length)
        written = sequence.pages[start // self.pool.page_tokens]
        assert self.pool.num_users(written) == 1, "a shared page would be written"
        step.chunks.append(Chunk(sequence, start, length))

    def _preempt_youngest(self, step: Schedule) -> Sequence:
        """Take everything from the youngest running sequence that is not in this step."""
        scheduled = {id(chunk.sequence) for chunk in step.chunks}
        victim = next(s for s in reversed(self.running) if id(s) not in scheduled)
        self.running.remove(victim)
        self.pool.release(victim)
        self.waiting.appendleft(victim)
        self.num_preemptions += 1
        step.preempted.append(victim)
        return victim
