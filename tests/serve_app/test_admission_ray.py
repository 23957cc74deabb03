"""One owner of admission for two ingresses on a real Ray, and what happens when it dies."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import ray
from ray import serve
from support.configs import make_config
from support.serving import metric, read_sse, told_health

from serve_app.app import build
from serve_app.config import EchoOptions
from serve_app.routing.owner import NAMESPACE, owner_name

pytestmark = [pytest.mark.ray, pytest.mark.heavy]

APP = "admission"
PLACES, CONCURRENCY, PER_MINUTE = 8, 20, 60


@pytest.fixture(scope="module")
def url(serve_url: str) -> Iterator[str]:
    config = make_config(
        echo=EchoOptions(ttft_s=0.05, itl_s=0.02),
        ingress={"replicas": 2},
        max_ongoing_requests=PLACES,
        drain_s=2.0,
        key_limits={"max_concurrency": CONCURRENCY, "requests_per_minute": PER_MINUTE},
    )
    serve.run(build(config), name=APP, route_prefix=f"/{APP}")
    told_health(f"{serve_url}/{APP}")
    yield f"{serve_url}/{APP}"
    serve.delete(APP)


def owner() -> Any:
    return ray.get_actor(owner_name(APP), namespace=NAMESPACE)


def owner_pid() -> int:
    return int(ray.get(owner().__ray_call__.remote(lambda self: os.getpid()), timeout=20))


def stats() -> Any:
    return ray.get(owner().stats.remote(), timeout=20)


def body(tokens: int, **fields: Any) -> dict[str, Any]:
    return {"model": "echo", "prompt": "abc", "max_tokens": tokens, "ignore_eos": True, **fields}


async def ask(client: httpx.AsyncClient, tokens: int) -> httpx.Response:
    return await client.post("/v1/completions", json=body(tokens, stream=True))


def new_client(url: str) -> httpx.AsyncClient:
    """Every request on a connection of its own, so that both ingresses get some."""
    limits = httpx.Limits(max_keepalive_connections=0)
    return httpx.AsyncClient(base_url=url, timeout=60, limits=limits)


async def fill(client: httpx.AsyncClient) -> list[asyncio.Task[httpx.Response]]:
    """As many requests as the key may have, known to the owner; each further one is refused."""
    requests = [asyncio.create_task(ask(client, 100)) for _ in range(CONCURRENCY)]
    async with asyncio.timeout(20):
        while True:
            now = await asyncio.to_thread(stats)
            held = sum(replica.held for replica in now.replicas)
            assert held <= PLACES
            if held + sum(key.sequences for key in now.queued) == CONCURRENCY:
                break
            await asyncio.sleep(0.02)
    refused = await asyncio.gather(*(ask(client, 1) for _ in range(6)))
    assert [answer.status_code for answer in refused] == [429] * 6
    assert refused[0].json()["error"]["code"] == "too_many_requests"
    return requests


async def test_limits_hold_over_both_ingresses_and_outlive_their_owner(url: str) -> None:
    started = time.monotonic()
    async with new_client(url) as client:
        requests = await fill(client)
        text = (await client.get("/metrics")).text
        exchanges = [
            float(line.rpartition(" ")[2])
            for line in text.splitlines()
            if line.startswith("intserve_admission_exchanges_total{")
        ]
        assert len(exchanges) == 2
        assert all(exchanges)
        assert metric(text, "intserve_admission_joins_total") == 2

        # The owner dies while eight run and twelve wait.
        old = await asyncio.to_thread(owner_pid)
        os.kill(old, signal.SIGKILL)
        answers = await asyncio.gather(*requests)
        assert [answer.status_code for answer in answers] == [200] * CONCURRENCY
        assert all(read_sse(answer.text)[-1] == "[DONE]" for answer in answers)
        assert await asyncio.to_thread(owner_pid) != old
        text = (await client.get("/metrics")).text
        assert metric(text, "intserve_admission_joins_total") >= 4
        health = (await client.get("/health")).json()
        assert health["admission"] == {"owner": "ok", "waiting": 0}

        requests = await fill(client)
        answers = await asyncio.gather(*requests)
        assert [answer.status_code for answer in answers] == [200] * CONCURRENCY

        # The rate of the last minute is known to the new owner.
        accepted = 2 * CONCURRENCY
        for _ in range(3 * PER_MINUTE):
            answer = await ask(client, 1)
            if answer.status_code != 200:
                break
            accepted += 1
        assert answer.json()["error"]["code"] == "rate_limited"
        refilled = (time.monotonic() - started) * PER_MINUTE / 60
        assert accepted <= PER_MINUTE + refilled + 1
