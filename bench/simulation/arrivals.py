"""Traces: when requests come and how long they are. The same seed gives the same trace."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .engine import EngineModel, Request

#: Gives a prompt's and an answer's tokens.
Lengths = Callable[[random.Random], tuple[float, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Poisson arrivals whose rate changes: `load` is the part of the cluster, of all its nodes,
    that the mean request keeps busy at a moment (1: all places that shall be taken are)."""

    name: str
    says: str
    load: Callable[[float], float]
    peak: float
    lengths: Lengths


def usual(numbers: random.Random) -> tuple[float, float]:
    """Log-normal lengths: prompts around 1,200 tokens, answers around 300."""
    prompt = min(16_000.0, numbers.lognormvariate(math.log(1200.0), 0.7))
    output = min(4_000.0, numbers.lognormvariate(math.log(300.0), 0.7))
    return math.ceil(prompt), math.ceil(output)


def heavy(numbers: random.Random) -> tuple[float, float]:
    """Pareto lengths: one prompt of twenty has more than 5,000 tokens, one answer of a hundred
    more than 2,500."""
    prompt = min(60_000.0, 400.0 * numbers.paretovariate(1.2))
    output = min(8_000.0, 120.0 * numbers.paretovariate(1.5))
    return math.ceil(prompt), math.ceil(output)


def reading(numbers: random.Random) -> tuple[float, float]:
    """Long prompts with short answers: prefill is all the work, and few places are taken."""
    prompt = min(30_000.0, numbers.lognormvariate(math.log(6000.0), 0.5))
    return math.ceil(prompt), math.ceil(numbers.lognormvariate(math.log(24.0), 0.3))


def traces(hours: float) -> tuple[Trace, ...]:
    """The traces over so many hours; the diurnal one has one day in them."""
    day_s = hours * 3600.0

    def diurnal(now_s: float) -> float:
        return 0.45 - 0.40 * math.cos(2 * math.pi * now_s / day_s)

    def bursts(now_s: float) -> float:
        return 0.85 if now_s % 1800.0 >= 1200.0 else 0.15

    def gaps(now_s: float) -> float:
        return 0.5 if now_s % 2400.0 < 600.0 else 0.0

    return (
        Trace(name="poisson", says="constant rate", load=lambda _: 0.5, peak=0.5, lengths=usual),
        Trace(name="diurnal", says="a day's wave", load=diurnal, peak=0.85, lengths=usual),
        Trace(
            name="burst",
            says="20 minutes of little, 10 of much",
            load=bursts,
            peak=0.85,
            lengths=usual,
        ),
        Trace(
            name="gaps",
            says="10 minutes of half, 30 of nothing",
            load=gaps,
            peak=0.5,
            lengths=usual,
        ),
        Trace(
            name="reading",
            says="the wave with long prompts and short answers",
            load=diurnal,
            peak=0.85,
            lengths=reading,
        ),
        Trace(
            name="heavy-tailed",
            says="the wave with Pareto lengths",
            load=diurnal,
            peak=0.85,
            lengths=heavy,
        ),
    )


@functools.cache
def mean_lengths(lengths: Lengths, samples: int = 20_000) -> tuple[float, float]:
    """Mean tokens of a prompt and of an answer."""
    numbers = random.Random(0)
    drawn = [lengths(numbers) for _ in range(samples)]
    return sum(p for p, _ in drawn) / samples, sum(o for _, o in drawn) / samples


def arrivals(
    trace: Trace, model: EngineModel, nodes: int, horizon_s: float, seed: int
) -> Iterator[Request]:
    """The requests of a trace for a cluster of so many nodes, in order (thinning)."""
    numbers = random.Random(f"{trace.name}/{nodes}/{seed}")
    full_rate = nodes * model.rate(*mean_lengths(trace.lengths))
    now_s = 0.0
    while True:
        now_s += numbers.expovariate(full_rate * trace.peak)
        if now_s >= horizon_s:
            return
        if numbers.random() * trace.peak <= trace.load(now_s):
            prompt, output = trace.lengths(numbers)
            yield Request(now_s, prompt, output)
