"""What is told of one request: where it ran, how long it waited, and that it went on elsewhere."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.datastructures import Headers
from support.configs import make_config
from support.fleets import LocalFleet, NotedAdmission, echo_fleet
from support.serving import client_of, make_service, metric, read_sse

from serve_app.config import EchoOptions
from serve_app.engines.protocol import Done, Placed, Tokens
from serve_app.openai.service import Service
from serve_app.openai.tokenizer import ByteTokenizer
from serve_app.routing.admission_stats import AdmissionStats, PoolStats, QueuedOfKey, ReplicaUse
from serve_app.setting_types import POOL
from serve_app.telemetry.metrics import RequestMetrics
from serve_app.telemetry.request import Caller, Observation, Sinks
from serve_app.telemetry.tracing import Telemetry

TEXT = "/v1/completions"


@pytest.fixture
def spans() -> InMemorySpanExporter:
    return InMemorySpanExporter()


def traced(spans: InMemorySpanExporter) -> Telemetry:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    return Telemetry(provider)


class Told:
    """A service over two replicas, and what it told."""

    def __init__(self, fleet: LocalFleet, service: Service, log: Path) -> None:
        self.fleet, self.service, self._log = fleet, service, log

    def line(self) -> dict[str, Any]:
        self.service.close()
        (line,) = self._log.read_text(encoding="utf-8").splitlines()
        told: dict[str, Any] = json.loads(line)
        return told


@pytest.fixture
async def told(spans: InMemorySpanExporter, tmp_path: Path) -> AsyncIterator[Told]:
    admission = NotedAdmission("a", "b")
    counts: list[str] = []
    async with echo_fleet(admission=admission, count=counts.append) as fleet:
        config = make_config(
            echo=EchoOptions(), api_keys=("key",), access_log=tmp_path / "access.jsonl"
        )
        service = Service(
            config, ByteTokenizer(), fleet.fleet, traced(spans), admission=admission, ingress="i1"
        )
        fleet.fleet._count = service.count_resume
        yield Told(fleet, service, tmp_path / "access.jsonl")


@pytest.mark.parametrize("stream", [True, False])
async def test_a_resumed_request_tells_where_it_ran_and_what_was_there_at_the_seam(
    told: Told, spans: InMemorySpanExporter, stream: bool
) -> None:
    def look(replica: Any, sent: Any, event: Any) -> None:
        if sent.num_tokens == 3 and replica.replica_id == "a":
            told.fleet.die("a")

    told.fleet.before_message = look
    body = {"model": "echo", "prompt": "hello world", "stream": stream}
    async with client_of(told.service) as client:
        answer = await client.post(TEXT, json=body, headers={"authorization": "Bearer key"})
        scraped = (await client.get("/metrics", headers={"authorization": "Bearer key"})).text
    assert answer.status_code == 200
    if stream:
        chunks = [c for c in read_sse(answer.text)[:-1] if c["choices"]]
        assert "".join(c["choices"][0]["text"] for c in chunks) == "hello world"
    (span,) = [one for one in spans.get_finished_spans() if one.kind.name == "SERVER"]
    attributes = dict(span.attributes or {})
    (name,) = [tenant.name for tenant in told.service.keys.tenants]
    expected = {"intserve.key": name, "intserve.replica_id": "b", "intserve.resumes": 1}
    assert {key: attributes[key] for key in expected} == expected
    (event,) = span.events
    assert event.name == "resumed"
    assert dict(event.attributes or {}) == {
        "intserve.attempt": 2,
        "intserve.replica_id": "b",
        "intserve.choice": 0,
        "gen_ai.usage.output_tokens": 3,
    }
    line = told.line()
    expected = {"replicas": ["a", "b"], "resumes": 1, "key": name, "ingress": "i1"}
    assert {key: line[key] for key in expected} == expected
    assert (line["completion_tokens"], line["status"], line["outcome"]) == (11, 200, "ok")
    assert 0.0 <= line["queue_s"] <= line["ttft_s"]
    assert metric(scraped, "intserve_resumes_total", outcome="resumed") == 1
    assert metric(scraped, "intserve_admission_queue_seconds_count") == 1


async def test_the_queue_ends_with_the_place_and_not_with_the_first_token(
    told: Told, spans: InMemorySpanExporter
) -> None:
    """The replica's own word comes with its tokens."""
    for replica in told.fleet.replicas.values():
        replica.engine._options = EchoOptions(ttft_s=0.3)  # type: ignore[attr-defined]
    async with client_of(told.service) as client:
        body = {"model": "echo", "prompt": "hello"}
        await client.post(TEXT, json=body, headers={"authorization": "Bearer key"})
    line = told.line()
    assert line["ttft_s"] >= 0.3
    assert line["queue_s"] <= line["ttft_s"] - 0.25


def observation(metrics: RequestMetrics) -> Observation:
    return Observation(
        Sinks(Telemetry(None), metrics),
        request_id="r",
        operation="chat",
        route="/x",
        headers=Headers({}),
        caller=Caller(key=None),
        trusted=False,
    )


@pytest.mark.parametrize(
    ("seams", "intervals"),
    [((), 9), ((4,), 8), ((4, 4), 8), ((0,), 9), ((4, 7), 7), ((0, 4), 8)],
)
def test_the_mean_time_per_token_counts_no_pause_between_two_replicas(
    seams: tuple[int, ...], intervals: int
) -> None:
    """Ten tokens, from one replica or in parts: the engines' decode time over their intervals."""
    metrics = RequestMetrics()
    seen = observation(metrics)
    seen.placed(0, Placed("a"), 0)
    for attempt, num_tokens in enumerate(seams, start=2):
        seen.placed(0, Placed("b", attempt), num_tokens)
    seen.event(0, Tokens((1, 2), "ab"))
    seen.event(0, Done("stop", 3, 10, decode_s=0.72))
    seen.finish(None, status=200)
    name = "gen_ai_server_time_per_output_token_seconds"
    assert metric(metrics.snapshot(), f"{name}_sum") == pytest.approx(0.72 / intervals)
    assert metric(metrics.snapshot(), f"{name}_count") == 1


def test_what_a_request_measures_is_its_pools() -> None:
    """Of a choice that goes on in another pool, the one where it ends."""
    metrics = RequestMetrics()
    seen = observation(metrics)
    seen.placed(0, Placed("a", pool="short"), 0)
    seen.event(0, Tokens((1, 2), "ab"))
    seen.placed(0, Placed("b", 2, pool="long"), 2)
    seen.event(0, Done("stop", 3, 10, decode_s=0.72))
    seen.finish(None, status=200)
    text = metrics.snapshot()
    first, pace = "time_to_first_token_seconds_count", "time_per_output_token_seconds_count"
    assert metric(text, f"gen_ai_server_{first}", pool="short") == 1
    assert metric(text, f"gen_ai_server_{pace}", pool="long") == 1
    assert metric(text, f"gen_ai_server_{pace}", pool="short") == 0


def test_a_request_that_was_cut_short_is_charged_for_what_was_streamed() -> None:
    metrics = RequestMetrics()
    seen = observation(metrics)
    seen.event(0, Tokens((1, 2), "ab"))
    seen.event(1, Tokens((1,), "a"))
    seen.event(1, Done("length", 3, 1))
    seen.finish(None, status=200, disconnected=True)
    seen.finish(None, status=200)
    assert metric(metrics.snapshot(), "intserve_tokens_total", kind="output") == 3
    assert metric(metrics.snapshot(), "intserve_requests_in_flight") == 0


def use(replica_id: str, breaker: str) -> ReplicaUse:
    numbers = dict.fromkeys(("held", "ghosts", "places"), 0)
    tokens = dict.fromkeys(("kv_tokens_held", "kv_tokens_ghosts", "kv_tokens_total"), 0)
    return ReplicaUse(
        replica_id=replica_id,
        pool=POOL,
        fresh=True,
        breaker=breaker,
        reserved=False,
        **numbers,
        **tokens,
    )


async def test_what_the_owner_of_admission_says_is_told_by_band_and_by_replica() -> None:
    service = make_service()
    keys = [("key-one", 0, 3), ("key-two", 0, 4), ("key-three", 5, 1)]

    async def stats() -> AdmissionStats:
        return AdmissionStats(
            queued=tuple(
                QueuedOfKey(
                    key=key, priority=band, pool=POOL, requests=1, sequences=n, kv_tokens=10 * n
                )
                for key, band, n in keys
            ),
            moving=0,
            replicas=(use("a", "open"), use("b", "half_open"), use("c", "closed")),
            ingresses=2,
            oldest_wait_s=1.5,
            drain_tokens_per_s=None,
            granted=0,
            refused=(),
            pools=(
                PoolStats(
                    pool=POOL,
                    ready=3,
                    waiting=8,
                    waiting_tokens=80,
                    oldest_wait_s=1.5,
                    running=5,
                    kv_share=0.25,
                    places_share=0.5,
                    ttft_p90_s=2.5,
                    itl_p90_s=None,
                ),
            ),
        )

    service.admission_stats = stats
    async with client_of(service) as client:
        text = (await client.get("/metrics")).text
    assert metric(text, "intserve_admission_queued_sequences", priority="0") == 7
    assert metric(text, "intserve_admission_queued_kv_tokens", priority="5") == 10
    assert metric(text, "intserve_admission_oldest_wait_seconds") == 1.5
    breakers = [metric(text, "intserve_breaker_open", replica=name) for name in "abc"]
    assert breakers == [1.0, 0.5, 0.0]
    expected = {"replicas_ready": 3, "waiting_sequences": 8, "waiting_kv_tokens": 80}
    expected |= {"oldest_wait_seconds": 1.5, "running_sequences": 5, "kv_share": 0.25}
    expected |= {"places_share": 0.5, "ttft_p90_seconds": 2.5}
    assert expected == {n: metric(text, f"intserve_pool_{n}", pool=POOL) for n in expected}
    assert "intserve_pool_itl_p90_seconds{" not in text, "nothing was measured"
    assert "key-three" not in text, "keys are as many as a user makes"


async def test_an_owner_that_does_not_answer_costs_a_scrape_only_its_own_figures() -> None:
    service = make_service()

    async def stats() -> AdmissionStats:
        raise ConnectionError("the owner is gone")

    service.admission_stats = stats
    async with client_of(service) as client:
        await client.post(TEXT, json={"model": "echo", "prompt": "x"})
        answer = await client.get("/metrics")
    assert answer.status_code == 200
    assert metric(answer.text, "intserve_requests_total", outcome="ok") == 1
    assert "intserve_breaker_open" not in answer.text
