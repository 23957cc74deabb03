"""The rounds of bench/peers_decode.py: every contender in turn, for each figure of each round.

Contenders are neighbors in time for every figure, so that a slow phase of the machine affects all
of them, and the order turns by one each round, so that none always follows the same.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from bench.decoding.contenders import MOST_BATCH, MOST_STEPS, Opened

#: Steps that are timed at a time, by batch; the next larger batch's where there is none.
STEPS = {1: 32, 4: 24, 16: 16, 64: 8, 128: 6}
#: In place of a batch size: a prompt of the context's length.
PREFILL = 0
#: Ids below are BOS and EOS.
FIRST_TOKEN = 2


@dataclass(slots=True)
class Figures:
    """Seconds by contender's name and batch size (`PREFILL`: of the whole prompt), one number per
    round: the mean of its steps."""

    seconds: dict[tuple[str, int], list[float]] = field(default_factory=dict)

    def add(self, name: str, batch: int, seconds: float) -> None:
        self.seconds.setdefault((name, batch), []).append(seconds)

    def median(self, name: str, batch: int) -> float | None:
        measured = self.seconds.get((name, batch))
        return statistics.median(measured) if measured else None

    def spread(self, name: str, batch: int) -> float:
        """Half of the range over the rounds, as a share of the median."""
        measured = self.seconds[name, batch]
        return (max(measured) - min(measured)) / 2 / statistics.median(measured)


def steps_of(batch: int, factor: float = 1.0) -> int:
    """Steps that are timed at a time, at least two."""
    known = next((size for size in sorted(STEPS) if size >= batch), max(STEPS))
    return max(2, round(factor * STEPS[known]))


def prompts(count: int, length: int, vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Random prompts that share no beginning."""
    words = random.Random(seed)
    ids = range(FIRST_TOKEN, vocab_size)
    return [words.choices(ids, k=length) for _ in range(count)]


def batches_of(opened: Opened, batches: Sequence[int]) -> list[int]:
    return [batch for batch in batches if batch <= MOST_BATCH[opened.contender.kind]]


def fill(opened: Opened, batches: Sequence[int], contexts: Sequence[list[int]]) -> None:
    """Compute the contexts of the largest batch that the contender is measured with."""
    sizes = batches_of(opened, batches)
    words = opened.worker.ask("fill", prompts=contexts[: max(sizes)], batches=sizes)
    if words:
        opened.words.append(words)


def measure(
    field_of: Sequence[Opened],
    batches: Sequence[int],
    rounds: int,
    *,
    context: int,
    vocab_size: int,
    factor: float = 1.0,
    advance: Callable[[str], None] = lambda words: None,
    each_round: Callable[[], None] = lambda: None,
) -> Figures:
    """Run the rounds; `advance` is told of every measurement, and `each_round` is called
    before each. One unmeasured round warms up."""
    figures = Figures()
    for number in range(rounds + 1):
        each_round()
        for opened, batch in turns(field_of, batches, number):
            advance(f"round {number} of {rounds}: {opened.contender.name}")
            name, worker = opened.contender.name, opened.worker
            if batch == PREFILL:
                (prompt,) = prompts(1, context, vocab_size, seed=1000 + number)
                seconds = worker.ask("prefill", tokens=prompt)
            else:
                steps = min(steps_of(batch, factor), MOST_STEPS[opened.contender.kind])
                steps = min(steps, 2) if number == 0 else steps
                seconds = statistics.mean(worker.ask("decode", batch=batch, steps=steps))
            if number:
                figures.add(name, batch, seconds)
    return figures


def turns(
    field_of: Sequence[Opened], batches: Sequence[int], number: int
) -> Iterator[tuple[Opened, int]]:
    """The measurements of one round, in order."""
    first = number % len(field_of)
    order = [*field_of[first:], *field_of[:first]]
    for batch in (PREFILL, *batches):
        for opened in order:
            if batch == PREFILL or batch in batches_of(opened, batches):
                yield opened, batch
