"""Minutes of short and long requests in simulated time: one pool against two, and sessions."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest
from support.admissions import status
from support.fleet_simulation import Call, Simulation, percentile

from serve_app.routing.tickets import Terms
from serve_app.setting_types import POOL

ALICE, BOB = Terms(name="alice"), Terms(name="bob")


def chat(numbers: random.Random) -> tuple[int, int]:
    return numbers.randint(20, 60), numbers.randint(20, 60)


def document(numbers: random.Random) -> tuple[int, int]:
    return numbers.randint(2000, 4000), numbers.randint(400, 1200)


def waits(calls: list[Call], name: str) -> list[float]:
    return [call.wait for call in calls if call.terms.name == name and call.granted is not None]


def mixed(one_pool: bool, spill: bool = False) -> Simulation:
    """Chats of alice and documents of bob, which are more than their share of the fleet can do, on
    four replicas: all in one pool, or two for each."""
    names = {"r1": "short", "r2": "short", "r3": "long", "r4": "long"}
    fleet = {
        name: status(name, kv=20_000, pool=POOL if one_pool else pool)
        for name, pool in names.items()
    }
    places = {POOL: 4} if one_pool else {"short": 4, "long": 4}
    simulation = Simulation(fleet, places=places, max_queued_requests=10_000, max_wait_s=60.0)
    short = (POOL,) if one_pool else ("short", "long") if spill else ("short",)
    simulation.load(ALICE, 6.0, chat, pools=short)
    simulation.load(BOB, 1.2, document, pools=(POOL,) if one_pool else ("long",))
    simulation.run(60.0)
    return simulation


@pytest.mark.heavy
def test_chats_wait_less_beside_documents_in_a_pool_of_their_own() -> None:
    together, apart, spilling = mixed(True), mixed(False), mixed(False, spill=True)
    one, two, spilled = (
        percentile(waits(made.calls, "alice"), 0.99) for made in (together, apart, spilling)
    )
    assert one > 1.0, "the documents hold every place"
    assert two < 0.2 * one
    assert spilled < 0.2 * one
    # What the documents lose is what the chats' replicas had given them.
    assert len(waits(apart.calls, "bob")) > 0.4 * len(waits(together.calls, "bob"))


@pytest.mark.heavy
def test_documents_do_not_wait_longer_because_chats_spill_over_into_their_pool() -> None:
    def longest(spill: bool) -> float:
        fleet = {"s": status("s", kv=4000, pool="short"), "l": status("l", kv=40_000, pool="long")}
        places = {"short": 2, "long": 4}
        simulation = Simulation(fleet, places=places, max_queued_requests=10_000)
        # Three times what the short pool can do; the long one is about half in use.
        simulation.load(ALICE, 8.0, chat, pools=("short", "long") if spill else ("short",))
        simulation.load(BOB, 0.15, document, pools=("long",))
        simulation.run(120.0)
        granted = waits(simulation.calls, "bob")
        assert len(granted) > 10
        return percentile(granted, 0.9)

    # One chat's time at most: a place that is free again is theirs first.
    assert longest(True) <= longest(False) + 60 / 50.0 + 0.5


@pytest.mark.heavy
@pytest.mark.parametrize(("per_s", "gain"), [(6.0, 0.2), (18.0, 0.03)])
def test_sessions_keep_their_replicas_at_no_cost_in_waiting(per_s: float, gain: float) -> None:
    """Twenty chats on four replicas; below what those can do, and at nearly all of it, where hardly
    ever more than one replica has a place."""

    def run(affinity: bool) -> tuple[float, float]:
        fleet = {f"r{index}": status(f"r{index}", kv=20_000) for index in range(4)}
        simulation = Simulation(
            fleet, places=4, max_queued_requests=10_000, max_wait_s=60.0, affinity=affinity
        )
        sessions = [f"chat-{index}" for index in range(20)]
        simulation.load(ALICE, per_s, chat, sessions=sessions)
        simulation.run(60.0)
        turns: defaultdict[str, list[str]] = defaultdict(list)
        for call in simulation.calls:
            if call.replica_id is not None:
                turns[call.session].append(call.replica_id)
        same = [a == b for ran in turns.values() for a, b in zip(ran, ran[1:], strict=False)]
        return sum(same) / len(same), percentile(waits(simulation.calls, "alice"), 0.99)

    (with_share, with_wait), (without_share, without_wait) = run(True), run(False)
    assert without_share < 0.45, "by chance one of four"
    assert with_share > without_share + gain
    assert with_wait <= without_wait + 0.25
