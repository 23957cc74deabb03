"""OpenTelemetry spans: one trace from HTTP to the engine's phases.

    chat {model}                  SERVER span of the ingress; continues the client's `traceparent`
      engine.generate             in the replica, one per choice
        queue, prefill, decode    made from the times in `Done`, with explicit start and end

Configured by OpenTelemetry's own environment variables alone (OTEL_EXPORTER_OTLP_ENDPOINT,
OTEL_SERVICE_NAME, OTEL_TRACES_SAMPLER, OTEL_SDK_DISABLED ...); without an endpoint every span is a
no-op. Which of them replicas get, and how a secret header reaches them, is in travel.py. The
provider is not global: automatic spans of other libraries (FastAPI, Ray) would otherwise appear
beside ours. Names follow the GenAI conventions; they are written out here because the Python
constants are deprecated while the conventions move. The text of prompts and answers is never
recorded. telemetry/request.py makes the SERVER span, replica/replica.py the others.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import (
    NoOpTracer,
    Span,
    SpanKind,
    Status,
    StatusCode,
    Tracer,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from deepseek.errors import ConfigError
from serve_app.engines.protocol import Done, Event, GenerateRequest
from serve_app.telemetry.travel import read_headers

_W3C = TraceContextTextMapPropagator()


class Telemetry:
    """The tracer of one process."""

    def __init__(self, provider: TracerProvider | None) -> None:
        self._provider = provider
        self.tracer: Tracer = provider.get_tracer("intserve") if provider else NoOpTracer()

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Telemetry:
        """Read OpenTelemetry's variables.

        Raises:
            ConfigError: the variables name a protocol or an exporter that is not installed, or the
                file of headers is unusable.
        """
        endpoint = environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or environ.get(
            "OTEL_EXPORTER_OTLP_ENDPOINT"
        )
        exporter = environ.get("OTEL_TRACES_EXPORTER", "otlp")
        disabled = environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
        if not endpoint or disabled or exporter == "none":
            return cls(None)
        protocol = environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or environ.get(
            "OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"
        )
        if exporter != "otlp" or protocol != "http/protobuf":
            raise ConfigError(
                f"OTEL_TRACES_EXPORTER={exporter}, protocol {protocol}: only otlp over "
                "http/protobuf is implemented; set OTEL_EXPORTER_OTLP_PROTOCOL=http/protobuf"
            )
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        name = {} if "OTEL_SERVICE_NAME" in environ else {"service.name": "intserve"}
        provider = TracerProvider(resource=Resource.create(name), shutdown_on_exit=True)
        provider.add_span_processor(
            BatchSpanProcessor(OTLPSpanExporter(headers=read_headers(environ)))
        )
        return cls(provider)

    def shutdown(self) -> None:
        """Send what is still buffered. Idempotent."""
        if self._provider is not None:
            self._provider.shutdown()
            self._provider = None

    def start_server_span(self, name: str, headers: Mapping[str, str]) -> Span:
        """Start the root of our part of the trace; a child of the client's span if it sent one."""
        context = _W3C.extract(headers)
        return self.tracer.start_span(name, context=context, kind=SpanKind.SERVER)

    @contextmanager
    def generation(self, request: GenerateRequest) -> Iterator[GenerationSpan]:
        """Trace one choice in the replica, from its request to its last event."""
        span = GenerationSpan(self.tracer, request)
        try:
            yield span
        except BaseException as error:
            span.finish(type(error).__name__)
            raise
        span.finish(None)


def propagate(span: Span) -> dict[str, str]:
    """`traceparent` and `tracestate` for the actor hop; empty when nothing is traced."""
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, context=set_span_in_context(span))
    return carrier


def set_error(span: Span, kind: str) -> None:
    span.set_attribute("error.type", kind)
    span.set_status(Status(StatusCode.ERROR))


class GenerationSpan:
    """The span `engine.generate`, and the spans of its phases once `Done` gives their times."""

    def __init__(self, tracer: Tracer, request: GenerateRequest) -> None:
        self._tracer = tracer
        self._start_ns = time.time_ns()
        self._span = tracer.start_span(
            "engine.generate",
            context=_W3C.extract(request.trace_context),
            start_time=self._start_ns,
            attributes={
                "intserve.request_id": request.request_id,
                "gen_ai.usage.input_tokens": len(request.prompt_ids),
                "gen_ai.request.max_tokens": request.sampling.max_tokens,
            },
        )
        self._done: Done | None = None

    def note(self, events: Iterable[Event]) -> None:
        """Look for the final event."""
        for event in events:
            if isinstance(event, Done):
                self._done = event

    def finish(self, error: str | None) -> None:
        """End the span. Without a `Done` the client left or the engine failed: `error` names the
        exception."""
        done = self._done
        if done is not None:
            self._phases(done)
            self._span.set_attribute("gen_ai.usage.output_tokens", done.completion_tokens)
            self._span.set_attribute("gen_ai.response.finish_reasons", [done.reason])
        if error in ("CancelledError", "GeneratorExit") or (done and done.reason == "abort"):
            self._span.set_attribute("intserve.outcome", "aborted")
        elif error is not None or (done is not None and done.reason == "error"):
            set_error(self._span, error or "engine_failed")
        self._span.end()

    def _phases(self, done: Done) -> None:
        context = set_span_in_context(self._span)
        computed = done.prompt_tokens - done.cached_tokens
        phases: list[tuple[str, float, dict[str, Any]]] = [
            ("queue", done.queue_s, {}),
            (
                "prefill",
                done.prefill_s,
                {
                    "gen_ai.usage.input_tokens": done.prompt_tokens,
                    "gen_ai.usage.cache_read.input_tokens": done.cached_tokens,
                    "intserve.tokens_computed": computed,
                },
            ),
            ("decode", done.decode_s, {"gen_ai.usage.output_tokens": done.completion_tokens}),
        ]
        start_ns = self._start_ns
        for name, seconds, attributes in phases:
            end_ns = start_ns + int(seconds * 1e9)
            span = self._tracer.start_span(
                name, context=context, start_time=start_ns, attributes=attributes
            )
            span.end(end_time=end_ns)
            start_ns = end_ns
