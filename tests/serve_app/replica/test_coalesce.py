"""Messages of a stream: what is ready travels together, and nothing is lost, reordered or late."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

import pytest
from support.serving import make_request

from deepseek.engine.request import TokenLogprob
from serve_app.config import EchoOptions
from serve_app.engines.echo import EchoEngine
from serve_app.engines.events import merge_events
from serve_app.engines.protocol import Done, Event, PromptLogprobs, Tokens
from serve_app.errors import EngineUnavailable, Overloaded
from serve_app.replica.coalesce import MAX_INTERVAL_S, coalesce, flush_interval


def test_merging_keeps_order_and_loses_nothing() -> None:
    entry = TokenLogprob(1, "a", -0.5)
    done = Done("stop", 1, 3)
    events: list[Event] = [Tokens((1,), "a", (entry,)), Tokens((2, 3), "b"), done]
    assert merge_events(events) == (Tokens((1, 2, 3), "ab", (entry,)), done)
    prompt = PromptLogprobs((None, entry))
    assert merge_events([prompt, *events]) == (prompt, *merge_events(events))
    assert merge_events([]) == ()
    assert merge_events([done]) == (done,)
    assert merge_events(events[:1]) == (events[0],)


async def test_whatever_is_ready_goes_out_as_one_message() -> None:
    async def burst() -> AsyncIterator[Event]:
        yield Tokens((1,), "a")
        yield Tokens((2,), "b")
        await asyncio.sleep(0.05)
        yield Tokens((3,), "c")
        yield Done("stop", 1, 3)

    batches = [batch async for batch in coalesce(burst(), lambda: 0.0)]
    assert batches == [(Tokens((1, 2), "ab"),), (Tokens((3,), "c"), Done("stop", 1, 3))]


async def test_an_interval_delays_neither_the_first_message_nor_the_end() -> None:
    async def steady() -> AsyncIterator[Event]:
        for token in range(6):
            yield Tokens((token,), "x")
            await asyncio.sleep(0.001)
        yield Done("stop", 1, 6)

    loop = asyncio.get_running_loop()
    started = loop.time()
    batches = [batch async for batch in coalesce(steady(), lambda: 30.0)]
    assert loop.time() - started < 5.0
    assert batches[0] == (Tokens((0,), "x"),)
    assert len(batches) == 2
    assert batches[1][-1] == Done("stop", 1, 6)


def test_streams_share_a_budget_of_messages() -> None:
    assert flush_interval(1, 500.0) == 0.002
    assert flush_interval(32, 500.0) == 0.064
    assert flush_interval(1000, 500.0) == MAX_INTERVAL_S
    assert flush_interval(1000, None) == 0.0


async def test_coalescing_passes_failures_on_behind_what_came_before() -> None:
    async def failing() -> AsyncIterator[Event]:
        yield Tokens((1,), "a")
        raise Overloaded("full")

    batches = coalesce(failing(), lambda: 0.0)
    assert await anext(batches) == (Tokens((1,), "a"),)
    with pytest.raises(Overloaded):
        await anext(batches)


async def test_closing_the_coalescer_aborts_the_engine() -> None:
    engine = EchoEngine(EchoOptions(itl_s=30.0))
    batches = coalesce(engine.generate(make_request()), lambda: 0.0)
    await anext(batches)
    assert engine.load().running == 1
    await batches.aclose()
    async with asyncio.timeout(5):
        while engine.load().running:
            await asyncio.sleep(0)


async def test_an_engine_that_is_given_up_ends_its_streams_although_it_yields_nothing() -> None:
    async def hang() -> AsyncGenerator[Event, None]:
        yield Tokens((1,), "a")
        await asyncio.Event().wait()

    given_up: asyncio.Future[EngineUnavailable] = asyncio.Future()
    batches = coalesce(hang(), lambda: 30.0, given_up)
    assert await anext(batches) == (Tokens((1,), "a"),)
    rest = asyncio.create_task(anext(batches))
    await asyncio.sleep(0.01)
    given_up.set_result(EngineUnavailable("it hangs"))
    async with asyncio.timeout(5):
        with pytest.raises(EngineUnavailable, match="it hangs"):
            await rest


async def test_a_quiet_stream_says_that_it_lives() -> None:
    async def slow() -> AsyncIterator[Event]:
        await asyncio.sleep(0.1)
        yield Done("stop", 1, 0)

    *signs, end = [batch async for batch in coalesce(slow(), lambda: 0.0, quiet_s=0.01)]
    assert signs
    assert set(signs) == {()}
    assert end == (Done("stop", 1, 0),)
    assert [batch async for batch in coalesce(slow(), lambda: 0.0)] == [end]
