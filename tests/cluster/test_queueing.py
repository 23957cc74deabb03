"""Waiting times: known values, and a simulated queue."""

from __future__ import annotations

import heapq
import math
import random

import pytest

from cluster.queueing import erlang_c, prefill_wait, slot_wait


@pytest.mark.parametrize(
    ("servers", "load", "probability"),
    [(1, 0.5, 0.5), (2, 1.0, 1 / 3), (3, 2.0, 4 / 9), (5, 5.0, 1.0), (4, 0.0, 0.0)],
)
def test_erlang_c_of_small_queues(servers: int, load: float, probability: float) -> None:
    assert erlang_c(servers, load) == pytest.approx(probability)


def test_many_servers_have_less_wait_at_the_same_utilization() -> None:
    waits = [slot_wait(n, 0.9 * n, 1.0, 0.9) for n in (1, 4, 16, 64)]
    assert waits == sorted(waits, reverse=True)
    assert slot_wait(4096, 2048.0, 1.0, 0.9) == 0.0
    assert slot_wait(2, 2.0, 1.0, 0.9) == math.inf


def test_one_server_waits_by_the_closed_form() -> None:
    """M/M/1: P(wait > t) = rho e^(-(1 - rho) t / S)."""
    assert slot_wait(1, 0.5, 2.0, 0.9) == pytest.approx(2.0 / 0.5 * math.log(0.5 / 0.1))


def test_a_busy_prefill_waits_and_an_idle_one_does_not() -> None:
    assert prefill_wait(0.05, 1.0, 0.9) == 0.0
    assert prefill_wait(1.0, 1.0, 0.9) == math.inf
    assert 0 < prefill_wait(0.5, 1.0, 0.9) < prefill_wait(0.8, 1.0, 0.9)
    assert prefill_wait(0.5, 2.0, 0.9) == 2 * prefill_wait(0.5, 1.0, 0.9)


def simulated(servers: int, rate: float, service: object, number: int = 40_000) -> float:
    """The 90th percentile of the waits of a queue with random arrivals."""
    rng = random.Random(7)
    free = [0.0] * servers
    now, waits = 0.0, []
    for _ in range(number):
        now += rng.expovariate(rate)
        start = max(now, heapq.heappop(free))
        heapq.heappush(free, start + (rng.expovariate(1.0) if service == "random" else 1.0))
        waits.append(start - now)
    return sorted(waits)[int(0.9 * number)]


@pytest.mark.parametrize("utilization", [0.5, 0.7, 0.8])
def test_a_simulated_queue_waits_as_long(utilization: float) -> None:
    constant = simulated(1, utilization, "constant")
    assert prefill_wait(utilization, 1.0, 0.9) == pytest.approx(constant, rel=0.2)
    many = simulated(8, 8 * utilization, "random")
    assert slot_wait(8, 8 * utilization, 1.0, 0.9) == pytest.approx(many, rel=0.2, abs=0.02)
