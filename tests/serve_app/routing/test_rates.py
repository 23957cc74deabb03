"""Token buckets, the drain rate, and what a Retry-After says."""

from __future__ import annotations

import math

import pytest

from serve_app.routing.rates import DrainMeter, TokenBucket, missing_after, retry_after


def test_a_bucket_starts_full_and_refills_over_a_minute() -> None:
    bucket = TokenBucket(60, now=0.0)
    assert bucket.wait_s(60, 0.0) == 0.0
    bucket.take(60, 0.0)
    assert bucket.wait_s(1, 0.0) == pytest.approx(1.0)
    assert bucket.wait_s(15, 10.0) == pytest.approx(5.0)
    assert bucket.level(1000.0) == 60.0


def test_more_than_the_bucket_holds_passes_when_it_is_full_and_leaves_a_debt() -> None:
    bucket = TokenBucket(60, now=0.0)
    assert bucket.wait_s(100, 0.0) == 0.0
    bucket.take(100, 0.0)
    assert bucket.level(0.0) == -40.0
    assert bucket.wait_s(1, 0.0) == pytest.approx(41.0)
    assert bucket.wait_s(100, 0.0) == pytest.approx(100.0)


def test_what_comes_back_does_not_make_a_bucket_fuller_than_full() -> None:
    bucket = TokenBucket(60, now=0.0)
    bucket.take(30, 0.0)
    bucket.take(-50, 0.0)
    assert bucket.level(0.0) == 60.0


def test_another_rate_keeps_what_was_taken() -> None:
    bucket = TokenBucket(60, now=0.0)
    bucket.take(50, 0.0)
    bucket.resize(120, 0.0)
    assert bucket.level(0.0) == 70.0


def test_a_clock_that_stands_still_or_goes_back_refills_nothing() -> None:
    bucket = TokenBucket(60, now=10.0)
    bucket.take(60, 10.0)
    assert bucket.level(5.0) == 0.0
    assert bucket.level(10.0) == 0.0


@pytest.mark.parametrize(
    ("takes", "missing"),
    [
        ([], 0.0),
        ([(0.0, 60.0)], 60.0),
        ([(30.0, 60.0)], 30.0),
        ([(59.0, 20.0)], 0.0),
        # Two per second for half a minute, of which one per second has come back.
        ([(float(age), 2.0) for age in range(30)], 31.0),
        # One per second: never more than one is missing.
        ([(float(age), 1.0) for age in range(60)], 1.0),
        ([(0.0, 100.0)], 100.0),
    ],
)
def test_what_was_used_before_is_missing_as_if_the_bucket_had_been_one(
    takes: list[tuple[float, float]], missing: float
) -> None:
    assert missing_after(60, takes) == pytest.approx(missing)
    assert missing_after(60, reversed(takes)) == pytest.approx(missing)


def test_the_drain_rate_is_that_of_the_time_in_which_something_waits() -> None:
    meter = DrainMeter()
    assert meter.rate() is None
    now = 0.0
    meter.advance(now, waiting=False)
    for _ in range(1000):
        now += 0.1
        meter.advance(now, waiting=True)
        meter.drained(50)
    assert meter.rate() == pytest.approx(500.0, rel=0.02)
    meter.advance(now + 36_000.0, waiting=False)  # a quiet night
    assert meter.rate() == pytest.approx(500.0, rel=0.02)


def test_the_drain_rate_follows_a_change_within_a_window_or_two() -> None:
    meter, now = DrainMeter(), 0.0
    meter.advance(now, waiting=False)
    for tokens, seconds in ((50, 100), (5, 100)):
        for _ in range(seconds * 10):
            now += 0.1
            meter.advance(now, waiting=True)
            meter.drained(tokens)
    assert 50.0 <= (meter.rate() or 0.0) <= 70.0


def test_a_moment_of_waiting_is_no_rate() -> None:
    meter = DrainMeter()
    meter.advance(0.0, waiting=False)
    meter.advance(0.01, waiting=True)
    meter.drained(100_000)
    assert meter.rate() is None


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(None, 5), (0.0, 1), (0.2, 1), (1.2, 2), (59.5, 60), (1e9, 60), (math.inf, 60), (-3, 1)],
)
def test_retry_after_is_whole_seconds_from_1_to_60(seconds: float | None, said: int) -> None:
    assert retry_after(seconds) == said
