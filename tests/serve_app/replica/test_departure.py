"""When a replica takes itself for one that Serve stops."""

from __future__ import annotations

from serve_app.replica.departure import Departure


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_replica_that_was_routed_to_and_is_no_more_departs_after_its_time() -> None:
    clock = Clock()
    departure = Departure(60.0, clock)
    departure.note([True, False])  # one ingress has heard of it
    assert not departure.draining
    departure.note([False, False])
    assert departure.draining
    clock.now += 59.9
    departure.note([False])
    assert not departure.overdue
    clock.now += 0.1
    assert departure.overdue


def test_a_replica_that_no_ingress_knows_yet_stays() -> None:
    departure = Departure(0.0, Clock())
    departure.note([False, False])
    assert not departure.draining


def test_ingresses_that_know_nothing_end_no_stream() -> None:
    departure = Departure(0.0, Clock())
    departure.note([True])
    departure.note([None, TimeoutError(), "?"])
    departure.note([])
    assert not departure.draining


def test_an_ingress_that_routes_to_it_again_takes_it_back() -> None:
    departure = Departure(0.0, Clock())
    for answers in ([True], [False], [True]):
        departure.note(answers)
    assert not departure.draining
    assert not departure.overdue
