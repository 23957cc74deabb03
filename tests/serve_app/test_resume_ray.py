"""Streams that outlive their replica on a real Ray Serve: killed, stopped, updated, or alone.

One application serves all of it. Its echo signs each answer with the process that began it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from ray import cloudpickle, serve
from support.configs import make_config
from support.serving import read_sse, wait_for

from serve_app.app import build_with
from serve_app.config import EchoOptions
from serve_app.engines.echo import EchoEngine
from serve_app.engines.protocol import Done, Event, GenerateRequest, Tokens

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

APP = "survivors"
#: Characters of the signature, which is one token.
SIGNED = 10
PROMPT = "abcdefg"
#: Tokens after the signature, and seconds between them.
LENGTH, ITL_S = 150, 0.02


class SignedEcho(EchoEngine):
    """Says its process id, then the prompt over and over."""

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Event]:
        if request.output_ids:
            request = replace(
                request,
                output_ids=request.output_ids[1:],
                num_shown=request.num_shown - SIGNED,
            )
        else:
            yield Tokens((1,), f"{os.getpid():0{SIGNED}d}")
        async for event in super().generate(request):
            if isinstance(event, Done):
                event = replace(event, completion_tokens=event.completion_tokens + 1)
            yield event


def deploy(**settings: Any) -> None:
    config = make_config(
        echo=EchoOptions(itl_s=ITL_S), health_check_period_s=1.0,
        **settings,
    )  # fmt: skip
    options = config.pool.engine
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        app = build_with(config, lambda: SignedEcho(options))
        serve.run(app, name=APP, route_prefix=f"/{APP}")
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def url(serve_url: str) -> Iterator[str]:
    deploy(replicas=3, drain_s=1.0)
    yield f"{serve_url}/{APP}/v1/completions"
    serve.delete(APP)


class Stream:
    """One streamed answer: `begun` once its first text is there."""

    def __init__(self, client: httpx.AsyncClient, url: str, length: int = LENGTH) -> None:
        self.begun = asyncio.Event()
        self.lines: list[str] = []
        self._length = length
        self.task = asyncio.create_task(self._read(client, url))

    async def _read(self, client: httpx.AsyncClient, url: str) -> None:
        body = {
            "model": "echo",
            "prompt": PROMPT,
            "max_tokens": self._length,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with client.stream("POST", url, json=body) as answer:
            assert answer.status_code == 200, await answer.aread()
            async for line in answer.aiter_lines():
                if line:
                    self.lines.append(line)
                    self.begun.set()

    @property
    def pid(self) -> int:
        """The process that began it."""
        return int(self._text(read_sse(self.lines[0] + "\n\n"))[:SIGNED])

    def _text(self, payloads: list[Any]) -> str:
        return "".join(
            choice["text"] for item in payloads if item != "[DONE]" for choice in item["choices"]
        )

    async def check(self) -> None:
        """It must be whole, without a token too many or too few."""
        await self.task
        payloads = read_sse("".join(f"{line}\n\n" for line in self.lines))
        assert payloads[-1] == "[DONE]", payloads[-1]
        said = self._text(payloads)[SIGNED:]
        assert said == (PROMPT * self._length)[: self._length]
        assert payloads[-2]["usage"]["completion_tokens"] == self._length + 1
        assert payloads[-2]["usage"]["prompt_tokens"] == len(PROMPT)


async def streams_under_way(
    client: httpx.AsyncClient, url: str, count: int, length: int = LENGTH
) -> list[Stream]:
    streams = [Stream(client, url, length) for _ in range(count)]
    async with asyncio.timeout(60):
        for stream in streams:
            await stream.begun.wait()
    await asyncio.sleep(10 * ITL_S)
    return streams


async def test_eight_streams_outlive_a_killed_replica_of_three(url: str) -> None:
    async with httpx.AsyncClient(timeout=120) as client:
        streams = await streams_under_way(client, url, 8)
        os.kill(streams[0].pid, signal.SIGKILL)
        for stream in streams:
            await stream.check()


@pytest.mark.slow
async def test_streams_outlive_a_stopped_process_and_what_it_says_later(url: str) -> None:
    async with httpx.AsyncClient(timeout=120) as client:
        streams = await streams_under_way(client, url, 6)
        pid = streams[0].pid
        os.kill(pid, signal.SIGSTOP)
        try:
            moved = [stream for stream in streams if stream.pid == pid]
            others = [stream for stream in streams if stream.pid != pid]
            for stream in others:
                await stream.check()
            await moved[0].check()
        finally:
            os.kill(pid, signal.SIGCONT)
        for stream in moved:
            await stream.check()


@pytest.fixture(scope="module")
def updated(url: str) -> list[BaseException | None]:
    """What came of streams that are longer than the time to drain, and of newcomers, during an
    update to a single replica."""

    async def update() -> list[BaseException | None]:
        async with httpx.AsyncClient(timeout=120) as client:
            streams = await streams_under_way(client, url, 4, 3 * LENGTH)
            deployed = asyncio.create_task(
                asyncio.to_thread(deploy, replicas=1, surge_percent=100, drain_s=1.0)
            )
            while not deployed.done():
                streams.append(Stream(client, url))
                await asyncio.sleep(0.5)
            await deployed
            return await asyncio.gather(
                *(stream.check() for stream in streams), return_exceptions=True
            )

    return asyncio.run(update())


def test_an_update_loses_no_request_though_streams_outlast_the_drain(
    updated: list[BaseException | None],
) -> None:
    assert len(updated) > 4
    assert updated == [None] * len(updated)


@pytest.mark.usefixtures("updated")
async def test_streams_wait_for_the_only_replica_to_be_made_again(url: str) -> None:
    async with httpx.AsyncClient(timeout=120) as client:
        streams = await streams_under_way(client, url, 3)
        first = streams[0].pid
        os.kill(first, signal.SIGKILL)
        for stream in streams:
            await stream.check()
        (later,) = await streams_under_way(client, url, 1)
        assert later.pid != first
        await later.check()


@pytest.mark.usefixtures("updated")
async def test_a_deleted_application_tells_its_clients(url: str) -> None:
    """Last in this file: nothing is left to go on with."""
    async with httpx.AsyncClient(timeout=120) as client:
        streams = await streams_under_way(client, url, 2, 10 * LENGTH)
        await asyncio.to_thread(serve.delete, APP)
        for stream in streams:
            await stream.task
    for stream in streams:
        (last,) = read_sse(stream.lines[-1] + "\n\n")
        assert last["error"]["code"] == "engine_unavailable"
    wait_for(lambda: APP not in serve.status().applications)
