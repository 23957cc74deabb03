"""Where a request goes, and what the owner of admission hears of the engine replicas."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from support.admissions import INGRESS, Office, granted, status
from support.serving import make_request

from serve_app.routing.candidates import candidates, note_candidates, on_change
from serve_app.routing.replica_client import MAX_AGE_S
from serve_app.routing.router import ByTicket, ReplicaID
from serve_app.routing.sightings import Sightings
from serve_app.routing.tickets import Seen


def replica(name: str) -> Any:
    return SimpleNamespace(replica_id=SimpleNamespace(unique_id=name))


async def ranks(pending: Any) -> list[list[str]]:
    router = object.__new__(ByTicket)
    chosen = await router.choose_replicas([replica(name) for name in "abcd"], pending)
    return [[one.replica_id.unique_id for one in rank] for rank in chosen]


def pending(*args: Any) -> Any:
    return SimpleNamespace(args=args, routing_context=SimpleNamespace(should_backoff=False))


@pytest.mark.parametrize(
    ("replica_id", "avoid", "expected"),
    [
        ("b", (), [["b"], ["a", "c", "d"]]),
        ("b", ("a", "d"), [["b"], ["c"], ["a", "d"]]),
        ("gone", ("a",), [["b", "c", "d"], ["a"]]),
        (None, ("a", "b", "c", "d"), [["a", "b", "c", "d"]]),
        (None, (), [["a", "b", "c", "d"]]),
    ],
)
async def test_the_named_replica_comes_first_and_the_avoided_ones_last(
    replica_id: str | None, avoid: tuple[str, ...], expected: list[list[str]]
) -> None:
    fields = {"replica_id": replica_id, "avoid": avoid}
    base = make_request()
    request = type(base)(
        request_id="r", prompt_ids=base.prompt_ids, sampling=base.sampling, **fields
    )
    asked = pending(request)
    assert await ranks(asked) == expected
    assert asked.routing_context.should_backoff, "else Serve asks again without any pause"


async def test_a_call_that_is_no_request_goes_to_any_replica() -> None:
    assert await ranks(pending()) == [["a", "b", "c", "d"]]
    assert await ranks(pending({"replica_id": "b"})) == [["a", "b", "c", "d"]]
    assert await ranks(None) == [["a", "b", "c", "d"]]


def test_the_router_writes_down_the_replicas_that_serve_routes_to() -> None:
    router = object.__new__(ByTicket)
    router.initialize_state(deployment="of-this-test")
    assert candidates("of-this-test") is None
    router._replicas = {ReplicaID(name, None): None for name in "ab"}
    router._note()
    assert candidates("of-this-test") == {"a", "b"}


def test_an_ingress_tells_what_it_hears_and_what_serve_does_not_route_to() -> None:
    now, changes = 100.0, []
    note_candidates("told", frozenset({"a", "b"}))
    sightings = Sightings(
        lambda pool: candidates("told"), lambda: changes.append(None), clock=lambda: now
    )
    sightings.seen()
    for name in "abc":
        sightings.note(status(name))
    assert len(changes) == 3
    now += 1
    sightings.note(status("a"))
    told = sightings.seen()
    assert {s.replica_id: age for s, age in told.statuses} == {"a": 0.0, "b": 1.0, "c": 1.0}
    assert told.unrouted == ("c",)
    note_candidates("told", frozenset({"b", "c"}))
    sightings.note(status("a"))
    assert len(changes) == 4, "a replica that drains is told at once"
    assert sightings.seen().unrouted == ("a",)
    sightings.goodbye("b")
    sightings.note(status("b"))  # was under way
    assert sightings.seen().gone == ("b",)
    now += MAX_AGE_S + 0.1
    assert sightings.seen() == Seen(gone=("b",))


def test_serves_word_on_a_replica_that_is_heard_of_is_told_at_once() -> None:
    """Its first heartbeat comes before Serve routes to it: nothing waits for the second."""
    changes: list[None] = []
    note_candidates("late", frozenset())
    sightings = Sightings(lambda pool: candidates("late"), lambda: changes.append(None))
    end = on_change(sightings.look)
    note_candidates("late", frozenset({"a"}))
    assert not changes, "nobody has heard of it"
    note_candidates("late", frozenset())
    sightings.note(status("a"))
    assert sightings.seen().unrouted == ("a",)
    changes.clear()
    note_candidates("late", frozenset({"a"}))
    assert len(changes) == 1
    assert sightings.seen().unrouted == ()
    note_candidates("late", frozenset({"a"}))
    assert len(changes) == 1, "nothing is new"
    end()
    note_candidates("late", frozenset())
    assert len(changes) == 1


def test_nothing_is_placed_in_a_replica_that_drains_and_it_may_come_back() -> None:
    office = Office(status("r1"), status("r2"), ingresses=(INGRESS, "i2"))

    def tell(ingress: str, *unrouted: str) -> None:
        statuses = tuple((item, 0.0) for item in office.replicas.values())
        office.say(Seen(statuses=statuses, unrouted=unrouted), ingress=ingress)

    def place(name: str) -> str:
        return granted(office.enter(name))[f"{name}-0"]

    assert {place("a"), place("b")} == {"r1", "r2"}
    tell(INGRESS, "r1")
    tell("i2")  # has yet to hear of it
    assert {place("c"), place("d")} == {"r2"}
    tell(INGRESS)
    assert {place("e"), place("f")} == {"r1"}
