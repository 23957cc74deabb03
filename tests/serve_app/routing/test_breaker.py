"""When a replica is left alone, and when it is tried again."""

from __future__ import annotations

from serve_app.routing.breaker import Breaker


def opened(now: float = 0.0) -> Breaker:
    breaker = Breaker()
    for name in ("a", "b", "c"):
        breaker.failed(name, now)
    return breaker


def test_three_failures_in_a_row_open_it() -> None:
    breaker = Breaker()
    breaker.failed("a", 0.0)
    breaker.failed("b", 0.0)
    assert breaker.takes(0.0)
    breaker.failed("c", 0.0)
    assert not breaker.takes(0.0)
    assert breaker.state(0.0) == "open"


def test_a_success_between_failures_keeps_it_closed() -> None:
    breaker = Breaker()
    for _ in range(5):
        breaker.failed("a", 0.0)
        breaker.failed("b", 0.0)
        breaker.succeeded("c")
    assert breaker.state(0.0) == "closed"


def test_after_ten_seconds_one_sequence_at_a_time_is_let_through() -> None:
    breaker = opened()
    assert not breaker.takes(9.9)
    assert breaker.takes(10.0)
    assert breaker.state(10.0) == "half_open"
    breaker.sent("probe", 10.0)
    assert not breaker.takes(10.0)
    breaker.ended("probe")
    assert breaker.takes(10.0)


def test_a_probe_that_succeeds_closes_it() -> None:
    breaker = opened()
    breaker.sent("probe", 10.0)
    breaker.succeeded("probe")
    assert breaker.state(10.0) == "closed"
    breaker.failed("a", 11.0)
    assert breaker.state(11.0) == "closed"


def test_a_probe_that_fails_opens_it_for_twice_as_long_up_to_120_s() -> None:
    breaker, now, lengths = opened(), 0.0, []
    for _ in range(6):
        assert breaker.open_until is not None
        lengths.append(breaker.open_until - now)
        now = breaker.open_until
        breaker.sent("probe", now)
        breaker.failed("probe", now)
    assert lengths == [10.0, 20.0, 40.0, 80.0, 120.0, 120.0]


def test_sequences_from_before_say_nothing_about_an_open_replica() -> None:
    breaker = opened()
    breaker.failed("old", 5.0)
    assert breaker.open_until == 10.0
    breaker.sent("probe", 10.0)
    breaker.succeeded("old")
    assert breaker.state(10.0) == "half_open"


def test_a_probe_that_runs_for_half_a_minute_closes_it() -> None:
    breaker = opened()
    breaker.sent("probe", 10.0)
    breaker.tick(39.0)
    assert breaker.state(39.0) == "half_open"
    breaker.tick(40.0)
    assert breaker.state(40.0) == "closed"
