"""The end of an ingress: what is in flight finishes, newcomers go elsewhere, the rest is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from support.configs import make_config
from support.serving import LocalHandle, read_sse

from serve_app.config import EchoOptions
from serve_app.engines.echo import EchoEngine
from serve_app.engines.protocol import ReplicaStatus
from serve_app.openai.drain import Drain
from serve_app.openai.routes import make_app
from serve_app.openai.service import Service
from serve_app.openai.tokenizer import ByteTokenizer
from serve_app.routing.replica_client import ReplicaClient, StatusBoard
from serve_app.setting_types import POOL
from serve_app.telemetry.tracing import Telemetry

BODY: dict[str, Any] = {"model": "echo", "prompt": "hello there"}
ENDLESS: dict[str, Any] = BODY | {"max_tokens": 4000, "ignore_eos": True}


async def make(itl_s: float) -> tuple[httpx.AsyncClient, Drain]:
    """A client of the whole HTTP application of one ingress, and the drain of that ingress."""
    config = make_config(echo=EchoOptions(itl_s=itl_s))
    assert isinstance(config.pool.engine, EchoOptions)
    engine = EchoEngine(config.pool.engine)
    board = StatusBoard()
    info = await engine.start()
    board.note(ReplicaStatus(replica_id="a", info=info, load=engine.load(), gated=True))
    engines = ReplicaClient({POOL: LocalHandle(engine)}, board)
    drain = Drain(engines.close)
    app = make_app(Service(config, ByteTokenizer(), engines, Telemetry(None)), drain=drain)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test"), drain


async def until(drain: Drain, in_flight: int) -> None:
    async with asyncio.timeout(10):
        while drain.in_flight != in_flight:
            await asyncio.sleep(0.001)


async def test_what_was_accepted_before_the_drain_finishes_streamed_or_not() -> None:
    client, drain = await make(itl_s=0.01)
    async with client:
        asks = [
            asyncio.create_task(client.post("/v1/completions", json=BODY | {"stream": stream}))
            for stream in (True, False)
        ]
        await until(drain, 2)
        assert drain.start() == 2
        streamed, whole = await asyncio.gather(*asks)
    assert read_sse(streamed.text)[-1] == "[DONE]"
    assert whole.json()["choices"][0]["text"] == "hello there"
    assert drain.in_flight == 0


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
async def test_a_newcomer_is_sent_away_in_openais_words(path: str) -> None:
    client, drain = await make(itl_s=0.0)
    drain.start()
    async with client:
        answer = await client.post(path, json=BODY)
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "draining"
    assert answer.json()["error"]["type"] == "server_error"
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.headers["connection"] == "close"


async def test_a_load_balancer_is_told_to_leave_and_metrics_still_answer() -> None:
    client, drain = await make(itl_s=0.0)
    async with client:
        assert (await client.get("/health")).status_code == 200
        drain.start()
        for method in ("GET", "HEAD"):
            refused = await client.request(method, "/health")
            assert refused.status_code == 503
            assert "retry-after" in refused.headers
        metrics = await client.get("/metrics")
        assert metrics.status_code == 200
        assert "intserve_requests_in_flight" in metrics.text


async def test_at_the_limit_a_stream_is_told_in_band_and_an_answer_by_its_status() -> None:
    client, drain = await make(itl_s=0.01)
    async with client:
        asks = [
            asyncio.create_task(client.post("/v1/completions", json=ENDLESS | {"stream": stream}))
            for stream in (True, False)
        ]
        await until(drain, 2)
        await asyncio.sleep(0.1)  # the stream has its first tokens
        drain.start()
        assert drain.cut() == 2
        streamed, whole = await asyncio.gather(*asks)
    first, *_, last = read_sse(streamed.text)
    assert first["choices"][0]["text"]
    assert last["error"]["code"] == "engine_unavailable"
    assert whole.status_code == 503
    assert whole.json()["error"]["code"] == "engine_unavailable"
    assert "retry-after" in whole.headers
    assert drain.in_flight == 0


async def test_at_the_limit_a_body_that_still_arrives_is_answered() -> None:
    client, drain = await make(itl_s=0.0)

    async def slow_body() -> AsyncIterator[bytes]:
        yield b'{"model": '
        await asyncio.Event().wait()

    async with client:
        headers = {"content-type": "application/json"}
        ask = asyncio.create_task(
            client.post("/v1/completions", content=slow_body(), headers=headers)
        )
        await until(drain, 1)
        drain.cut()
        async with asyncio.timeout(10):
            answer = await ask
    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "engine_unavailable"
