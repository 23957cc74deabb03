"""The policy as Serve's controller calls it: with Serve's own context and wrapper, without Ray."""

from __future__ import annotations

import json
import logging
import pickle
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.config import DeploymentConfig
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext
from support.scaling import figures, section

from serve_app.autoscaling.announcer import GAUGES, MOVES, Announcer
from serve_app.autoscaling.serve_policy import POLICY, ServePolicy, autoscaling_options


@dataclass
class Metrics:
    """Stands in for `ray.util.metrics`."""

    set_: list[tuple[str, float]] = field(default_factory=list)
    counted: list[dict[str, str]] = field(default_factory=list)

    def Gauge(self, name: str, description: str, tag_keys: tuple[str, ...]) -> Any:
        assert description
        assert tag_keys
        return SimpleNamespace(set=lambda value, tags: self.set_.append((name, value)))

    def Counter(self, name: str, description: str, tag_keys: tuple[str, ...]) -> Any:
        assert name == MOVES
        assert description

        def inc(tags: dict[str, str]) -> None:
            assert set(tags) == set(tag_keys)
            self.counted.append(tags)

        return SimpleNamespace(inc=inc)


@dataclass
class Controller:
    """Calls a policy as Serve's controller does, and acts on it: replicas are there at once."""

    options: dict[str, Any]
    shown: Any = None
    now_s: float = 1e9
    running: int = 0
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self) -> None:
        self.config: AutoscalingConfig = self.options["autoscaling_config"]
        kwargs = json.loads(json.dumps(self.config.policy.policy_kwargs))
        reader: Any = SimpleNamespace(latest=lambda: self.shown)
        made = self.config.policy.get_policy()
        announcer = Announcer("app", kwargs["pool"], self.metrics)
        self.policy = _apply_autoscaling_config(made(**kwargs, reader=reader, announcer=announcer))
        self.target = self.config.initial_replicas or 0
        self.state: dict[str, Any] = {}

    def tick(self, seconds: float = 1.0) -> int:
        self.now_s += seconds
        ctx = AutoscalingContext(
            deployment_id=None,
            deployment_name="engine-standard",
            app_name="app",
            current_num_replicas=self.running,
            target_num_replicas=self.target,
            running_replicas=[],
            total_num_requests=0.0,
            total_queued_requests=0.0,
            aggregated_metrics={},
            raw_metrics={},
            capacity_adjusted_min_replicas=self.config.min_replicas,
            capacity_adjusted_max_replicas=self.config.max_replicas,
            policy_state=dict(self.state),
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=self.now_s,
            config=self.config,
        )
        desired, self.state = self.policy(ctx)
        json.dumps(self.state)
        self.target = max(self.config.min_replicas, min(self.config.max_replicas, desired))
        return self.target

    def run(self, seconds: int) -> list[int]:
        targets = []
        for _ in range(seconds):
            targets.append(self.tick())
            self.running = self.target
        return targets


def controller(initial: int = 1, **keys: Any) -> Controller:
    options = autoscaling_options("standard", section(**keys), initial_replicas=initial, places=64)
    return Controller(options)


def test_serve_applies_the_decision_of_a_step_up_in_the_same_tick() -> None:
    serve = controller()
    serve.running = 1
    serve.shown = figures(running=64, waiting=40, oldest_wait_s=3.0)
    assert serve.tick() == 2


def test_serve_shrinks_it_by_one_at_a_time_without_a_delay_of_its_own() -> None:
    serve = controller(initial=4)
    serve.shown = figures(running=2, kv_share=0.01)
    targets = serve.run(500)
    assert [targets[i] for i in range(1, 500) if targets[i] != targets[i - 1]] == [3, 2, 1]


def test_before_anything_is_there_or_known_it_holds_what_serve_works_toward() -> None:
    serve = controller(initial=3)
    assert [serve.tick() for _ in range(20)] == [3] * 20
    serve.shown = figures()
    assert [serve.tick() for _ in range(20)] == [3] * 20


def test_from_zero_and_back() -> None:
    serve = controller(min_replicas=0, idle_s=100.0)
    serve.shown = figures()
    assert serve.run(120)[-1] == 0
    assert serve.run(50)[-1] == 0
    serve.shown = figures(waiting=1, oldest_wait_s=0.1)
    assert serve.tick() == 1
    serve.running = 1
    serve.shown = figures(running=1)
    assert set(serve.run(300)) == {1}


def test_a_refused_request_starts_a_replica() -> None:
    serve = controller(min_replicas=0, idle_s=10.0, from_zero="refuse")
    serve.shown = figures()
    assert serve.run(20)[-1] == 0
    serve.shown = figures(turned_away=1)
    assert serve.tick() == 1


def test_while_nobody_knows_the_figures_nothing_shrinks() -> None:
    serve = controller(initial=4)
    assert set(serve.run(400)) == {4}


def test_what_goes_wrong_inside_holds_the_pool_and_does_not_reach_serve(
    caplog: pytest.LogCaptureFixture,
) -> None:
    serve = controller(initial=2)
    serve.shown = SimpleNamespace()  # has no figures at all
    with caplog.at_level(logging.INFO, logger="ray.serve"):
        assert set(serve.run(5)) == {2}
    assert [record.getMessage() for record in caplog.records] == [
        "autoscaling of standard failed; it holds what it has"
    ]
    serve.shown = figures(running=64, waiting=40, oldest_wait_s=3.0)
    assert serve.tick() > 2


def test_a_state_that_another_version_left_is_no_obstacle() -> None:
    serve = controller(initial=2)
    serve.state = {"intserve": {"version": 99}, "other": 1}
    serve.shown = figures(running=2)
    assert serve.run(60)[-1] == 1


def test_each_change_of_mind_is_one_line_that_says_why(caplog: pytest.LogCaptureFixture) -> None:
    serve = controller(initial=2)
    serve.running = 2
    serve.shown = figures(running=2, kv_share=0.01)
    with caplog.at_level(logging.INFO, logger="ray.serve"):
        serve.run(60)
        serve.shown = figures(running=120, kv_share=0.9)
        serve.run(60)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 3
    assert lines[1].startswith("autoscaling of app/standard goes from 2 to 1: 2 running")
    assert lines[2].startswith("autoscaling of app/standard goes from 1 to 2: 120 running")


def test_decisions_are_metrics_by_cause_and_direction() -> None:
    serve = controller(initial=2)
    serve.running = 2
    serve.shown = figures(running=120, kv_share=0.9)
    serve.run(3)
    assert serve.metrics.counted[0] == {
        "application": "app",
        "pool": "standard",
        "cause": "places",
        "direction": "up",
    }
    shown = dict(serve.metrics.set_)
    assert shown["intserve_autoscaling_desired_replicas"] == 3.0
    assert shown["intserve_autoscaling_blind"] == 0.0
    assert shown["intserve_autoscaling_demand_replicas"] == pytest.approx(3.38)
    assert set(shown) == set(GAUGES)


def test_a_gauge_that_does_not_change_is_not_set_again() -> None:
    serve = controller(initial=1)
    serve.running = 1
    serve.shown = figures(running=32)
    serve.run(20)
    assert len(serve.metrics.set_) == len(GAUGES)


def test_the_options_leave_serve_nothing_to_add_but_the_bounds() -> None:
    options = autoscaling_options(
        "long", section(min_replicas=0, max_replicas=3), initial_replicas=9, places=16
    )
    assert set(options) == {"autoscaling_config"}
    config = options["autoscaling_config"]
    assert (config.min_replicas, config.initial_replicas, config.max_replicas) == (0, 3, 3)
    assert (config.upscale_delay_s, config.downscale_delay_s) == (0.0, 0.0)
    assert config.downscale_to_zero_delay_s == 0.0
    assert (config.get_upscaling_factor(), config.get_downscaling_factor()) == (1.0, 1.0)
    assert config.policy.policy_function == POLICY
    again = json.loads(json.dumps(config.policy.policy_kwargs))
    assert ServePolicy(**again)._policy.settings == section(min_replicas=0, max_replicas=3)


def test_what_serve_pickles_by_value_finds_the_modules_that_keep_state() -> None:
    config = controller().config
    made = pickle.loads(config.policy.get_serialized_policy_def())
    assert made.__name__ == "ServePolicy"
    assert made.__call__.__globals__["Announcer"] is Announcer


def test_the_options_survive_the_way_to_serves_controller() -> None:
    """Zero delays and the arguments of the policy, as protobuf carries them."""
    given = autoscaling_options("long", section(min_replicas=0), initial_replicas=1, places=16)
    sent = DeploymentConfig(max_ongoing_requests=32, **given).to_proto_bytes()
    config = DeploymentConfig.from_proto_bytes(sent).autoscaling_config
    assert config is not None
    assert (config.upscale_delay_s, config.downscale_delay_s) == (0.0, 0.0)
    assert config.downscale_to_zero_delay_s == 0.0
    made = config.policy.get_policy()(**config.policy.policy_kwargs)
    assert made._policy.settings == section(min_replicas=0)
    assert made._places == 16
