"""Real replicas that appear and vanish under load: one to four and back, and from zero."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from ray import serve
from support.configs import make_config
from support.load import Outcome, complete
from support.serving import metric, wait_for

from serve_app.app import build
from serve_app.config import EchoOptions

pytestmark = [pytest.mark.ray, pytest.mark.slow]

APP = "scaled"
#: Windows of seconds, so that what takes minutes in a cluster can be seen.
QUICK = {
    "target_ttft_s": 0.5,
    "target_itl_s": None,
    "window_s": 2.0,
    "up_period_s": 1.0,
    "down_period_s": 2.0,
    "warmup_trust": 1.0,
}


@contextmanager
def scaled(serve_url: str, **autoscaling: Any) -> Iterator[str]:
    """The URL of an application whose one pool scales; four places in each replica."""
    pool = {
        "engine": {"kind": "echo", "itl_s": 0.02, "max_model_len": 4096},
        "max_ongoing_requests": 4,
        "max_request_tokens": 4096,
        "cpus": 0.1,
        "drain_s": 60.0,
        "autoscaling": {**QUICK, **autoscaling},
    }
    config = make_config(echo=EchoOptions(), ingress={"replicas": 1}, pools={"default": pool})
    serve.run(build(config), name=APP, route_prefix=f"/{APP}")
    try:
        yield f"{serve_url}/{APP}"
    finally:
        serve.delete(APP)


def ready(url: str) -> float:
    text = httpx.get(f"{url}/metrics", timeout=30).text
    return metric(text, "intserve_pool_replicas_ready", pool="default")


def body(tokens: int) -> dict[str, Any]:
    return {"model": "echo", "prompt": "abc", "max_tokens": tokens, "ignore_eos": True}


async def in_a_thread(condition: Any, timeout_s: float) -> None:
    await asyncio.to_thread(wait_for, condition, timeout_s)


async def test_under_load_there_are_four_and_then_one_and_no_stream_is_cut(serve_url: str) -> None:
    with scaled(serve_url, max_replicas=4) as url:
        await in_a_thread(lambda: ready(url) == 1, 60.0)
        outcomes: list[Outcome] = []
        busy = True

        async def client() -> None:
            while busy:
                outcomes.append(await complete(url, body(100)))

        async with asyncio.TaskGroup() as tasks:
            for _ in range(16):
                tasks.create_task(client())
            await in_a_thread(lambda: ready(url) == 4, 120.0)
            # Several long streams, so that one of them is on a replica that goes.
            streams = [tasks.create_task(complete(url, body(1500))) for _ in range(8)]
            await asyncio.sleep(3.0)
            busy = False
            await in_a_thread(lambda: ready(url) == 1, 180.0)
        assert all(outcome.complete for outcome in outcomes)
        assert {outcome.text for outcome in outcomes} == {("abc" * 34)[:100]}
        finished = [stream.result() for stream in streams]
        assert all(outcome.complete for outcome in finished)
        assert {outcome.text for outcome in finished} == {"abc" * 500}


async def test_from_zero_a_request_is_held_until_a_replica_is_there(serve_url: str) -> None:
    zero = {"min_replicas": 0, "max_replicas": 1, "idle_s": 4.0}
    with scaled(serve_url, **zero) as url:
        await in_a_thread(lambda: ready(url) == 0, 120.0)
        outcome = await complete(url, body(30))
        assert outcome.complete
        assert outcome.text == "abc" * 10
        await in_a_thread(lambda: ready(url) == 0, 120.0)


async def test_from_zero_a_request_may_be_refused_and_starts_a_replica(serve_url: str) -> None:
    zero = {"min_replicas": 0, "max_replicas": 1, "idle_s": 10.0, "from_zero": "refuse"}
    with scaled(serve_url, **zero) as url:
        await in_a_thread(lambda: ready(url) == 0, 120.0)
        refused = await complete(url, body(30))
        assert refused.status == 503
        assert refused.retry_after_s is not None
        await in_a_thread(lambda: ready(url) == 1, 120.0)
        assert (await complete(url, body(30))).complete
