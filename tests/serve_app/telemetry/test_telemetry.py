"""Spans without a network: configuration from the environment, phases, and what is not recorded."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased
from starlette.datastructures import Headers
from support.admissions import status
from support.serving import FaultyEngine, client_of, make_service

from deepseek.engine.request import SamplingParams
from deepseek.errors import ConfigError
from serve_app.config import EchoOptions
from serve_app.engines.protocol import Done, GenerateRequest
from serve_app.telemetry.tracing import Telemetry, UntrustedParents, incoming_carrier, propagate

TEXT = "/v1/completions"
CLIENT_TRACE = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = {"traceparent": f"00-{CLIENT_TRACE}-b7ad6b7169203331-01"}


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def telemetry(spans: InMemorySpanExporter) -> Telemetry:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    return Telemetry(provider)


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_nothing_is_traced_unless_an_endpoint_is_configured(environ: dict[str, str]) -> None:
    telemetry = Telemetry.from_environment(environ)
    assert not telemetry.start_server_span("x", {}, trusted=True).is_recording()
    telemetry.shutdown()


def test_the_configured_tracer_decides_for_clients_without_a_key() -> None:
    telemetry = Telemetry.from_environment({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"})
    unsampled = {"traceparent": TRACEPARENT["traceparent"][:-2] + "00"}
    assert telemetry.start_server_span("x", unsampled, trusted=False).is_recording()
    assert not telemetry.start_server_span("x", unsampled, trusted=True).is_recording()
    telemetry.shutdown()


@pytest.mark.parametrize(
    "wrong", [{"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, {"OTEL_TRACES_EXPORTER": "zipkin"}]
)
def test_what_is_not_installed_is_refused_and_not_ignored(wrong: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="http/protobuf"):
        Telemetry.from_environment({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", **wrong})


async def test_one_server_span_continues_the_clients_trace_and_tells_no_prompt(
    telemetry: Telemetry, spans: InMemorySpanExporter
) -> None:
    service = make_service(telemetry=telemetry)
    body = {"model": "echo", "prompt": "CANARY", "max_tokens": 4, "seed": 7, "n": 2}
    async with client_of(service) as client:
        await client.post(TEXT, json=body, headers=TRACEPARENT)
    (span,) = spans.get_finished_spans()
    assert (span.name, span.kind.name) == ("text_completion echo", "SERVER")
    assert f"{span.context.trace_id:032x}" == CLIENT_TRACE
    told = attributes(span)
    expected = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.request.model": "echo",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.seed": 7,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.stream": False,
        "gen_ai.usage.input_tokens": 6,
        "gen_ai.usage.output_tokens": 8,
        "gen_ai.response.finish_reasons": ("length", "length"),
        "http.response.status_code": 200,
        "intserve.outcome": "ok",
    }
    assert {key: told.get(key) for key in expected} == expected
    assert "CANARY" not in span.to_json()


@pytest.mark.parametrize("prompt", ["bug CANARY", "late-bug CANARY"])
async def test_a_failure_marks_the_span_and_tells_no_detail(
    telemetry: Telemetry, spans: InMemorySpanExporter, prompt: str
) -> None:
    service = make_service(FaultyEngine(EchoOptions()), telemetry)
    async with client_of(service) as client:
        await client.post(TEXT, json={"model": "echo", "prompt": prompt, "stream": True})
        await client.post(TEXT, content=b"{", headers={"content-type": "application/json"})
    failed, invalid = spans.get_finished_spans()
    assert attributes(failed)["error.type"] == "internal_error"
    assert failed.status.status_code.name == "ERROR"
    assert "CANARY" not in failed.to_json()
    assert (invalid.name, attributes(invalid)["error.type"]) == (f"POST {TEXT}", "invalid_json")


async def test_nothing_of_a_request_is_recorded_before_its_key_is_checked(
    telemetry: Telemetry, spans: InMemorySpanExporter
) -> None:
    service = make_service(telemetry=telemetry, api_keys=["one"])
    before = service.metrics.snapshot()
    body = {"model": "CANARY", "prompt": "CANARY"}
    async with client_of(service) as client:
        for headers in ({}, {"authorization": "Bearer CANARY"}, {"authorization": "CANARY"}):
            headers |= {**TRACEPARENT, "x-request-id": "CANARY", "user-agent": "CANARY"}
            assert (await client.post(TEXT, json=body, headers=headers)).status_code == 401
        await client.get("/CANARY")
    assert not spans.get_finished_spans()
    changed = set(service.metrics.snapshot().splitlines()) - set(before.splitlines())
    assert changed == {
        'intserve_refused_keys_total{reason="missing"} 1.0',
        'intserve_refused_keys_total{reason="wrong"} 2.0',
    }


@pytest.mark.parametrize("authenticated", [False, True])
@pytest.mark.parametrize("flag", ["00", "01"])
@pytest.mark.parametrize("sampler", ["parentbased_always_on", "parentbased_always_off"])
async def test_only_a_client_with_a_key_decides_what_is_sampled(
    spans: InMemorySpanExporter, sampler: str, flag: str, authenticated: bool
) -> None:
    root = ALWAYS_ON if sampler.endswith("on") else ALWAYS_OFF
    provider = TracerProvider(sampler=UntrustedParents(ParentBased(root)))
    provider.add_span_processor(SimpleSpanProcessor(spans))
    service = make_service(telemetry=Telemetry(provider), api_keys=["one"] if authenticated else [])
    async with client_of(service) as client:
        headers = {
            "traceparent": f"00-{CLIENT_TRACE}-b7ad6b7169203331-{flag}",
            "tracestate": "vendor=1",
            "authorization": "Bearer one",
        }
        answer = await client.post(TEXT, json={"model": "echo", "prompt": "x"}, headers=headers)
    assert answer.status_code == 200
    recorded = spans.get_finished_spans()
    by_client, by_server = flag == "01", root is ALWAYS_ON
    assert bool(recorded) is (by_client if authenticated else by_server)
    for span in recorded:
        assert f"{span.context.trace_id:032x}" == CLIENT_TRACE, "the trace goes on either way"
        assert span.context.trace_state.to_header() == "vendor=1"


@pytest.mark.parametrize(
    ("headers", "carried"),
    [
        ([("traceparent", "x"), ("tracestate", "a=1")], {"traceparent": "x", "tracestate": "a=1"}),
        ([("traceparent", "x"), ("tracestate", "a=" + "1" * 511)], {"traceparent": "x"}),
        ([("traceparent", "x"), *[("tracestate", "a=" + "1" * 254)] * 3], {"traceparent": "x"}),
        ([("traceparent", "x"), ("traceparent", "y"), ("tracestate", "a=1")], {}),
        ([("traceparent", "x" * 9000)], {}),
        ([("tracestate", "a=1")], {}),
        ([("traceparent", "x"), ("baggage", "a=1")], {"traceparent": "x"}),
    ],
)
def test_a_clients_trace_context_is_one_parent_and_a_bounded_state(
    headers: list[tuple[str, str]], carried: dict[str, str]
) -> None:
    raw = [(name.encode(), value.encode()) for name, value in headers]
    assert incoming_carrier(Headers(raw=raw)) == carried


def generation(telemetry: Telemetry, done: Done | None, error: BaseException | None = None) -> None:
    parent = telemetry.start_server_span("root", {}, trusted=True)
    asked = GenerateRequest(
        request_id="r-0",
        prompt_ids=(1, 2, 3),
        sampling=SamplingParams(max_tokens=9),
        trace_context=propagate(parent),
    )
    expected = contextlib.nullcontext() if error is None else pytest.raises(type(error))
    with expected, telemetry.generation(asked) as span:
        if done is not None:
            span.note([done])
        if error is not None:
            raise error
    parent.end()


def test_phases_lie_end_to_end_inside_the_generation(
    telemetry: Telemetry, spans: InMemorySpanExporter
) -> None:
    generation(telemetry, Done("stop", 3, 5, 1, queue_s=0.1, prefill_s=0.2, decode_s=0.4))
    by_name = {span.name: span for span in spans.get_finished_spans()}
    assert list(by_name) == ["queue", "prefill", "decode", "engine.generate", "root"]
    outer = by_name["engine.generate"]
    assert outer.parent is not None
    assert outer.parent.span_id == by_name["root"].context.span_id
    at = outer.start_time
    for name, seconds in (("queue", 0.1), ("prefill", 0.2), ("decode", 0.4)):
        span = by_name[name]
        assert span.parent is not None
        assert span.parent.span_id == outer.context.span_id
        assert span.start_time == at
        assert span.end_time - span.start_time == pytest.approx(seconds * 1e9, abs=2)
        at = span.end_time
    assert attributes(by_name["prefill"])["gen_ai.usage.input_tokens"] == 3
    assert attributes(by_name["prefill"])["intserve.tokens_computed"] == 2
    assert attributes(by_name["decode"])["gen_ai.usage.output_tokens"] == 5


def test_a_generation_tells_its_pool_and_the_format_and_use_of_its_kv(
    telemetry: Telemetry, spans: InMemorySpanExporter
) -> None:
    told = status("r7", kv=8000, used=1200, pool="long")
    info = replace(told.info, kv_cache="int8", kv_bytes_per_token=644.0)
    asked = GenerateRequest(
        request_id="r-0", prompt_ids=(1,), sampling=SamplingParams(max_tokens=1)
    )
    for replica in (replace(told, info=info), told):
        with telemetry.generation(asked, replica):
            pass
    quantized, plain = (attributes(span) for span in spans.get_finished_spans())
    expected = {
        "intserve.replica_id": "r7",
        "intserve.pool": "long",
        "intserve.kv_cache": "int8",
        "intserve.kv_bytes_per_token": 644.0,
        "intserve.kv_tokens_used": 1200,
        "intserve.kv_tokens_total": 8000,
    }
    assert {name: quantized[name] for name in expected} == expected
    assert "intserve.kv_cache" not in plain, "nothing is told that is not known"


def test_a_client_that_left_is_no_error_and_a_failed_engine_is_one(
    telemetry: Telemetry, spans: InMemorySpanExporter
) -> None:
    generation(telemetry, None, GeneratorExit())
    generation(telemetry, None, KeyError("x"))
    generation(telemetry, Done("error", 3, 0, error="x"))
    left, broken, failed = [s for s in spans.get_finished_spans() if s.name == "engine.generate"]
    assert attributes(left)["intserve.outcome"] == "aborted"
    assert left.status.is_ok or left.status.status_code.name == "UNSET"
    assert attributes(broken)["error.type"] == "KeyError"
    assert attributes(failed)["error.type"] == "engine_failed"
