"""Who decides how many replicas there are: our policy, Serve's, a fixed fleet, an oracle."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Protocol

from serve_app.autoscaling.policy import LatencyPolicy
from serve_app.autoscaling.signals import Signals, State
from serve_app.autoscaling_settings import AutoscalingSection

from .engine import EngineModel, Request


class Scaler(Protocol):
    """Decides once per tick."""

    name: str

    def start(self) -> int:
        """The replicas that are there, loaded, at the beginning."""
        ...

    def target(self, signals: Signals) -> int:
        """The replicas that there should be."""
        ...


class Ours:
    """The policy of `serve_app/autoscaling`, the very object that Serve's controller asks."""

    name = "IntServe"

    def __init__(self, section: AutoscalingSection, start: int) -> None:
        self._policy = LatencyPolicy(section)
        self._state = State()
        self._start = start

    def start(self) -> int:
        return self._start

    def target(self, signals: Signals) -> int:
        decision, self._state = self._policy.decide(signals, self._state)
        return decision.desired


class ServeDefault:
    """`replica_queue_length_autoscaling_policy` of Ray 2.60 with what Serve applies around it.

    After the module `ray.serve.autoscaling_policy`: `_core_replica_queue_length_policy`,
    `_get_cold_start_scale_up_replicas`, `_apply_scaling_factors` (factors of one, the default) and
    `_apply_delay_logic`; the bounds after `DeploymentAutoscalingState.apply_bounds`. Delays are
    Serve's defaults (30 s up, 600 s down), and so is the mean over 30 s. The target is not: Serve's
    two requests per replica would keep every cluster at its maximum, so it gets the same share of
    places as our policy. It is shown waiting requests too, which Serve itself counts only where
    they wait in its own handles.
    """

    name = "Serve default"

    def __init__(
        self,
        *,
        minimum: int,
        maximum: int,
        start: int,
        target_ongoing_requests: float,
        look_back_s: float = 30.0,
        upscale_delay_s: float = 30.0,
        downscale_delay_s: float = 600.0,
    ) -> None:
        self._bounds = minimum, maximum
        self._start = start
        self._ongoing = target_ongoing_requests
        self._look_back_s = look_back_s
        self._upscale_delay_s = upscale_delay_s
        self._downscale_delay_s = downscale_delay_s
        self._samples: deque[tuple[float, float]] = deque()
        self._direction = 0
        self._since_s: float | None = None

    def start(self) -> int:
        return self._start

    def target(self, signals: Signals) -> int:
        now_s, current, target = signals.now_s, signals.ready, signals.provisioned
        total = self._mean_requests(now_s, signals.running + signals.waiting)
        if current == 0:
            desired = max(1, target) if total > 0 else target
            return self._bounded(desired if desired > 0 else self._delayed(0, target, now_s))
        desired = math.ceil(current * total / (self._ongoing * current) - 1e-9)
        return self._bounded(self._delayed(desired, target, now_s))

    def _mean_requests(self, now_s: float, requests: float) -> float:
        self._samples.append((now_s, requests))
        while now_s - self._samples[0][0] > self._look_back_s:
            self._samples.popleft()
        return math.fsum(count for _, count in self._samples) / len(self._samples)

    def _delayed(self, desired: int, target: int, now_s: float) -> int:
        direction = (desired > target) - (desired < target)
        if direction != self._direction or self._since_s is None:
            self._direction, self._since_s = direction, now_s
        if direction == 0:
            return target
        if direction < 0 and target > 1:
            desired = max(1, desired)  # to zero only from one
        delay_s = self._upscale_delay_s if direction > 0 else self._downscale_delay_s
        if now_s - self._since_s + 1e-6 < delay_s:
            return target
        self._since_s = None
        return desired

    def _bounded(self, desired: int) -> int:
        minimum, maximum = self._bounds
        return max(minimum, min(maximum, desired))


class Fixed:
    """Always the same."""

    name = "fixed"

    def __init__(self, replicas: int) -> None:
        self._replicas = replicas

    def start(self) -> int:
        return self._replicas

    def target(self, signals: Signals) -> int:
        return self._replicas


class Oracle:
    """Knows every request before it comes, and how long its answer will be.

    From the requests it reckons how many replicas each bin of time needs so that four fifths of
    the places (or of the KV, or of the prefill) are taken, and has them loaded by then; it keeps
    those that it will need again before a new one could have loaded. It is a plan, no proof: a
    better one may exist.
    """

    name = "oracle"
    BIN_S = 10.0
    SHARE = 0.8

    def __init__(
        self,
        requests: Sequence[Request],
        model: EngineModel,
        *,
        minimum: int,
        maximum: int,
        load_s: float,
        horizon_s: float,
    ) -> None:
        bins = math.ceil(horizon_s / self.BIN_S) + 1
        places, kv, prefill = [0.0] * (bins + 1), [0.0] * (bins + 1), [0.0] * bins
        mean_prompt = sum(r.prompt for r in requests) / max(1, len(requests))
        mean_output = sum(r.output for r in requests) / max(1, len(requests))
        busy = model.rate(mean_prompt, mean_output) * mean_prompt if requests else 0.0
        for request in requests:
            stays_s = model.residence_s(request.prompt, request.output, busy)
            first = int(request.arrived_s / self.BIN_S)
            last = min(bins - 1, int((request.arrived_s + stays_s) / self.BIN_S))
            # Its place is taken for a part of each bin: spread over whole bins at both ends.
            weight = min(1.0, stays_s / ((last - first + 1) * self.BIN_S))
            places[first] += weight
            places[last + 1] -= weight
            kv[first] += weight * request.kv_tokens
            kv[last + 1] -= weight * request.kv_tokens
            prefill[first] += request.prompt
        per_bin = model.prefill_tokens_per_s * model.prefill_share * self.BIN_S
        needed: list[int] = []
        held = tokens = 0.0
        for index in range(bins):
            held += places[index]
            tokens += kv[index]
            full = max(held / model.places, tokens / model.kv_tokens, prefill[index] / per_bin)
            needed.append(max(minimum, min(maximum, math.ceil(full / self.SHARE - 1e-6))))
        ahead = math.ceil((load_s + self.BIN_S) / self.BIN_S)
        self._plan = [max(needed[i : i + ahead + 1]) for i in range(bins)]

    def start(self) -> int:
        return self._plan[0]

    def target(self, signals: Signals) -> int:
        return self._plan[min(len(self._plan) - 1, int(signals.now_s / self.BIN_S))]
