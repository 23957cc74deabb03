"""Helpers for tests of the service: requests, engines in this process, a faulty engine, SSE."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

import httpx
from support.configs import make_config

from deepseek.engine.request import SamplingParams
from serve_app.config import EchoOptions
from serve_app.engines.echo import EchoEngine
from serve_app.engines.protocol import (
    Done,
    Engine,
    EngineInfo,
    Event,
    GenerateRequest,
    ReplicaStatus,
    Tokens,
)
from serve_app.errors import EngineUnavailable, Overloaded
from serve_app.openai.routes import make_app
from serve_app.openai.service import Service
from serve_app.openai.tokenizer import ByteTokenizer, Tokenizer
from serve_app.setting_types import POOL
from serve_app.telemetry.tracing import Telemetry


def make_request(text: str = "hello", name: str = "r", **sampling: Any) -> GenerateRequest:
    """A request to an engine whose tokens are bytes."""
    settings = SamplingParams(**{"max_tokens": 100, **sampling})
    return GenerateRequest(request_id=name, prompt_ids=tuple(text.encode()), sampling=settings)


async def read_answer(engine: Engine, request: GenerateRequest) -> tuple[str, Done]:
    """The whole text of one request, and its final event."""
    *tokens, done = [event async for event in engine.generate(request)]
    assert isinstance(done, Done)
    assert all(isinstance(event, Tokens) for event in tokens)
    return "".join(event.text for event in tokens if isinstance(event, Tokens)), done


class LocalEngines:
    """Implements `EngineClient` without the actor hop. The engine is started once, as a replica
    starts it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._info: EngineInfo | None = None

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        return self.engine.generate(request)

    async def statuses(self) -> list[ReplicaStatus]:
        info = await self.info()
        return [ReplicaStatus(replica_id="local", info=info, load=self.engine.load(), gated=True)]

    async def info(self) -> EngineInfo:
        """What the engine told when it started."""
        self._info = self._info or await self.engine.start()
        return self._info

    async def infos(self, *, wait: bool = True) -> Mapping[str, EngineInfo]:
        return {POOL: await self.info()}


class FaultyEngine(EchoEngine):
    """An echo that fails on request: the prompt's first word names the fault."""

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        fault = bytes(request.prompt_ids).decode().split()[0]
        length = len(request.prompt_ids)
        if fault == "overloaded":
            raise Overloaded("no room", retry_after_s=7)
        if fault == "unavailable":
            raise EngineUnavailable("gone")
        if fault == "bug":
            raise KeyError("secret-detail")
        if fault == "failed":
            yield Done("error", length, 0, error="the step failed")
            return
        yield Tokens((104, 105), "hi")
        if fault == "hang":
            import asyncio

            await asyncio.sleep(60)
        if fault == "late-bug":
            raise KeyError("secret-detail")
        if fault == "late-failed":
            yield Done("error", length, 2, error="the step failed")
        # "silent": the stream just ends, against the protocol


def make_service(
    engine: Engine | None = None,
    telemetry: Telemetry | None = None,
    tokenizer: Tokenizer | None = None,
    **settings: Any,
) -> Service:
    """A service over an engine in this process; `settings` are those of `make_config`."""
    config = make_config(**{"echo": EchoOptions(), **settings})
    if engine is None:
        assert isinstance(config.pool.engine, EchoOptions)
        engine = EchoEngine(config.pool.engine)
    tokenizer = tokenizer or ByteTokenizer()
    return Service(config, tokenizer, LocalEngines(engine), telemetry or Telemetry(None))


def client_of(service: Service) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(make_app(service), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test")


def read_sse(text: str) -> list[Any]:
    """The payloads of a whole event stream; `[DONE]` stays a string."""
    frames = [frame for frame in text.split("\n\n") if frame]
    assert all(frame.startswith("data: ") for frame in frames), text
    payloads = [frame.removeprefix("data: ") for frame in frames]
    return [item if item == "[DONE]" else json.loads(item) for item in payloads]


def metric(text: str, name: str, **labels: str) -> float:
    """Sum of the samples of one metric that carry these labels."""
    total = 0.0
    for line in text.splitlines():
        if line.startswith(("#", " ")) or line.partition("{")[0].partition(" ")[0] != name:
            continue
        if all(f'{key}="{value}"' in line for key, value in labels.items()):
            total += float(line.rpartition(" ")[2])
    return total


def wait_for(condition: Callable[[], Any], timeout_s: float = 20.0) -> Any:
    """Poll a condition on the service until it holds."""
    end = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, "the condition did not come about in time"
        time.sleep(0.02)
    return value


def told_health(url: str) -> Any:
    """What /health says once the ingress that answers knows of an engine. Where there are several,
    each learns of it by itself, so that one may not know yet when another has said so."""

    def ask() -> Any:
        answer = httpx.get(f"{url}/health", timeout=10)
        return answer.json() if answer.status_code == 200 else None

    return wait_for(ask, timeout_s=60)


class LocalHandle:
    """What `ReplicaClient` uses of a Serve handle, without the actor hop: each event is a message.
    `cancelled` holds the ids of the requests that were cancelled."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.cancelled: list[str] = []

    def options(self, **_: Any) -> LocalHandle:
        return self

    def remote(self, request: GenerateRequest) -> LocalResponse:
        return LocalResponse(self, request, self._engine.generate(request))


class LocalResponse:
    """What `ReplicaClient` uses of a Serve response."""

    def __init__(
        self, handle: LocalHandle, request: GenerateRequest, events: AsyncGenerator[Event, None]
    ) -> None:
        self._handle = handle
        self._request = request
        self._events = events

    async def __anext__(self) -> tuple[Event, ...]:
        return (await anext(self._events),)

    def cancel(self) -> None:
        self._handle.cancelled.append(self._request.request_id)
