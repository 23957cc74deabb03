"""Drives an autoscaling policy through time without Ray."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from serve_app.autoscaling.policy import LatencyPolicy
from serve_app.autoscaling.signals import Decision, Signals, State
from serve_app.autoscaling_settings import AutoscalingSection
from serve_app.routing.admission_stats import PoolStats


def section(**keys: Any) -> AutoscalingSection:
    """A section of at most eight replicas, unless `keys` say otherwise."""
    return AutoscalingSection.model_validate({"max_replicas": 8} | keys)


def figures(**values: Any) -> PoolStats:
    """What the owner of admission tells of a pool where nobody asks, but for `values`."""
    calm: dict[str, Any] = {
        "pool": "default",
        "ready": 1,
        "waiting": 0,
        "waiting_tokens": 0,
        "oldest_wait_s": 0.0,
        "running": 0,
        "kv_share": 0.0,
        "places_share": 0.0,
        "ttft_p90_s": None,
        "itl_p90_s": None,
    }
    return PoolStats(**(calm | values))


@dataclass
class Pool:
    """A pool whose replicas load for `load_s` seconds, driven by a policy once per `tick_s`.

    `measured` gives what the pool shows of itself from the ready replicas and the time.
    """

    policy: LatencyPolicy
    measured: Callable[[int, float], dict[str, Any]]
    ready: int = 1
    load_s: float = 180.0
    tick_s: float = 1.0
    now_s: float = 1000.0
    due: list[float] = field(default_factory=list)
    state: State = field(default_factory=State)
    decisions: list[tuple[float, Decision]] = field(default_factory=list)

    @property
    def provisioned(self) -> int:
        return self.ready + len(self.due)

    def tick(self) -> Decision:
        self.now_s += self.tick_s
        arrived = [moment for moment in self.due if moment <= self.now_s]
        self.due = [moment for moment in self.due if moment > self.now_s]
        self.ready += len(arrived)
        signals = Signals(
            now_s=self.now_s,
            ready=self.ready,
            starting=len(self.due),
            **self.measured(self.ready, self.now_s),
        )
        decision, self.state = self.policy.decide(signals, self.state)
        moved = decision.desired - self.provisioned
        if moved > 0:
            self.due += [self.now_s + self.load_s] * moved
        for _ in range(-moved):
            if self.due:
                self.due.pop()
            else:
                self.ready -= 1
        if moved:
            self.decisions.append((self.now_s, decision))
        return decision

    def run(self, seconds: float) -> list[int]:
        """The replicas, provisioned ones, after each tick."""
        return [self.tick() and self.provisioned for _ in range(round(seconds / self.tick_s))]


def direction_changes(counts: list[int]) -> int:
    """How often the count turns from growing to shrinking or back."""
    moves = [b - a for a, b in zip(counts, counts[1:], strict=False) if b != a]
    return sum((a > 0) != (b > 0) for a, b in zip(moves, moves[1:], strict=False))
