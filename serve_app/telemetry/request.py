"""One request as the operator sees it: its SERVER span and its metrics, finished exactly once.

openai/service.py reports to it what happens (`describe`, `event`, `finish`). It decides nothing and
never sees the text of a prompt or an answer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from starlette.datastructures import Headers

from serve_app.engines.protocol import Done, Event, GenerateRequest, Tokens
from serve_app.errors import ApiError, code_label
from serve_app.telemetry.metrics import RequestMetrics
from serve_app.telemetry.tracing import Telemetry, incoming_carrier, propagate, set_error


class Observation:
    """The record of one request, from its arrival to its last byte."""

    def __init__(
        self,
        telemetry: Telemetry,
        metrics: RequestMetrics,
        *,
        operation: str,
        route: str,
        headers: Headers,
        trusted: bool,
    ) -> None:
        """`trusted` says that the client has shown a key: its own `traceparent` then decides
        whether the request is sampled."""
        self._metrics = metrics
        self._operation = operation
        self._model = ""
        self._arrived = time.monotonic()
        self._first_token_s: float | None = None
        self._reasons: list[str] = []
        self._tokens = {"input": 0, "cached_input": 0, "output": 0}
        self._finished = False
        self._span = telemetry.start_server_span(
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
        metrics.in_flight(+1)

    @property
    def trace_context(self) -> dict[str, str]:
        """W3C trace context of the span, for the actor hop."""
        return propagate(self._span)

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

    def event(self, event: Event) -> None:
        """Record an engine event on its way to the client."""
        if isinstance(event, Done):
            self._reasons.append(event.reason)
            self._tokens["cached_input"] += event.cached_tokens
            self._tokens["output"] += event.completion_tokens
            if event.reason in ("stop", "length") and event.completion_tokens > 1:
                self._metrics.observe(
                    "gen_ai_server_time_per_output_token_seconds",
                    event.decode_s / (event.completion_tokens - 1),
                    self._operation,
                    self._model,
                )
        elif isinstance(event, Tokens) and self._first_token_s is None:
            self._first_token_s = time.monotonic() - self._arrived
            self._span.set_attribute("gen_ai.response.time_to_first_chunk", self._first_token_s)
            self._metrics.observe(
                "gen_ai_server_time_to_first_token_seconds",
                self._first_token_s,
                self._operation,
                self._model,
            )

    def finish(self, error: ApiError | None, *, status: int, disconnected: bool = False) -> None:
        """End the span and count the outcome. Later calls change nothing.

        `status` is the HTTP status that the client got: an error after the first byte leaves it at
        200.
        """
        if self._finished:
            return
        self._finished = True
        outcome = "disconnected" if disconnected else "ok" if error is None else code_label(error)
        self._span.set_attributes(
            {
                "http.response.status_code": status,
                "gen_ai.usage.input_tokens": self._tokens["input"],
                "gen_ai.usage.output_tokens": self._tokens["output"],
                "gen_ai.usage.cache_read.input_tokens": self._tokens["cached_input"],
                "gen_ai.response.finish_reasons": self._reasons,
                "intserve.outcome": outcome,
            }
        )
        if error is not None:
            set_error(self._span, outcome)
        self._span.end()
        seconds = time.monotonic() - self._arrived
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
