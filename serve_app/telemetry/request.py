"""One request as the operator sees it: its SERVER span, its metrics, its line in the access log.

openai/service.py reports to it what happens (`describe`, `entered`, `placed`, `event`, `finish`);
it is finished exactly once. It decides nothing and never sees the text of a prompt or an answer.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import Headers

from serve_app.engines.events import cached_prompt_tokens
from serve_app.engines.protocol import Done, Event, GenerateRequest, Placed, Tokens
from serve_app.errors import ApiError, code_label
from serve_app.telemetry.access_log import AccessLog
from serve_app.telemetry.metrics import RequestMetrics
from serve_app.telemetry.tracing import (
    Telemetry,
    incoming_carrier,
    propagate,
    set_error,
    trace_id,
)

#: Replicas that a line names, the last ones.
_MAX_REPLICAS = 16


@dataclass(slots=True)
class _Choice:
    """Where a choice runs: the last attempt, its replica and pool and since when (on the clock of
    spans), the tokens that had come before it, and in how many parts, each from one replica, they
    come."""

    attempt: int = 0
    replica_id: str = ""
    pool: str = ""
    placed_ns: int = 0
    seam: int = 0
    num_parts: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who asks: the key's name, None where none was right, and the address, None if unknown."""

    key: str | None
    address: str | None = None


@dataclass(slots=True)
class Sinks:
    """Where the observations of one ingress go. `ingress` is its name."""

    telemetry: Telemetry
    metrics: RequestMetrics
    access_log: AccessLog | None = None
    ingress: str = "0"


@dataclass(slots=True)
class _Times:
    """On the monotonic clock, in seconds; durations count from `arrived`."""

    arrived: float = field(default_factory=time.monotonic)
    entered: float | None = None
    queue_s: float | None = None
    first_token_s: float | None = None


class Observation:
    """The record of one request, from its arrival to its last byte."""

    def __init__(
        self,
        sinks: Sinks,
        *,
        request_id: str,
        operation: str,
        route: str,
        headers: Headers,
        caller: Caller,
        trusted: bool,
    ) -> None:
        """`trusted` says that the client has shown a key: its own `traceparent` then decides
        whether the request is sampled."""
        self._sinks = sinks
        self._metrics = sinks.metrics
        self._request_id = request_id
        self._operation = operation
        self._route = route
        self._caller = caller
        self._model = ""
        self._described: dict[str, Any] = {}
        self._times = _Times()
        self._reasons: list[str] = []
        self._tokens = {"input": 0, "cached_input": 0, "output": 0}
        self._cached: dict[int, int] = {}
        self._num_choices = 1  # per prompt
        self._num_streamed = 0
        self._choices: dict[int, _Choice] = {}
        self._replicas: list[str] = []
        self._pool: str | None = None
        self._resumes = 0
        self._finished = False
        self._span = sinks.telemetry.start_server_span(
            f"POST {route}", incoming_carrier(headers), trusted=trusted
        )
        self._span.set_attributes(
            {
                "http.request.method": "POST",
                "http.route": route,
                "url.path": route,
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "intserve",
            }
        )
        if caller.key is not None:
            self._span.set_attribute("intserve.key", caller.key)
        self._metrics.in_flight(+1)

    @property
    def arrived(self) -> float:
        """When it arrived, on the monotonic clock."""
        return self._times.arrived

    @property
    def trace_context(self) -> dict[str, str]:
        """W3C trace context of the span, for the actor hop."""
        return propagate(self._span)

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the answer: its pool, and the seconds for which it waited for a place there,
        a replica that had to be started included. Known once a choice is placed."""
        told = {} if self._pool is None else {"x-intserve-pool": self._pool}
        if self._times.queue_s is not None:
            told["x-intserve-queue-seconds"] = f"{self._times.queue_s:.3f}"
        return told

    def describe(
        self,
        requests: Sequence[GenerateRequest],
        *,
        model: str,
        num_choices: int,
        streamed: bool,
        num_prompt_tokens: int,
        response_id: str,
    ) -> None:
        """Record what an admitted request asks for: `num_choices` per prompt. A prompt counts once,
        whatever that number is."""
        self._model = model
        self._tokens["input"] = num_prompt_tokens
        self._num_choices = num_choices
        self._described = {"stream": streamed, "choices": len(requests)}
        sampling = requests[0].sampling
        self._span.update_name(f"{self._operation} {model}")
        self._span.set_attributes(
            {
                "gen_ai.request.model": model,
                "gen_ai.response.model": model,
                "gen_ai.response.id": response_id,
                "gen_ai.request.max_tokens": sampling.max_tokens,
                "gen_ai.request.temperature": sampling.temperature,
                "gen_ai.request.top_p": sampling.top_p,
                "gen_ai.request.top_k": sampling.top_k,
                "gen_ai.request.choice.count": num_choices,
                "gen_ai.request.stream": streamed,
            }
        )
        if sampling.seed is not None:  # the first choice's, which is the request's own
            self._span.set_attribute("gen_ai.request.seed", sampling.seed)

    def entered(self) -> None:
        """From now on it waits for its places."""
        self._times.entered = time.monotonic()

    def placed(self, index: int, placed: Placed, num_tokens: int) -> None:
        """Record that a choice runs on a replica: its first, or one where it goes on after
        `num_tokens`."""
        if placed.replica_id not in self._replicas:
            self._replicas.append(placed.replica_id)
            self._span.set_attribute("intserve.replica_id", placed.replica_id)
        if placed.pool:
            self._pool = placed.pool
            self._span.set_attribute("intserve.pool", placed.pool)
        choice = self._choices.setdefault(index, _Choice())
        before, choice.attempt = choice.attempt, max(choice.attempt, placed.attempt)
        if placed.attempt > max(before, 1):
            self._resumes += 1
            if choice.replica_id:
                lost = choice.replica_id, choice.placed_ns
                self._sinks.telemetry.lost(self._span, *lost, num_tokens)
            if num_tokens > choice.seam:
                choice.seam, choice.num_parts = num_tokens, choice.num_parts + 1
            self._span.add_event(
                "resumed",
                {
                    "intserve.attempt": placed.attempt,
                    "intserve.replica_id": placed.replica_id,
                    "intserve.choice": index,
                    "gen_ai.usage.output_tokens": num_tokens,
                },
            )
        if not before and self._times.entered is not None:
            seconds = time.monotonic() - self._times.entered
            self._times.queue_s = max(seconds, self._times.queue_s or 0.0)
            self._metrics.observe("intserve_admission_queue_seconds", seconds, placed.pool)
        choice.pool = placed.pool
        choice.replica_id, choice.placed_ns = placed.replica_id, time.time_ns()

    def event(self, index: int, event: Event) -> None:
        """Record an event of a choice on its way to the client."""
        if isinstance(event, Done):
            self._reasons.append(event.reason)
            self._cached[index] = event.cached_tokens
            self._tokens["output"] += event.completion_tokens
            self._observe_pace(index, event)
        elif isinstance(event, Tokens):
            self._num_streamed += len(event.token_ids)
            if self._times.first_token_s is None:
                self._note_first_token(self._pool_of(index))

    def _observe_pace(self, index: int, done: Done) -> None:
        """Mean time per token, in the engines: `decode_s` has no pause between two replicas in it,
        nor has the number of intervals."""
        parts = self._choices[index].num_parts if index in self._choices else 1
        pool = self._pool_of(index)
        num_intervals = done.completion_tokens - parts
        if done.reason in ("stop", "length") and num_intervals > 0:
            self._metrics.observe(
                "gen_ai_server_time_per_output_token_seconds",
                done.decode_s / num_intervals,
                self._operation,
                self._model,
                pool,
            )

    def _pool_of(self, index: int) -> str:
        return self._choices[index].pool if index in self._choices else ""

    def _note_first_token(self, pool: str) -> None:
        seconds = time.monotonic() - self._times.arrived
        self._times.first_token_s = seconds
        self._span.set_attribute("gen_ai.response.time_to_first_chunk", seconds)
        self._metrics.observe(
            "gen_ai_server_time_to_first_token_seconds",
            seconds,
            self._operation,
            self._model,
            pool,
        )

    def finish(self, error: ApiError | None, *, status: int, disconnected: bool = False) -> None:
        """End the span, count the outcome and log it. Later calls change nothing.

        `status` is the HTTP status that the client got: an error after the first byte leaves it at
        200.
        """
        if self._finished:
            return
        self._finished = True
        outcome = "disconnected" if disconnected else "ok" if error is None else code_label(error)
        # A choice that was cut short has told no counts of its own.
        self._tokens["output"] = max(self._tokens["output"], self._num_streamed)
        self._tokens["cached_input"] = cached_prompt_tokens(self._cached, self._num_choices)
        self._span.set_attributes(
            {
                "http.response.status_code": status,
                "gen_ai.usage.input_tokens": self._tokens["input"],
                "gen_ai.usage.output_tokens": self._tokens["output"],
                "gen_ai.usage.cache_read.input_tokens": self._tokens["cached_input"],
                "gen_ai.response.finish_reasons": self._reasons,
                "intserve.outcome": outcome,
                "intserve.resumes": self._resumes,
            }
        )
        if error is not None:
            set_error(self._span, outcome)
        self._span.end()
        seconds = time.monotonic() - self._times.arrived
        error_type = "" if outcome == "ok" else outcome
        self._metrics.observe(
            "gen_ai_server_request_duration_seconds",
            seconds,
            self._operation,
            self._model,
            error_type,
        )
        self._metrics.count("intserve_requests_total", 1, self._operation, outcome)
        for kind, amount in self._tokens.items():
            self._metrics.count("intserve_tokens_total", amount, kind)
        self._metrics.in_flight(-1)
        if self._sinks.access_log is not None:
            code = None if error is None or disconnected else code_label(error)
            self._sinks.access_log.write(self._line(status, outcome, code, seconds))

    def _line(self, status: int, outcome: str, code: str | None, seconds: float) -> dict[str, Any]:
        times = self._times
        return {
            **_head(self._sinks, self._request_id, self._caller, self._route),
            "model": self._model or None,
            "pool": self._pool,
            "status": status,
            "outcome": outcome,
            "error": code,
            "stream": None,
            "choices": None,
            **self._described,
            "prompt_tokens": self._tokens["input"],
            "completion_tokens": self._tokens["output"],
            "cached_tokens": self._tokens["cached_input"],
            "queue_s": _rounded(times.queue_s),
            "ttft_s": _rounded(times.first_token_s),
            "duration_s": _rounded(seconds),
            "replicas": self._replicas[-_MAX_REPLICAS:],
            "resumes": self._resumes,
            "trace_id": trace_id(self._span),
        }


def log_refused_key(sinks: Sinks, route: str, method: str, error: ApiError, caller: Caller) -> None:
    """Log a request that was refused for its key: nothing of it but where it came from."""
    if sinks.access_log is not None:
        outcome = code_label(error)
        head = _head(sinks, None, caller, route, method)
        told: Mapping[str, Any] = {"status": error.status, "outcome": outcome, "error": outcome}
        sinks.access_log.write({**head, **told})


def _head(
    sinks: Sinks, request_id: str | None, caller: Caller, route: str, method: str = "POST"
) -> dict[str, Any]:
    return {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "request_id": request_id,
        "ingress": sinks.ingress,
        "key": caller.key,
        "address": caller.address,
        "method": method,
        "route": route,
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)
