"""The merged stream of a request's choices: first events, final events, deadlines and aborts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from support.serving import make_request

from serve_app.config import EchoOptions
from serve_app.engines.echo import EchoEngine
from serve_app.engines.protocol import Done, Event, GenerateRequest, Tokens
from serve_app.errors import ApiError, DeadlineExceeded, Overloaded
from serve_app.openai.stream import open_stream


def deadline(seconds: float = 10.0) -> float:
    return asyncio.get_running_loop().time() + seconds


async def test_every_choice_ends_in_exactly_one_done() -> None:
    engine = EchoEngine(EchoOptions(max_running=2))
    requests = [make_request("hello", f"r-{i}", max_tokens=i + 1) for i in range(6)]
    merged = await open_stream(engine, requests, deadline())
    events = [(index, event) async for index, event in merged]
    for index in range(6):
        own = [event for at, event in events if at == index]
        assert sum(isinstance(event, Done) for event in own) == 1
        assert isinstance(own[-1], Done)
        assert sum(len(e.token_ids) for e in own if isinstance(e, Tokens)) == min(index + 1, 5)
    assert engine.load().running == 0


async def test_one_refused_choice_refuses_the_request_and_frees_the_others() -> None:
    class SecondRefused(EchoEngine):
        async def generate(self, asked: GenerateRequest) -> AsyncIterator[Event]:
            if asked.request_id == "r-1":
                await asyncio.sleep(0.01)
                raise Overloaded("full")
            async for event in super().generate(asked):
                yield event

    engine = SecondRefused(EchoOptions(itl_s=30.0))
    with pytest.raises(Overloaded):
        await open_stream(engine, [make_request(name=f"r-{i}") for i in range(3)], deadline())
    async with asyncio.timeout(5):
        while engine.load().running:
            await asyncio.sleep(0)


async def test_a_deadline_ends_every_open_choice_and_only_those() -> None:
    class OneSlow(EchoEngine):
        async def generate(self, asked: GenerateRequest) -> AsyncIterator[Event]:
            async for event in super().generate(asked):
                yield event
                if asked.request_id == "slow":
                    await asyncio.sleep(30)

    engine = OneSlow(EchoOptions())
    requests = [make_request(name="fast"), make_request(name="slow")]
    merged = await open_stream(engine, requests, deadline(0.2))
    done = {index: event async for index, event in merged if isinstance(event, Done)}
    assert {index: event.reason for index, event in done.items()} == {0: "stop", 1: "error"}
    assert isinstance(merged.errors[1], DeadlineExceeded)
    assert done[1].completion_tokens == 1


async def test_an_aborted_request_is_an_error_for_its_client() -> None:
    engine = EchoEngine(EchoOptions(itl_s=0.01))
    merged = await open_stream(engine, [make_request("x" * 90)], deadline())
    await engine.abort(["r", "unknown"])
    done = [event async for _, event in merged if isinstance(event, Done)]
    assert [event.reason for event in done] == ["abort"]
    assert isinstance(merged.errors[0], ApiError)
