"""Streams: coalescing, merging of choices, and the echo engine's own manners."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator

import pytest

from deepseek.engine.request import SamplingParams, TokenLogprob
from serve_app.config import EchoOptions
from serve_app.engines.echo import EchoEngine
from serve_app.engines.protocol import (
    Done,
    Event,
    GenerateRequest,
    ReplicaStatus,
    Tokens,
)
from serve_app.errors import ApiError, DeadlineExceeded, Overloaded
from serve_app.openai.stream import open_stream
from serve_app.replica.coalesce import MAX_INTERVAL_S, coalesce, flush_interval, merge_events
from serve_app.routing.replica_client import MAX_AGE_S, StatusBoard


def request(text: str = "hello", name: str = "r", **sampling: object) -> GenerateRequest:
    settings = SamplingParams(**{"max_tokens": 100, **sampling})  # type: ignore[arg-type]
    return GenerateRequest(request_id=name, prompt_ids=tuple(text.encode()), sampling=settings)


async def said(engine: EchoEngine, asked: GenerateRequest) -> tuple[str, Done]:
    events = [event async for event in engine.generate(asked)]
    *tokens, done = events
    assert isinstance(done, Done)
    assert all(isinstance(event, Tokens) for event in tokens)
    return "".join(event.text for event in tokens if isinstance(event, Tokens)), done


def deadline(seconds: float = 10.0) -> float:
    return asyncio.get_running_loop().time() + seconds


def test_merging_keeps_order_and_loses_nothing() -> None:
    entry = TokenLogprob(1, "a", -0.5)
    done = Done("stop", 1, 3)
    events: list[Event] = [Tokens((1,), "a", (entry,)), Tokens((2, 3), "b"), done]
    assert merge_events(events) == (Tokens((1, 2, 3), "ab", (entry,)), done)
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
    batches = coalesce(engine.generate(request()), lambda: 0.0)
    await anext(batches)
    assert engine.load().running == 1
    await batches.aclose()
    async with asyncio.timeout(5):
        while engine.load().running:
            await asyncio.sleep(0)


async def test_every_choice_ends_in_exactly_one_done() -> None:
    engine = EchoEngine(EchoOptions(max_running=2))
    requests = [request("hello", f"r-{i}", max_tokens=i + 1) for i in range(6)]
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
        await open_stream(engine, [request(name=f"r-{i}") for i in range(3)], deadline())
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
    requests = [request(name="fast"), request(name="slow")]
    merged = await open_stream(engine, requests, deadline(0.2))
    done = {index: event async for index, event in merged if isinstance(event, Done)}
    assert {index: event.reason for index, event in done.items()} == {0: "stop", 1: "error"}
    assert isinstance(merged.errors[1], DeadlineExceeded)
    assert done[1].completion_tokens == 1


async def test_an_aborted_request_is_an_error_for_its_client() -> None:
    engine = EchoEngine(EchoOptions(itl_s=0.01))
    merged = await open_stream(engine, [request("x" * 90)], deadline())
    await engine.abort(["r", "unknown"])
    done = [event async for _, event in merged if isinstance(event, Done)]
    assert [event.reason for event in done] == ["abort"]
    assert isinstance(merged.errors[0], ApiError)


async def test_the_echo_says_the_prompt_back_and_counts() -> None:
    engine = EchoEngine(EchoOptions())
    assert await said(engine, request("hé €")) == ("hé €", Done("stop", 7, 7, 0, *ANY_TIMES))
    text, done = await said(engine, request("abc", ignore_eos=True, max_tokens=8))
    assert (text, done.reason, done.completion_tokens) == ("abcabcab", "length", 8)
    assert engine.load().running == engine.load().kv_tokens_used == 0


class _AnyTime(float):
    def __eq__(self, other: object) -> bool:
        return isinstance(other, float) and other >= 0.0

    __hash__ = float.__hash__


ANY_TIMES = [_AnyTime()] * 3


async def test_no_part_of_a_stop_string_is_shown_however_the_pieces_fall() -> None:
    engine = EchoEngine(EchoOptions())
    for stop in (("lo",), ("llo w", "world"), ("ld!", "xyz"), ("h",), ("zzz",)):
        text, done = await said(engine, request("hello world", stop=stop))
        cut = min((at for s in stop if (at := "hello world".find(s)) >= 0), default=11)
        assert text == "hello world"[:cut], stop
        assert done.reason == "stop"


async def test_the_echo_keeps_its_schedule_and_its_places() -> None:
    engine = EchoEngine(EchoOptions(ttft_s=0.05, itl_s=0.01, max_running=1))
    results = await asyncio.gather(
        *(said(engine, request("abcdef", name=f"r{i}")) for i in range(2))
    )
    (_, first), (_, second) = results
    assert 0.05 <= first.prefill_s < 1.0
    assert 0.05 <= first.decode_s < 1.0
    assert first.queue_s < second.queue_s
    assert second.queue_s >= 0.1
    for earlier, later in itertools.pairwise(results):
        assert earlier[0] == later[0] == "abcdef"


async def test_a_replica_that_sends_no_heartbeat_is_forgotten() -> None:
    now = 100.0
    board = StatusBoard(clock=lambda: now)
    engine = EchoEngine(EchoOptions())
    info = await engine.start()
    waiting = asyncio.create_task(board.first())
    await asyncio.sleep(0)
    old, new = (
        ReplicaStatus(replica_id=name, info=info, load=engine.load(), gated=True)
        for name in ("old", "new")
    )
    board.note(old)
    assert await waiting == old
    now += MAX_AGE_S
    board.note(new)
    assert board.fresh() == [old, new]
    now += 0.1
    assert board.fresh() == [new]
