"""The clock of an engine's progress: idle never counts, a step that does not end does."""

from __future__ import annotations

from serve_app.engines.stall import StallClock


class Time:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_an_idle_engine_never_stalls() -> None:
    time = Time()
    clock = StallClock(time)
    time.now += 500.0
    assert clock.stalled_s() == 0.0
    clock.submitted()
    clock.taken()
    clock.stepped(has_work=False)
    time.now += 500.0
    assert clock.stalled_s() == 0.0


def test_an_idle_time_does_not_count_against_the_work_that_ends_it() -> None:
    time = Time()
    clock = StallClock(time)
    time.now += 500.0
    clock.submitted()
    time.now += 2.0
    clock.submitted()
    assert clock.stalled_s() == 2.0


def test_each_step_is_measured_alone() -> None:
    time = Time()
    clock = StallClock(time)
    clock.submitted()
    clock.taken()
    for _ in range(10):
        time.now += 3.0
        assert clock.stalled_s() == 3.0
        clock.stepped(has_work=True)
        assert clock.stalled_s() == 0.0


def test_new_work_does_not_hide_a_step_that_hangs() -> None:
    time = Time()
    clock = StallClock(time)
    clock.submitted()
    clock.taken()
    for _ in range(5):
        time.now += 10.0
        clock.submitted()
    assert clock.stalled_s() == 50.0


def test_work_that_arrives_while_a_step_ends_is_still_pending() -> None:
    time = Time()
    clock = StallClock(time)
    clock.submitted()
    clock.taken()
    clock.submitted()
    clock.stepped(has_work=False)
    time.now += 7.0
    assert clock.stalled_s() == 7.0
