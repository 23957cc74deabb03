"""The autoscaling policy, without Ray and without a clock."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.scaling import Pool, direction_changes, section

from serve_app.autoscaling.policy import LatencyPolicy
from serve_app.autoscaling.signals import Decision, Signals, State

SLOW = {"ttft_p90_s": 3.0, "running": 64, "waiting": 100, "places": 64, "kv_share": 0.3}
CALM = {"ttft_p90_s": 0.2, "running": 4, "places": 64, "kv_share": 0.05}
NOBODY: dict[str, Any] = {"places": 64, "kv_share": 0.0}


def settled(policy: LatencyPolicy, ready: int, seconds: int = 60, **measured: Any) -> Decision:
    """The decision after the pool has shown the same for so long, without having moved."""
    state = State()
    for tick in range(seconds // 5 + 1):
        signals = Signals(now_s=1000.0 + 5 * tick, ready=ready, **measured)
        decision, after = policy.decide(signals, state)
        state = replace(after, last_up_s=None, last_down_s=None)
    return decision


# --- growing -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("measured", "cause", "says"),
    [
        ({"ttft_p90_s": 1.2}, "ttft", "TTFT p90 1.2 s of 2 s, load 0.60 is above 0.55"),
        ({"itl_p90_s": 0.04}, "itl", "ITL p90 0.04 s of 0.05 s, load 0.80"),
        ({"waiting": 2, "oldest_wait_s": 1.5}, "wait", "longest wait 1.5 s of 2 s"),
        ({"kv_share": 0.85}, "kv", "KV 85% of 80%"),
        ({"running": 110, "places": 64}, "places", "110 running and 0 waiting"),
        ({"running": 60, "waiting": 50, "places": 64}, "places", "60 running and 50 waiting"),
    ],
)
def test_each_measure_alone_makes_the_pool_grow_and_is_named(
    measured: dict[str, Any], cause: str, says: str
) -> None:
    decision = settled(LatencyPolicy(section()), 2, **({"running": 1} | measured))
    assert decision.desired > 2
    assert decision.cause == cause
    assert says in decision.reason
    assert decision.reason.startswith(f"goes from 2 to {decision.desired}: ")


@pytest.mark.parametrize("target", ["ttft", "itl", "kv", "places", "wait"])
def test_a_target_that_is_null_moves_nothing(target: str) -> None:
    measured = {
        "ttft": {"ttft_p90_s": 9.0},
        "itl": {"itl_p90_s": 9.0},
        "kv": {"kv_share": 1.0},
        "places": {"places": 64},
        "wait": {"waiting": 1, "oldest_wait_s": 9.0},
    }[target]
    null = {"ttft": "target_ttft_s", "itl": "target_itl_s", "wait": "target_ttft_s"}
    key = null.get(target, f"target_{target}_share")
    both = {"running": 100, **measured}
    assert settled(LatencyPolicy(section()), 1, **both).desired == 2
    assert settled(LatencyPolicy(section(**{key: None})), 1, **both).desired == 1


def test_use_at_its_target_is_just_the_threshold() -> None:
    policy = LatencyPolicy(section(target_kv_share=0.8))
    assert settled(policy, 4, running=9, kv_share=0.8).desired == 4
    assert settled(policy, 4, running=9, kv_share=0.81).desired == 5


def test_demand_of_many_replicas_is_met_at_once_within_the_growth() -> None:
    policy = LatencyPolicy(section(max_replicas=64))
    decision = settled(policy, 10, running=64 * 12, places=64)
    assert decision.desired == 15  # 12 / 0.8
    assert decision.demand == pytest.approx(15.0)
    decision = settled(policy, 10, running=640, waiting=640, places=64)
    assert decision.desired == 20
    assert "25 wanted, but it grows by at most 100% in 60 s" in decision.reason


def test_it_at_most_doubles_in_any_minute() -> None:
    pool = Pool(LatencyPolicy(section(max_replicas=64)), lambda r, t: SLOW, load_s=0.0)
    pool.run(40)
    counts = pool.run(600)
    for start in range(len(counts) - 60):
        window = counts[start : start + 60]
        assert max(window) <= 2 * min(window)
    assert counts[-1] == 64


def test_the_latency_of_one_moment_does_not_move_it() -> None:
    spike = {1050.0: 8.0}
    busy = CALM | {"kv_share": 0.5}
    pool = Pool(
        LatencyPolicy(section()), lambda r, t: busy | {"ttft_p90_s": spike.get(t, 0.9)}, ready=2
    )
    assert set(pool.run(100)) == {2}


def test_a_latency_that_is_the_engines_own_starts_no_replica() -> None:
    policy = LatencyPolicy(section(target_ttft_s=1.0))
    nearly_idle = {"ttft_p90_s": 3.0, "running": 6, "places": 64, "kv_share": 0.1}
    assert settled(policy, 1, **nearly_idle).desired == 1
    assert settled(policy, 1, **(nearly_idle | {"waiting": 1})).desired == 2
    assert settled(policy, 1, **(nearly_idle | {"kv_share": 0.25})).desired == 2


# --- replicas that still load ---------------------------------------------------------------------


def test_while_replicas_load_the_same_latency_counts_by_the_part_that_is_ready() -> None:
    policy = LatencyPolicy(section(max_replicas=64))
    latency = {"itl_p90_s": 0.07, "running": 90, "places": 64}  # 1.4 of its target
    assert settled(policy, 2, starting=1, **latency).desired > 3  # 1.4 x 2/3 = 0.93
    held = settled(policy, 2, starting=4, **latency)  # 1.4 x 2/6 = 0.47
    assert held.desired == 6
    assert "4 still loading" in held.reason


def test_a_step_load_ends_in_a_fleet_of_bounded_size_though_replicas_load_for_minutes() -> None:
    """TTFT is hopeless until enough are ready: a law that ignored those on their way would double
    each minute up to the maximum."""

    def measured(ready: int, now_s: float) -> dict[str, Any]:
        return {"ttft_p90_s": 9.0 if ready < 3 else 0.9, "running": 40 * ready}

    pool = Pool(LatencyPolicy(section(max_replicas=64)), measured, load_s=300.0, tick_s=5.0)
    counts = pool.run(3600)
    assert max(counts) <= 8
    assert direction_changes(counts) == 0


@pytest.mark.parametrize("load_s", [0.0, 60.0, 240.0, 600.0])
@pytest.mark.parametrize("demand", [0.3, 1.1, 2.5, 5.2])
def test_a_steady_load_ends_in_a_steady_fleet(load_s: float, demand: float) -> None:
    """The pool queues where its replicas do not suffice, and its latency rises as they fill."""

    def measured(ready: int, now_s: float) -> dict[str, Any]:
        use = demand / max(ready, 1)
        waiting = 64 * max(0.0, demand - ready) * min(1.0, (now_s - 1000.0) / 60.0)
        return {
            "running": round(64 * min(1.0, use) * ready),
            "waiting": round(waiting),
            "oldest_wait_s": 10.0 if waiting else None,
            "kv_share": 0.7 * min(1.0, use),
            "ttft_p90_s": min(9.0, 0.3 / max(0.02, 1.0 - use)),
            "places": 64,
        }

    pool = Pool(LatencyPolicy(section(max_replicas=16)), measured, load_s=load_s, tick_s=5.0)
    pool.run(2 * 3600)
    counts = pool.run(1800)
    assert len(set(counts)) == 1
    assert demand <= counts[0] <= 2 * demand + 1
    everything = [decision.desired for _, decision in pool.decisions]
    assert direction_changes([1, *everything]) <= 1


def test_replicas_that_load_for_a_load_that_has_gone_are_given_up_one_by_one() -> None:
    pool = Pool(
        LatencyPolicy(section()), lambda r, t: SLOW if t < 1200.0 else CALM, load_s=100_000.0
    )
    assert max(pool.run(200)) >= 3
    pool.run(1800)
    assert pool.provisioned == 1


def test_while_replicas_load_only_a_part_of_the_excess_counts() -> None:
    demand_of_8 = {"running": 410, "places": 64}
    wanted = {
        trust: settled(LatencyPolicy(section(warmup_trust=trust)), 3, starting=1, **demand_of_8)
        for trust in (0.0, 0.5, 1.0)
    }
    assert {trust: decision.desired for trust, decision in wanted.items()} == {
        0.0: 4,
        0.5: 7,
        1.0: 8,
    }


def test_while_replicas_load_latency_alone_asks_for_no_more_than_twice_the_demand() -> None:
    slow = {"ttft_p90_s": 9.0, "running": 40, "places": 64}
    held = settled(LatencyPolicy(section()), 2, starting=1, **slow)
    assert held.desired == 3
    assert "those that load should suffice" in held.reason
    assert settled(LatencyPolicy(section()), 3, **slow).desired > 3


# --- shrinking ------------------------------------------------------------------------------------


def test_it_shrinks_by_one_at_a_time_each_after_two_minutes() -> None:
    pool = Pool(LatencyPolicy(section(min_replicas=2)), lambda r, t: CALM, ready=6)
    counts = pool.run(1200)
    assert counts[-1] == 2
    downs = [moment for moment, _ in pool.decisions]
    assert [d.desired for _, d in pool.decisions] == [5, 4, 3, 2]
    assert all(b - a >= 120.0 for a, b in zip(downs, downs[1:], strict=False))
    assert all("is below 0.40 for 45 s" in d.reason for _, d in pool.decisions)


def test_it_shrinks_only_after_it_has_watched_for_a_window() -> None:
    pool = Pool(LatencyPolicy(section()), lambda r, t: CALM, ready=3)
    assert set(pool.run(30)) == {3}
    assert "not known for 45 s" in pool.tick().reason
    assert 2 in pool.run(30)


def test_it_does_not_shrink_into_a_load_that_would_make_it_grow_again() -> None:
    policy = LatencyPolicy(section())
    half = {"running": 32, "places": 64}  # 0.31 of two, 0.63 of one
    assert settled(policy, 2, running=64 * 8 // 10, places=64).desired == 2
    assert "one fewer would have load" in settled(policy, 2, running=56, places=64).reason
    assert settled(policy, 2, **half).desired == 1


@pytest.mark.parametrize("load", [0.41, 0.45, 0.5, 0.54])
def test_between_the_thresholds_nothing_moves(load: float) -> None:
    measured = {"ttft_p90_s": 2.0 * load, "running": 70, "places": 64}
    assert settled(LatencyPolicy(section()), 3, **measured).desired == 3


def test_it_does_not_shrink_while_one_finishes_its_streams() -> None:
    held = settled(LatencyPolicy(section()), 3, draining=1, **CALM)
    assert held.desired == 3
    assert "1 still finish their streams" in held.reason


def test_it_grows_right_after_it_has_shrunk() -> None:
    measured: dict[str, Any] = dict(CALM)
    pool = Pool(LatencyPolicy(section()), lambda r, t: measured, ready=4)
    while pool.provisioned == 4:
        pool.tick()
    measured |= {"running": 250}
    assert max(pool.run(40)) > 3


def test_without_traffic_a_pool_with_latency_targets_alone_shrinks() -> None:
    only = section(target_kv_share=None, target_places_share=None)
    assert settled(LatencyPolicy(only), 3).desired == 2


def test_what_more_replicas_showed_before_a_step_down_makes_nobody_grow_after_it() -> None:
    """Samples of three replicas count as they are for two, and not half as much again."""
    policy, state = LatencyPolicy(section()), State()
    for tick in range(10):
        signals = Signals(now_s=5.0 * tick, ready=3, running=60, itl_p90_s=0.0195)
        _, state = policy.decide(signals, state)
    decision, _ = policy.decide(replace(signals, now_s=51.0, ready=2), state)
    assert decision.desired == 2


def test_latency_above_the_engines_own_is_taken_to_grow_as_the_rest_gets_more() -> None:
    busy = {"itl_p90_s": 0.0195, "running": 60, "places": 64}  # a load of 0.39
    held = settled(LatencyPolicy(section()), 3, **busy)
    assert held.desired == 3
    assert "one fewer would have load 0.58" in held.reason
    assert settled(LatencyPolicy(section(max_replicas=16)), 16, **busy).desired == 15


def test_the_engines_own_latency_is_learned_and_keeps_no_replica() -> None:
    """An ITL of 0.8 of its target that it has without any load, too."""
    measured: dict[str, Any] = {"itl_p90_s": 0.04, "running": 4, "places": 64, "kv_share": 0.01}
    pool = Pool(LatencyPolicy(section()), lambda r, t: measured, ready=3)
    pool.run(600)
    assert pool.provisioned == 1
    assert pool.state.floor == pytest.approx(0.8)
    measured |= {"itl_p90_s": 0.049, "running": 11}  # little more, of little use
    assert set(pool.run(120)) == {1}
    measured |= {"running": 40}  # now it is the load
    assert max(pool.run(60)) == 2


def test_the_floor_forgets_slowly_what_an_engine_no_longer_is() -> None:
    measured: dict[str, Any] = {"itl_p90_s": 0.01, "running": 4, "places": 64, "kv_share": 0.01}
    pool = Pool(LatencyPolicy(section()), lambda r, t: measured, tick_s=5.0)
    pool.run(60)
    measured |= {"itl_p90_s": 0.02}
    pool.run(60)
    assert pool.state.floor == pytest.approx(0.2, abs=0.01)
    pool.run(5 * 3600)
    assert pool.state.floor == pytest.approx(0.4, abs=0.01)


def test_replicas_that_load_are_waited_for_and_watched_before_the_pool_shrinks() -> None:
    pool = Pool(LatencyPolicy(section()), lambda r, t: SLOW if t < 1010.0 else CALM, load_s=300.0)
    pool.run(290)
    assert pool.provisioned == 2
    assert "they are waited for" in pool.tick().reason
    pool.run(20)
    assert pool.ready == 2
    assert "the last has only just loaded" in pool.tick().reason
    pool.run(60)
    assert pool.provisioned == 1


# --- zero -----------------------------------------------------------------------------------------


def test_the_last_replica_goes_when_nobody_asked_for_long_and_comes_back_for_one_request() -> None:
    measured: dict[str, Any] = dict(NOBODY)
    policy = LatencyPolicy(section(min_replicas=0, idle_s=300.0))
    pool = Pool(policy, lambda r, t: measured, ready=1)
    assert set(pool.run(299)) == {1}
    assert pool.run(10)[-1] == 0
    assert pool.decisions[-1][1].cause == "idle"
    assert "no request for 300 s" in pool.decisions[-1][1].reason
    assert set(pool.run(1000)) == {0}
    measured |= {"waiting": 1, "oldest_wait_s": 0.1}
    decision = pool.tick()
    assert (decision.desired, decision.cause) == (1, "from_zero")
    assert set(pool.run(170)) == {1}


def test_a_refused_request_starts_a_replica_too() -> None:
    policy = LatencyPolicy(section(min_replicas=0, from_zero="refuse"))
    decision, _ = policy.decide(Signals(now_s=1.0, ready=0, turned_away=1), State())
    assert decision.desired == 1
    assert "requests were refused" in decision.reason


def test_one_running_stream_keeps_the_last_replica() -> None:
    policy = LatencyPolicy(section(min_replicas=0, idle_s=60.0))
    pool = Pool(policy, lambda r, t: {"running": 1, "places": 64, "kv_share": 0.01})
    assert set(pool.run(1000)) == {1}


def test_the_last_replica_waits_for_another_that_still_finishes_its_streams() -> None:
    policy = LatencyPolicy(section(min_replicas=0, idle_s=60.0))
    draining = 1
    pool = Pool(policy, lambda r, t: NOBODY | {"draining": draining})
    assert set(pool.run(200)) == {1}
    draining = 0
    assert pool.run(5)[-1] == 0


def test_a_pool_with_a_minimum_of_one_never_goes_to_zero() -> None:
    pool = Pool(LatencyPolicy(section(idle_s=1.0)), lambda r, t: NOBODY)
    assert set(pool.run(1000)) == {1}


def test_the_clock_jumping_ahead_is_no_idle_time() -> None:
    policy = LatencyPolicy(section(min_replicas=0, idle_s=300.0))
    pool = Pool(policy, lambda r, t: NOBODY)
    pool.run(10)
    pool.now_s += 86_400.0
    assert set(pool.run(200)) == {1}


# --- bounds ---------------------------------------------------------------------------------------


def test_bounds_that_change_hold_at_once() -> None:
    up, _ = LatencyPolicy(section(min_replicas=3)).decide(Signals(now_s=1.0, ready=1), State())
    assert (up.desired, up.cause) == (3, "bounds")
    assert up.reason == "goes from 1 to 3: min_replicas is 3"
    down, _ = LatencyPolicy(section(max_replicas=2)).decide(Signals(now_s=1.0, ready=5), State())
    assert down.desired == 2


def test_at_its_maximum_it_says_what_it_would_want() -> None:
    decision = settled(LatencyPolicy(section(max_replicas=2)), 2, **SLOW)
    assert decision.desired == 2
    assert "but max_replicas is 2" in decision.reason


# --- what cannot be known -------------------------------------------------------------------------


def test_a_pool_that_nobody_sees_holds_and_shrinks_only_a_window_later() -> None:
    seen = True
    pool = Pool(LatencyPolicy(section()), lambda r, t: CALM | {"known": seen}, ready=4)
    pool.run(30)
    seen = False
    assert set(pool.run(600)) == {4}
    assert pool.tick().cause == "blind"
    seen = True
    assert set(pool.run(35)) == {4}
    assert 3 in pool.run(30)


def test_an_outage_of_the_figures_does_not_let_it_double_again_within_the_minute() -> None:
    seen = True
    pool = Pool(LatencyPolicy(section()), lambda r, t: SLOW | {"known": seen}, load_s=0.0)
    while pool.provisioned == 1:
        pool.tick()
    seen = False
    pool.run(5)
    seen = True
    assert set(pool.run(50)) == {2}


def test_a_clock_that_goes_back_neither_moves_it_nor_frees_it() -> None:
    pool = Pool(LatencyPolicy(section()), lambda r, t: SLOW, load_s=0.0)
    while pool.provisioned == 1:
        pool.tick()
    pool.now_s -= 5000.0
    assert set(pool.run(58)) == {2}
    assert 4 in pool.run(60)
    calm = Pool(LatencyPolicy(section()), lambda r, t: CALM, ready=4)
    while calm.provisioned == 4:
        calm.tick()
    calm.now_s -= 5000.0
    assert set(calm.run(118)) == {3}
    assert 2 in calm.run(10)


@pytest.mark.parametrize(
    "kept",
    [
        None,
        [],
        "state",
        {},
        {"version": 0, "samples": "many"},
        State(idle_s=5.0).to_json() | {"version": 0},
        {"version": 1},
        State().to_json() | {"samples": [[1.0, 2]]},
        State().to_json() | {"samples": [[1.0, 2, 2, "much", None]]},
        State().to_json() | {"last_up_s": "yesterday"},
        State().to_json() | {"idle_s": math.nan},
    ],
)
def test_a_state_that_is_none_is_forgotten(kept: object) -> None:
    assert State.from_json(kept) == State()


def test_a_state_survives_json() -> None:
    pool = Pool(LatencyPolicy(section()), lambda r, t: SLOW)
    pool.run(100)
    state = pool.state
    assert state.last_up_s is not None
    assert state.samples
    assert State.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_deciding_ten_times_a_second_keeps_a_small_state() -> None:
    pool = Pool(LatencyPolicy(section()), lambda r, t: CALM, ready=4, tick_s=0.1)
    pool.run(90)
    assert len(pool.state.samples) <= 61
    assert pool.provisioned == 3


def test_at_any_pace_of_calls_the_fleet_grows_as_far_and_shrinks_again() -> None:
    highest = {}
    for tick_s in (0.2, 1.0, 5.0):
        pool = Pool(LatencyPolicy(section()), lambda r, t: SLOW if t < 1150 else CALM, load_s=60)
        pool.tick_s = tick_s
        counts = pool.run(1300)
        highest[tick_s] = max(counts)
        assert counts[-1] == 1
    assert min(highest.values()) >= 5
    assert max(highest.values()) - min(highest.values()) <= 1


anything = st.one_of(
    st.none(),
    st.floats(allow_nan=True, allow_infinity=True),
    st.integers(min_value=-(10**30), max_value=10**30),
)


def test_a_share_beyond_all_reason_stays_within_the_bounds_and_in_the_state() -> None:
    told = Signals(now_s=1.0, ready=2, running=1, kv_share=1.4e308)
    decision, state = LatencyPolicy(section()).decide(told, State())
    assert decision.desired <= 8
    assert State.from_json(json.loads(json.dumps(state.to_json()))) == state


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_whatever_it_is_told_it_answers_within_its_bounds(data: st.DataObject) -> None:
    low = data.draw(st.integers(0, 3))
    limits = section(min_replicas=low, max_replicas=low + data.draw(st.integers(1, 5)))
    policy, state = LatencyPolicy(limits), State()
    names = ("starting", "draining", "waiting", "waiting_tokens", "oldest_wait_s", "running")
    names = (*names, "kv_share", "ttft_p90_s", "itl_p90_s", "places", "turned_away")
    for _ in range(data.draw(st.integers(1, 6))):
        told: dict[str, Any] = {name: data.draw(anything) for name in names}
        signals = Signals(now_s=data.draw(anything), ready=data.draw(anything), **told)
        decision, state = policy.decide(signals, state)
        assert limits.min_replicas <= decision.desired <= limits.max_replicas
        assert decision.reason.isprintable()
        assert "nan" not in decision.reason
        assert State.from_json(json.loads(json.dumps(state.to_json()))) == state


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 200), st.integers(0, 50), st.floats(0.0, 5.0)), min_size=1),
    st.integers(1, 8),
)
def test_it_never_steps_down_by_more_than_one(
    loads: list[tuple[int, int, float]], ready: int
) -> None:
    policy, state = LatencyPolicy(section(min_replicas=0, idle_s=30.0)), State()
    now_s = 0.0
    last_down_s = -math.inf
    for running, waiting, ttft_s in loads:
        for _ in range(40):
            now_s += 5.0
            signals = Signals(
                now_s=now_s,
                ready=ready,
                running=running,
                waiting=waiting,
                ttft_p90_s=ttft_s,
                places=16,
            )
            decision, state = policy.decide(signals, state)
            assert decision.desired >= ready - 1
            if decision.desired < ready and decision.cause != "idle":
                assert now_s - last_down_s >= 120.0
                last_down_s = now_s
            ready = decision.desired
