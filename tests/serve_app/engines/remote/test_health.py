"""When a remote engine is given up: pings, canaries and progress, on a clock of the test's."""

from __future__ import annotations

from serve_app.engines.remote.health import Pulse
from serve_app.engines.remote.launch import Deadlines

LIMITS = Deadlines(ping_every_s=5.0, pong_s=10.0, quiet_s=10.0, canary_every_s=30.0, canary_s=20.0)


def test_a_ping_is_sent_every_few_seconds_and_its_answer_is_waited_for() -> None:
    pulse = Pulse(LIMITS, 0.0)
    assert pulse.next_ping(4.9) is None
    assert pulse.next_ping(5.0) == 1
    assert pulse.next_ping(11.0) is None  # the first has not been answered
    assert pulse.fault(15.0) is None
    assert "has not answered for 11 s" in str(pulse.fault(16.0))
    pulse.pong(1)
    assert pulse.fault(16.0) is None
    assert pulse.next_ping(16.0) == 2
    pulse.pong(1)  # an old one proves nothing
    assert pulse.fault(30.0) is not None


def test_an_idle_engine_gets_a_canary_from_time_to_time() -> None:
    pulse = Pulse(LIMITS, 0.0)
    assert not pulse.needs_canary(29.0, has_work=False)
    assert pulse.needs_canary(30.0, has_work=False)
    assert not pulse.needs_canary(31.0, has_work=False)  # one at a time
    assert pulse.fault(50.0) is None
    assert "21 s" in str(pulse.fault(51.0))
    pulse.canary_ended(51.0)
    assert pulse.fault(51.0) is None
    assert not pulse.needs_canary(80.0, has_work=False)
    assert pulse.needs_canary(81.0, has_work=False)


def test_an_engine_with_work_gets_one_when_it_makes_no_progress() -> None:
    pulse = Pulse(LIMITS, 0.0)
    for now in (5.0, 10.0, 15.0):
        pulse.progress(now)
        assert not pulse.needs_canary(now + 9.0, has_work=True)
    assert pulse.needs_canary(25.0, has_work=True)
    assert pulse.fault(44.0) is None
    assert pulse.fault(46.0) is not None


def test_a_canary_behind_a_batch_that_goes_on_is_no_fault() -> None:
    pulse = Pulse(LIMITS, 0.0)
    assert pulse.needs_canary(10.0, has_work=True)
    for now in (20.0, 35.0, 50.0, 65.0):
        pulse.progress(now)
        assert pulse.fault(now + 14.0) is None
    assert pulse.fault(86.0) is not None


def test_steps_without_a_token_are_believed_for_a_while_only() -> None:
    pulse = Pulse(LIMITS, 0.0)
    assert pulse.needs_canary(10.0, has_work=True)  # steps do not hold it back
    for now in range(11, 130, 5):
        pulse.stepped(float(now))
        assert pulse.fault(now + 1.0) is None
    pulse.stepped(131.0)
    assert "has done steps and computed nothing for 121 s" in str(pulse.fault(131.0))
    pulse.canary_ended(132.0)
    assert pulse.fault(132.0) is None


def test_steps_that_end_leave_the_canary_its_short_deadline() -> None:
    pulse = Pulse(LIMITS, 0.0)
    assert pulse.needs_canary(10.0, has_work=True)
    pulse.stepped(29.0)
    assert pulse.fault(48.0) is None
    assert "it has computed nothing for 40 s" in str(pulse.fault(50.0))
