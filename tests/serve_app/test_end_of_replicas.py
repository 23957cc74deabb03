"""How replicas end on a real Ray Serve: hung, stopped or replaced, no client is left in silence."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from ray import cloudpickle, serve
from support.configs import make_config
from support.serving import read_sse, wait_for

from serve_app.app import build, build_with
from serve_app.config import EchoOptions, ServeConfig
from serve_app.engines.echo import EchoEngine
from serve_app.engines.protocol import Event, GenerateRequest, Tokens
from serve_app.engines.stall import StallClock

pytestmark = pytest.mark.ray

MAX_STEP_S = 2.0


class StuckEngine(EchoEngine):
    """An echo that says its process id and then does no step any more, when the prompt says so."""

    def __init__(self, options: EchoOptions) -> None:
        super().__init__(options)
        self._stall = StallClock()

    def stalled_s(self) -> float:
        return self._stall.stalled_s()

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Event]:
        if bytes(request.prompt_ids).decode() == "hang":
            yield Tokens((1,), str(os.getpid()))
            self._stall.submitted()
            await asyncio.Event().wait()
        if bytes(request.prompt_ids).decode() == "wait":
            yield Tokens((1,), str(os.getpid()))
            await asyncio.Event().wait()
        async for event in super().generate(request):
            yield event


@pytest.fixture(scope="module")
def url(serve_url: str) -> Iterator[str]:
    config = make_config(
        echo=EchoOptions(),
        drain_s=2.0,
        max_step_s=MAX_STEP_S,
        health_check_period_s=1.0,
        enabled=False,  # what a client sees of a stream that is not resumed
    )
    options = config.pool.engine
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        app = build_with(config, lambda: StuckEngine(options))
        serve.run(app, name="stuck", route_prefix="/stuck")
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    yield f"{serve_url}/stuck"
    serve.delete("stuck")


def ask(url: str, prompt: str, **fields: Any) -> httpx.Response:
    body = {"model": "echo", "prompt": prompt, **fields}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=60)


def health(url: str) -> int:
    return httpx.get(f"{url}/health", timeout=10).status_code


@pytest.mark.timeout(180)
def test_clients_of_an_engine_that_hangs_are_told_and_another_takes_its_place(url: str) -> None:
    first, *rest = read_sse(ask(url, "hang", stream=True).text)
    pid = int(first["choices"][0]["text"])
    assert [item["error"]["code"] for item in rest] == ["engine_unavailable"]
    assert "finished no step" in rest[0]["error"]["message"]
    wait_for(lambda: health(url) == 503)  # whichever ingress answers: both are told
    wait_for(lambda: ask(url, "back?").status_code == 200, 60)
    wait_for(lambda: health(url) == 200)
    with pytest.raises(ProcessLookupError):  # nothing of it is left, hung as it is
        os.kill(pid, 0)


@pytest.mark.timeout(180)
def test_clients_of_a_process_that_is_stopped_are_told(url: str) -> None:
    wait_for(lambda: health(url) == 200)
    body = {"model": "echo", "prompt": "wait", "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
        lines = (line for line in answer.iter_lines() if line)
        (first,) = read_sse(next(lines) + "\n\n")
        pid = int(first["choices"][0]["text"])
        os.kill(pid, signal.SIGSTOP)
        try:
            wait_for(lambda: health(url) == 503)
            (told,) = read_sse(next(lines) + "\n\n")
        finally:
            os.kill(pid, signal.SIGKILL)  # Serve would notice half a minute later
    assert told["error"]["code"] == "engine_unavailable"
    wait_for(lambda: ask(url, "back?").status_code == 200, 60)


@pytest.mark.timeout(180)
async def test_streams_survive_an_update_and_newcomers_are_answered(serve_url: str) -> None:
    def configure(**fields: Any) -> ServeConfig:
        return make_config(echo=EchoOptions(itl_s=0.02), drain_s=60.0, **fields)

    def deploy(config: ServeConfig) -> None:
        serve.run(build(config), name="updated", route_prefix="/updated")

    await asyncio.to_thread(deploy, configure())
    url = f"{serve_url}/updated/v1/completions"
    body = {"model": "echo", "prompt": "abc", "max_tokens": 250, "ignore_eos": True, "stream": True}
    async with httpx.AsyncClient(timeout=90) as client:
        streams = [asyncio.create_task(client.post(url, json=body)) for _ in range(5)]
        await asyncio.sleep(1.0)
        update = asyncio.create_task(asyncio.to_thread(deploy, configure(default_max_tokens=2)))
        newcomers = []
        while not update.done():
            newcomers.append(await client.post(url, json={"model": "echo", "prompt": "hello"}))
            await asyncio.sleep(0.1)
        await update
        ends = [read_sse((await stream).text)[-1] for stream in streams]
        last = await client.post(url, json={"model": "echo", "prompt": "hello"})
    assert ends == ["[DONE]"] * 5
    assert {answer.status_code for answer in newcomers} == {200}
    assert last.json()["choices"][0]["text"] == "he"
    await asyncio.to_thread(serve.delete, "updated")
