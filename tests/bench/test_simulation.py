"""The simulator of fleets: its engine, its queue against theory, its peers against their source."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.autoscaling_policy import (
    _apply_autoscaling_config,
    replica_queue_length_autoscaling_policy,
)
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from bench.simulation.arrivals import Trace, arrivals, mean_lengths, traces, usual
from bench.simulation.command import SCALERS, main, scaler, simulate
from bench.simulation.engine import EngineModel, Replica, Request
from bench.simulation.fleet import Fleet, FleetModel
from bench.simulation.policies import Fixed, Oracle, Ours, ServeDefault
from bench.simulation.report import Slo
from serve_app.autoscaling.signals import Signals
from serve_app.autoscaling_settings import AutoscalingSection

PLAIN = EngineModel(
    prefill_tokens_per_s=1000.0,
    prefill_share=0.5,
    step_s=0.1,
    step_per_sequence_s=0.01,
    places=4,
    kv_tokens=10_000,
)


def finish(replica: Replica) -> float:
    """Run a replica until it is empty; the time of the last event."""
    now_s = 0.0
    while replica.held:
        now_s = replica.next_s()
        replica.advance(now_s)
    return now_s


# --- the engine -----------------------------------------------------------------------------------


def test_one_request_alone_takes_its_prefill_and_its_steps() -> None:
    replica, request = Replica(1, PLAIN, 0.0), Request(0.0, 500.0, 11.0)
    replica.place(request, 0.0)
    assert replica.kv_used == 511.0
    assert finish(replica) == pytest.approx(0.5 + 10 * 0.11)
    assert request.ttft_s == pytest.approx(0.5)
    assert request.itl_s == pytest.approx(0.11)
    assert replica.kv_used == 0.0


def test_two_that_decode_slow_each_other_down_by_the_batch() -> None:
    replica = Replica(1, PLAIN, 0.0)
    both = [Request(0.0, 0.0, 11.0), Request(0.0, 0.0, 21.0)]
    for request in both:
        replica.place(request, 0.0)
    assert finish(replica) == pytest.approx(10 * 0.12 + 10 * 0.11)
    assert both[0].done_s == pytest.approx(10 * 0.12)


def test_a_prompt_beside_a_stream_shares_its_steps() -> None:
    replica, stream = Replica(1, PLAIN, 0.0), Request(0.0, 0.0, 101.0)
    replica.place(stream, 0.0)
    replica.advance(replica.next_s())
    prompt = Request(0.0, 100.0, 1.0)
    replica.place(prompt, 0.0)
    assert finish(replica) == pytest.approx(0.2 + (100 - 0.2 / 0.22) * 0.11)
    assert prompt.ttft_s == pytest.approx(0.2)  # half of 1,000 tokens a second


def test_a_replica_takes_no_more_than_its_places_and_its_kv() -> None:
    replica = Replica(1, PLAIN, 0.0)
    assert not replica.has_room(Request(0.0, 9_000.0, 1_001.0))
    for _ in range(PLAIN.places):
        assert replica.has_room(Request(0.0, 10.0, 10.0))
        replica.place(Request(0.0, 10.0, 10.0), 0.0)
    assert not replica.has_room(Request(0.0, 10.0, 10.0))


# --- the fleet ------------------------------------------------------------------------------------


def erlang_c(servers: int, busy: float) -> float:
    """The part of arrivals that wait in M/M/c, at `busy` servers' worth of load."""
    terms = [busy**k / math.factorial(k) for k in range(servers)]
    last = busy**servers / math.factorial(servers) * servers / (servers - busy)
    return last / (sum(terms) + last)


def waits_of(replicas: int, places: int, share: float, count: int) -> list[float]:
    """Seconds that each request waited: Poisson arrivals, exponential service of one second on
    average, first come first served (M/M/c)."""
    engine = EngineModel(step_s=0.01, step_per_sequence_s=0.0, places=places, kv_tokens=10**12)
    numbers = random.Random(7)

    def come() -> Iterator[Request]:
        now_s = 0.0
        for _ in range(count):
            now_s += numbers.expovariate(replicas * places * share)
            yield Request(now_s, 0.0, 1.0 + numbers.expovariate(1.0) / engine.step_s)

    model = FleetModel(engine=engine, tick_s=1e9, max_queued=10**9, max_wait_s=1e9)
    run = Fleet(model, Fixed(replicas)).run(come(), 1e9)
    assert len(run.served) == count
    by_arrival = sorted(run.served, key=lambda request: request.arrived_s)
    return [(request.placed_s or 0.0) - request.arrived_s for request in by_arrival]


@pytest.mark.heavy
@pytest.mark.parametrize(("places", "share"), [(1, 0.5), (2, 0.6), (3, 0.6), (4, 0.6)])
def test_without_prefill_and_at_constant_steps_it_is_the_queue_of_the_books(
    places: int, share: float
) -> None:
    waits = waits_of(1, places, share, 25_000)
    waiting = erlang_c(places, places * share)
    theory_s = waiting / (places * (1.0 - share))
    assert sum(waits) / len(waits) == pytest.approx(theory_s, rel=0.10)
    assert sum(wait > 1e-9 for wait in waits) / len(waits) == pytest.approx(waiting, rel=0.05)


def test_as_many_places_on_one_replica_or_on_several_are_the_same_queue() -> None:
    alone = waits_of(1, 8, 0.75, 3000)
    assert max(alone) > 1.0
    assert waits_of(2, 4, 0.75, 3000) == pytest.approx(alone, abs=1e-6)
    assert waits_of(8, 1, 0.75, 3000) == pytest.approx(alone, abs=1e-6)


@pytest.mark.parametrize("name", SCALERS)
@pytest.mark.parametrize("trace_name", ["burst", "gaps", "heavy-tailed"])
def test_no_request_is_lost_and_none_is_served_twice(name: str, trace_name: str) -> None:
    model, horizon_s = FleetModel(load_s=60.0), 2700.0
    trace = next(t for t in traces(0.75) if t.name == trace_name)
    requests = list(arrivals(trace, model.engine, 2, horizon_s, seed=3))
    decides = scaler(name, model, 2, requests, horizon_s, Slo())
    fleet = Fleet(model, decides)
    run = fleet.run(requests, horizon_s)
    ended = [id(request) for request in (*run.served, *run.refused)]
    assert len(set(ended)) == len(ended)
    assert len(ended) + run.unfinished == len(requests) > 1000
    for request in run.served:
        assert request.placed_s is not None
        assert request.first_s is not None
        assert request.done_s is not None
        assert request.arrived_s <= request.placed_s <= request.first_s <= request.done_s
    for replica in (*fleet._ready, *fleet._draining):
        assert replica.kv_used == pytest.approx(
            sum(r.kv_tokens for r in (*replica._prefilling, *(d[2] for d in replica._decoding)))
        )


def test_a_run_is_the_same_each_time_and_another_seed_gives_another() -> None:
    runs = [
        simulate("diurnal", 2, "IntServe", FleetModel(load_s=60.0), 0.25, seed, Slo())[0]
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_a_replica_that_is_given_up_finishes_what_it_holds_and_costs_until_then() -> None:
    class Shrinks:
        name = "shrinks"

        def start(self) -> int:
            return 2

        def target(self, signals: Signals) -> int:
            return 1

    requests = [Request(0.0, 100.0, 101.0) for _ in range(2)]
    model = FleetModel(engine=PLAIN, tick_s=1.0)
    run = Fleet(model, Shrinks()).run(requests, 100.0)
    assert len(run.served) == 2
    drained_s = max(request.done_s or 0.0 for request in run.served)
    assert run.replica_s == pytest.approx(100.0 + drained_s)
    assert run.targets == [(0.0, 2), (1.0, 1)]


def test_a_replica_serves_only_after_it_has_loaded_and_costs_from_the_start() -> None:
    class FromZero:
        name = "from zero"

        def start(self) -> int:
            return 0

        def target(self, signals: Signals) -> int:
            assert signals.ready + signals.starting <= 1
            return 1 if signals.waiting or signals.provisioned else 0

    request = Request(5.0, 100.0, 2.0)
    model = FleetModel(engine=PLAIN, tick_s=1.0, load_s=100.0, max_wait_s=1.0)
    run = Fleet(model, FromZero()).run([request], 300.0)
    assert run.served == [request]
    assert request.placed_s is not None
    assert 5.0 + 90.0 <= request.placed_s <= 6.0 + 110.0
    assert run.replica_s == pytest.approx(300.0 - 5.0, abs=1.0)


# --- who decides ----------------------------------------------------------------------------------


def test_serves_default_policy_decides_as_ray_does() -> None:
    """Against Ray's own functions, over random loads; Serve's mean over its look-back, which Ray
    computes elsewhere, is given to both."""
    config = AutoscalingConfig(
        min_replicas=0, max_replicas=12, target_ongoing_requests=10, downscale_delay_s=60.0
    )
    ray_policy = _apply_autoscaling_config(replica_queue_length_autoscaling_policy)
    for seed in range(5):
        numbers = random.Random(seed)
        mine = ServeDefault(
            minimum=0,
            maximum=12,
            start=1,
            target_ongoing_requests=10,
            look_back_s=0.0,
            downscale_delay_s=60.0,
        )
        ready, target, requests = 1, 1, 0
        state: dict[str, Any] = {}
        targets = []
        for tick in range(600):
            now_s = 1e9 + 2.0 * tick
            if numbers.random() < 0.05:
                requests = numbers.choice([0, 0, 3, 30, 80, 200])
            if numbers.random() < 0.2:
                ready = target  # those that loaded are there
            context: Any = AutoscalingContext(
                deployment_id=None,
                deployment_name="engine",
                app_name="app",
                current_num_replicas=min(ready, target),
                target_num_replicas=target,
                running_replicas=[],
                total_num_requests=float(requests),
                total_queued_requests=0.0,
                aggregated_metrics={},
                raw_metrics={},
                capacity_adjusted_min_replicas=0,
                capacity_adjusted_max_replicas=12,
                policy_state=dict(state),
                last_scale_up_time=None,
                last_scale_down_time=None,
                current_time=now_s,
                config=config,
            )
            ready = min(ready, target)
            theirs, state = _with_clock(ray_policy, context, now_s)
            theirs = max(0, min(12, math.ceil(theirs)))
            signals = Signals(now_s=now_s, ready=ready, starting=target - ready, running=requests)
            assert mine.target(signals) == theirs, (seed, tick)
            target = theirs
            targets.append(target)
        assert len(set(targets)) > 3


def _with_clock(policy: Any, context: Any, now_s: float) -> tuple[float, dict[str, Any]]:
    """Call it with Serve's clock, which is the system's, at `now_s`."""
    with pytest.MonkeyPatch.context() as patch:
        clock = SimpleNamespace(time=lambda: now_s)
        patch.setattr("ray.serve.autoscaling_policy.time", clock)
        result: tuple[float, dict[str, Any]] = policy(context)
        return result


def test_the_oracle_has_loaded_what_it_needs_before_it_is_needed() -> None:
    """Nothing until the 1,000th second, then two replicas' worth."""
    model = EngineModel(step_s=0.1, step_per_sequence_s=0.0, places=10, kv_tokens=10**9)
    requests = [Request(1000.0 + i / 1.4, 0.0, 101.0) for i in range(840)]  # 14 places of 10
    plan = Oracle(requests, model, minimum=1, maximum=4, load_s=100.0, horizon_s=2000.0)
    at = {t: plan.target(Signals(now_s=float(t), ready=1)) for t in (0, 800, 910, 1300, 1700)}
    assert at == {0: 1, 800: 1, 910: 2, 1300: 2, 1700: 1}


def test_our_scaler_is_the_policy_of_the_service() -> None:
    from serve_app.autoscaling import policy

    ours = Ours(AutoscalingSection(max_replicas=3), 1)
    assert type(ours._policy) is policy.LatencyPolicy


def test_a_trace_has_the_rate_that_it_says() -> None:
    model = EngineModel()
    trace = Trace(name="half", says="", load=lambda _: 0.5, peak=1.0, lengths=usual)
    came = sum(1 for _ in arrivals(trace, model, 8, 1800.0, seed=0))
    expected = 0.5 * 8 * model.rate(*mean_lengths(usual)) * 1800.0
    assert came == pytest.approx(expected, rel=0.03)


@pytest.mark.heavy
def test_the_command_prints_a_row_for_each_run(capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--hours", "0.05", "--nodes", "1", "2", "--traces", "poisson"]
    assert main(short) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 2 * len(SCALERS)
    assert all(row.count("|") == 13 for row in rows)
    assert main([*short, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2 * len(SCALERS)
