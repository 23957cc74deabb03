"""The merged stream of a request's choices: first events, final events, deadlines and aborts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import pytest
from support.serving import make_request, read_sse

from serve_app.config import EchoOptions
from serve_app.engines.echo import EchoEngine
from serve_app.engines.protocol import Done, Event, GenerateRequest, Tokens
from serve_app.errors import ApiError, DeadlineExceeded, Overloaded
from serve_app.openai.answers import CompletionFormat
from serve_app.openai.logprobs import LogprobStyle
from serve_app.openai.stream import Answer, open_stream


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


class SecondRefused(EchoEngine):
    """Refuses the choice `r-1` after 0.01 s."""

    async def generate(self, asked: GenerateRequest) -> AsyncGenerator[Event, None]:
        if asked.request_id == "r-1":
            await asyncio.sleep(0.01)
            raise Overloaded("full")
        async for event in super().generate(asked):
            yield event


async def test_a_choice_refused_before_any_event_refuses_the_request_and_frees_the_others() -> None:
    engine = SecondRefused(EchoOptions(ttft_s=30.0))
    with pytest.raises(Overloaded):
        await open_stream(engine, [make_request(name=f"r-{i}") for i in range(3)], deadline())
    async with asyncio.timeout(5):
        while engine.load().running:
            await asyncio.sleep(0)


async def test_a_refusal_that_comes_with_the_first_event_refuses_the_request() -> None:
    class Refused(EchoEngine):
        async def generate(self, asked: GenerateRequest) -> AsyncGenerator[Event, None]:
            if asked.request_id == "r-1":
                raise Overloaded("full")
            async for event in super().generate(asked):
                yield event

    requests = [make_request(name=f"r-{i}") for i in range(2)]
    with pytest.raises(Overloaded):
        await open_stream(Refused(EchoOptions()), requests, deadline())


async def test_a_choice_refused_after_the_first_event_ends_in_an_error_of_its_own() -> None:
    engine = SecondRefused(EchoOptions(itl_s=0.03))
    requests = [make_request(name=f"r-{i}", max_tokens=4) for i in range(3)]
    merged = await open_stream(engine, requests, deadline())
    done = {index: event async for index, event in merged if isinstance(event, Done)}
    assert {index: event.reason for index, event in done.items()} == {
        0: "length",
        1: "error",
        2: "length",
    }
    assert isinstance(merged.errors[1], Overloaded)


async def test_the_first_choice_flows_while_others_wait_for_a_place_in_the_batch() -> None:
    """Two of four have a place and never end; their text comes all the same."""
    engine = EchoEngine(EchoOptions(max_running=2))
    requests = [make_request(name=f"r-{i}", max_tokens=10**6, ignore_eos=True) for i in range(4)]
    merged = await open_stream(engine, requests, deadline())
    answer = Answer(
        merged, CompletionFormat("id", "echo", LogprobStyle()), 4, lambda index, event: None
    )
    chunks = answer.sse(5, include_usage=False)
    indices = set()
    async with asyncio.timeout(5), aclosing(chunks):
        async for chunk in chunks:
            indices.add(read_sse(chunk.decode())[0]["choices"][0]["index"])
            if len(indices) == 2:
                break
    merged.close()
    assert (indices, engine.load().waiting) == ({0, 1}, 2)


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


@pytest.mark.parametrize("n", [1, 3])
async def test_the_last_text_of_a_choice_comes_with_its_finish_reason(n: int) -> None:
    engine = EchoEngine(EchoOptions())
    requests = [make_request("abc", f"r-{i}", max_tokens=2) for i in range(n)]
    merged = await open_stream(engine, requests, deadline())
    observed: list[tuple[int, Event]] = []
    answer = Answer(
        merged,
        CompletionFormat("id", "echo", LogprobStyle()),
        n,
        lambda index, event: observed.append((index, event)),
    )
    text = b"".join([frame async for frame in answer.sse(3, include_usage=True)]).decode()
    *chunks, last, end = read_sse(text)
    for index in range(n):
        parts = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert [(p["text"], p["finish_reason"]) for p in parts] == [("a", None), ("b", "length")]
    assert (last["usage"]["completion_tokens"], end) == (2 * n, "[DONE]")
    assert sorted(index for index, event in observed if isinstance(event, Done)) == [*range(n)]
    assert all(choice.done is not None for choice in answer.choices)
