"""OpenTelemetry spans: one trace from HTTP to the engine's phases.

    chat {model}                  SERVER span of the ingress; continues the client's `traceparent`
      engine.generate             in the replica, one per choice and replica
        queue, prefill, decode    made from the times in `Done`, with explicit start and end
      engine.lost                 made by the ingress of a choice that goes on in another replica:
                                  the span of a process that was killed is gone with it

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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from opentelemetry.context import Context, get_value, set_value
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import Sampler, SamplingResult
from opentelemetry.trace import (
    Link,
    NoOpTracer,
    Span,
    SpanKind,
    Status,
    StatusCode,
    Tracer,
    TraceState,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import Attributes
from starlette.datastructures import Headers

from deepseek.errors import ConfigError
from serve_app.engines.protocol import Done, Event, GenerateRequest, ReplicaStatus
from serve_app.telemetry.travel import read_headers

_W3C = TraceContextTextMapPropagator()

#: Characters of `tracestate` that are carried on; W3C asks for at least these.
MAX_TRACESTATE = 512

#: Key of a context whose parent must not decide about sampling.
_OWN_DECISION = "intserve.own_sampling_decision"


class UntrustedParents(Sampler):
    """Samples as `inner` does, but a span whose client is not trusted as if it had no parent: its
    trace goes on, and whether it is recorded is decided here."""

    def __init__(self, inner: Sampler) -> None:
        self._inner = inner

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        untrusted = parent_context is not None and get_value(_OWN_DECISION, parent_context)
        seen = Context() if untrusted else parent_context
        result = self._inner.should_sample(
            seen, trace_id, name, kind, attributes, links, trace_state
        )
        if not untrusted:
            return result
        state = get_current_span(parent_context).get_span_context().trace_state
        return SamplingResult(result.decision, result.attributes, state)

    def get_description(self) -> str:
        return f"UntrustedParents({self._inner.get_description()})"


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
        provider.sampler = UntrustedParents(provider.sampler)
        provider.add_span_processor(
            BatchSpanProcessor(OTLPSpanExporter(headers=read_headers(environ)))
        )
        return cls(provider)

    def shutdown(self) -> None:
        """Send what is still buffered. Idempotent."""
        if self._provider is not None:
            self._provider.shutdown()
            self._provider = None

    def start_server_span(self, name: str, carrier: Mapping[str, str], *, trusted: bool) -> Span:
        """Start the root of our part of the trace; a child of the client's span if `carrier` (see
        `incoming_carrier`) names one. Only of a `trusted` client is the sampling flag obeyed."""
        context = _W3C.extract(carrier)
        if not trusted:
            context = set_value(_OWN_DECISION, True, context)
        return self.tracer.start_span(name, context=context, kind=SpanKind.SERVER)

    def lost(self, parent: Span, replica_id: str, start_ns: int, num_tokens: int) -> None:
        """Trace that a replica had a choice from `start_ns` until now, when another one takes over
        after `num_tokens` tokens."""
        span = self.tracer.start_span(
            "engine.lost",
            context=set_span_in_context(parent),
            start_time=start_ns,
            attributes={
                "intserve.replica_id": replica_id,
                "gen_ai.usage.output_tokens": num_tokens,
            },
        )
        span.end()

    @contextmanager
    def generation(
        self, request: GenerateRequest, replica: ReplicaStatus | None = None
    ) -> Iterator[GenerationSpan]:
        """Trace one choice in the replica, which is as its status says, from its request to its
        last event."""
        span = GenerationSpan(self.tracer, request, replica)
        try:
            yield span
        except BaseException as error:
            span.finish(type(error).__name__)
            raise
        span.finish(None)


def incoming_carrier(headers: Headers) -> dict[str, str]:
    """The W3C trace context that a client sent. A second `traceparent` makes it invalid, and a
    `tracestate` of over MAX_TRACESTATE characters is dropped, as W3C has it."""
    parents = headers.getlist("traceparent")
    if len(parents) != 1 or len(parents[0]) > MAX_TRACESTATE:
        return {}
    carrier = {"traceparent": parents[0]}
    state = ",".join(headers.getlist("tracestate"))
    if state and len(state) <= MAX_TRACESTATE:
        carrier["tracestate"] = state
    return carrier


def propagate(span: Span) -> dict[str, str]:
    """`traceparent` and `tracestate` for the actor hop; empty when nothing is traced."""
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, context=set_span_in_context(span))
    return carrier


def trace_id(span: Span) -> str | None:
    """The id of the span's trace, as 32 hexadecimal digits; None when nothing is traced."""
    context = span.get_span_context()
    return f"{context.trace_id:032x}" if context.is_valid else None


def _replica_attributes(replica: ReplicaStatus | None) -> dict[str, Any]:
    """Which replica, of which pool, and the format and use of its KV cache as a choice arrives."""
    if replica is None:
        return {}
    info, load = replica.info, replica.load
    attributes = {
        "intserve.replica_id": replica.replica_id,
        "intserve.pool": replica.pool,
        "intserve.kv_cache": info.kv_cache,
        "intserve.kv_bytes_per_token": info.kv_bytes_per_token,
        "intserve.kv_tokens_used": load.kv_tokens_used,
        "intserve.kv_tokens_total": load.kv_tokens_total,
    }
    return {name: value for name, value in attributes.items() if value is not None}


def set_error(span: Span, kind: str) -> None:
    span.set_attribute("error.type", kind)
    span.set_status(Status(StatusCode.ERROR))


class GenerationSpan:
    """The span `engine.generate`, and the spans of its phases once `Done` gives their times."""

    def __init__(
        self, tracer: Tracer, request: GenerateRequest, replica: ReplicaStatus | None
    ) -> None:
        self._tracer = tracer
        self._start_ns = time.time_ns()
        self._span = tracer.start_span(
            "engine.generate",
            context=_W3C.extract(request.trace_context),
            start_time=self._start_ns,
            attributes={
                "intserve.request_id": request.request_id,
                **_replica_attributes(replica),
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
