"""Minutes of load in simulated time: fair shares, bursts, and clients that come back when told."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from support.admissions import status
from support.fleet_simulation import Simulation, percentile

from serve_app.engines.protocol import ReplicaStatus
from serve_app.routing.tickets import Terms

Size = Callable[[random.Random], tuple[int, int]]

ALICE, BOB = Terms(name="alice"), Terms(name="bob")


def fleet(kv: int = 100_000) -> dict[str, ReplicaStatus]:
    return {name: status(name, kv=kv) for name in ("r1", "r2")}


def chat(numbers: random.Random) -> tuple[int, int]:
    return numbers.randint(20, 60), numbers.randint(20, 60)


def document(numbers: random.Random) -> tuple[int, int]:
    return numbers.randint(200, 2000), numbers.randint(100, 300)


@pytest.mark.heavy
@pytest.mark.parametrize("weight", [1.0, 3.0])
@pytest.mark.parametrize(
    ("kv", "size", "per_s", "reserve"),
    [
        (100_000, chat, 20.0, 1.0),  # places are short, all alike
        (100_000, document, 6.0, 1.0),  # bob's requests are 17 times as long
        (6_000, document, 6.0, 1.0),  # and KV is short
        (100_000, chat, 20.0, 10.0),  # bob asks for ten times what he uses
    ],
)
def test_at_twice_the_load_two_keys_share_tokens_by_weight(
    weight: float, kv: int, size: Size, per_s: float, reserve: float
) -> None:
    simulation = Simulation(fleet(kv))
    simulation.load(Terms(name="alice", weight=weight), 15.0 + 5.0 * weight, chat)
    simulation.load(BOB, per_s, size, reserve=reserve)
    simulation.run(50.0)
    alice, bob = (simulation.served(name, 10.0, 50.0) for name in ("alice", "bob"))
    fair = weight / (1.0 + weight)
    assert abs(alice / (alice + bob) - fair) <= 0.1 * min(fair, 1.0 - fair)
    longest = max(call.wait for call in simulation.calls if call.granted is not None)
    assert longest <= 30.0 + 0.3


def waits(places: int, burst: int) -> list[float]:
    """Seconds that a steady key's requests wait, on two replicas of so many places."""
    simulation = Simulation(fleet(), places=places, max_queued_requests=1000, max_wait_s=60.0)
    simulation.load(ALICE, 8.0, chat)

    def come() -> None:
        for _ in range(burst):
            simulation.call(BOB, *chat(simulation.random))

    simulation.at(20.0, come)
    simulation.run(60.0)
    return [c.wait for c in simulation.calls if c.terms is ALICE and 20.0 <= c.arrived < 45.0]


def test_a_burst_of_one_key_leaves_another_what_half_of_the_fleet_would_give_it() -> None:
    longest_service = 60 / 50.0
    during, alone = waits(8, burst=500), waits(4, burst=0)
    assert percentile(during, 0.99) <= percentile(alone, 0.99) + longest_service


def test_clients_that_obey_retry_after_are_all_served() -> None:
    simulation = Simulation(fleet(), obey=True, max_queued_requests=16, max_wait_s=5.0)

    def come() -> None:
        for index in range(300):
            simulation.call(Terms(name=f"key-{index % 7}"), *chat(simulation.random))

    simulation.at(1.0, come)
    simulation.run(120.0)
    assert all(call.done is not None for call in simulation.calls)
    assert any(call.refusals for call in simulation.calls)
    said = {r.retry_after_s for call in simulation.calls for _, r in call.refusals}
    assert min(said) >= 1
    assert max(said) <= 120


def test_a_lower_band_gets_what_the_higher_leaves() -> None:
    simulation = Simulation(fleet())
    simulation.load(ALICE, 10.0, chat)
    simulation.load(Terms(name="batch", priority=9), 40.0, chat)
    simulation.run(60.0)
    mine = [call.wait for call in simulation.calls if call.terms is ALICE]
    assert percentile(mine, 0.99) <= 60 / 50.0
    assert simulation.served("batch", 10.0, 60.0) > 0.5 * simulation.served("alice", 10.0, 60.0)
