"""Answers of a remote engine: text, stops, limits and counts are made here, from token ids alone.

The worker is a real process whose engine is a script that says the prompt back.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from pathlib import Path

import pytest
import uvloop
from support.remote_engines import (
    END,
    answer_of,
    eventually,
    journal,
    running,
    scripted,
    scripted_plan,
)
from support.serving import make_request

from deepseek.errors import RequestError
from serve_app.engines.protocol import Done, GenerateRequest, PromptLogprobs, Tokens
from serve_app.engines.remote.launch import Deadlines


def aborts(directory: Path) -> list[int]:
    return [line["id"] for line in journal(directory, "abort")]


async def test_a_text_is_decoded_here_and_its_tokens_are_counted_here(tmp_path: Path) -> None:
    async with running(scripted(tmp_path, per_step=3)) as engine:
        text, done = await answer_of(engine, make_request("grüße an alle", max_tokens=10))
        assert text == "grüße an"
        assert (done.reason, done.prompt_tokens, done.completion_tokens) == ("length", 15, 10)
        assert done.cached_tokens == 3
        assert done.queue_s > 0.0  # the engine said a millisecond, of less that there was

        # The end token counts and has no text; without a reason of the engine's the count decides.
        ended = make_request(f"ab{chr(END)}cd")
        assert (await answer_of(engine, ended))[0] == "ab"
        text, done = await answer_of(engine, make_request("unnamed but whole", max_tokens=9))
        assert (text, done.reason, done.completion_tokens) == ("unnamed b", "length", 9)
        text, done = await answer_of(engine, make_request(f"unnamed {chr(END)}"))
        assert (text, done.reason, done.completion_tokens) == ("unnamed ", "stop", 9)
    assert aborts(tmp_path) == []  # nothing was left to stop


async def test_sampling_is_explicit_in_every_request(tmp_path: Path) -> None:
    async with running(scripted(tmp_path)) as engine:
        await answer_of(engine, make_request("one", "a", max_tokens=1))
        await answer_of(engine, make_request("two", "b", max_tokens=1, seed=-5, temperature=0.5))
        await answer_of(engine, make_request("six", "c", max_tokens=1, temperature=0.0))
    told = journal(tmp_path, "request")
    assert [line["temperature"] for line in told] == [1.0, 0.5, 0.0]
    assert 0 <= told[0]["seed"] < 2**63  # drawn, because none was given
    assert told[1]["seed"] == 2**63 - 5
    assert told[2]["seed"] is None
    for line in told:
        assert (line["top_p"], line["top_k"], line["max_tokens"]) == (1.0, 0, 1)
        assert line["end_ids"] == [END]
        assert line["cache_salt"]


async def test_a_stop_string_over_two_steps_ends_the_text_and_aborts_once(tmp_path: Path) -> None:
    async with running(scripted(tmp_path, per_step=4, step_s=0.01)) as engine:
        request = make_request("say stop now and go on", stop=("stop now",), max_tokens=1000)
        text, done = await answer_of(engine, request)
        assert (text, done.reason) == ("say ", "stop")
        assert done.completion_tokens == len("say stop now")
        await eventually(lambda: engine.load().running == 0)
    assert len(aborts(tmp_path)) == 1


async def test_an_engine_deaf_to_its_limit_is_stopped_once(tmp_path: Path) -> None:
    async with running(scripted(tmp_path, per_step=3, step_s=0.01)) as engine:
        text, done = await answer_of(engine, make_request("deaf engine", max_tokens=7))
        assert (text, done.reason, done.completion_tokens) == ("deaf en", "length", 7)
        await eventually(lambda: engine.load().running == 0)
    assert len(aborts(tmp_path)) == 1


async def test_a_client_that_leaves_before_or_after_the_first_token_aborts_once(
    tmp_path: Path,
) -> None:
    async with running(scripted(tmp_path, step_s=0.01)) as engine:
        hanging = engine.generate(make_request("hang", "prefill"))
        waiting = asyncio.ensure_future(anext(hanging))
        await eventually(lambda: len(journal(tmp_path, "request")) == 1)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        decoding = engine.generate(make_request("a long answer", "decode", max_tokens=900))
        assert isinstance(await anext(decoding), Tokens)
        assert engine.load().kv_tokens_used > 0
        await decoding.aclose()
        await eventually(lambda: engine.load().running == 0)
        assert engine.load().kv_tokens_used == 0
    assert sorted(aborts(tmp_path)) == sorted(line["id"] for line in journal(tmp_path, "request"))


async def test_an_abort_ends_the_stream_and_reaches_the_engine_once(tmp_path: Path) -> None:
    async with running(scripted(tmp_path, step_s=0.01)) as engine:
        events = engine.generate(make_request("a long answer", "r", max_tokens=900, stop=("x",)))
        await anext(events)
        await engine.abort(["r", "unknown"])
        await engine.abort(["r"])
        rest = [event async for event in events]
        assert isinstance(rest[-1], Done)
        assert rest[-1].reason == "abort"
        await eventually(lambda: engine.load().running == 0)
    assert len(aborts(tmp_path)) == 1


async def test_logprobs_are_named_and_those_of_the_prompt_come_first(tmp_path: Path) -> None:
    async with running(scripted(tmp_path, per_step=2)) as engine:
        request = make_request("they", logprobs=1, prompt_logprobs=0, max_tokens=4)
        events = [event async for event in engine.generate(request)]
        assert isinstance(events[0], PromptLogprobs)
        first, *others = events[0].logprobs
        assert first is None
        assert [item.token for item in others if item] == ["h", "e", "y"]
        named = [item for e in events if isinstance(e, Tokens) for item in e.logprobs]
        assert [item.token for item in named] == ["t", "h", "e", "y"]
        assert [(item.logprob, item.rank, len(item.top)) for item in named] == [(-0.5, 1, 1)] * 4

        scored = make_request("only the prompt", prompt_logprobs=0, max_tokens=0)
        events = [event async for event in engine.generate(scored)]
        assert [type(event) for event in events] == [PromptLogprobs, Done]
        assert isinstance(events[-1], Done)
        assert (events[-1].reason, events[-1].completion_tokens) == ("length", 0)


async def test_a_request_goes_on_where_another_replica_ended(tmp_path: Path) -> None:
    async with running(scripted(tmp_path)) as engine:
        whole = make_request("0123456789", "w", max_tokens=10, temperature=0.0)
        begun = GenerateRequest(
            request_id="c",
            prompt_ids=whole.prompt_ids,
            output_ids=tuple(b"0123"),
            num_shown=3,
            sampling=whole.sampling,
        )
        text, done = await answer_of(engine, begun)
        assert done.completion_tokens == 10
        assert text == "3" + "012345"  # what was not shown, and what the script says of a prompt
        sent = journal(tmp_path, "request")[-1]
        assert bytes(sent["prompt_ids"]) == b"01234567890123"
        assert sent["max_tokens"] == 6

        # Tokens that end the request already need no engine.
        ended = GenerateRequest(
            request_id="e",
            prompt_ids=whole.prompt_ids,
            output_ids=(*b"01", END),
            sampling=whole.sampling,
        )
        text, done = await answer_of(engine, ended)
        assert (text, done.reason, done.completion_tokens) == ("01", "stop", 3)
    assert len(journal(tmp_path, "request")) == 1


async def test_what_does_not_fit_is_refused_before_the_engine(tmp_path: Path) -> None:
    async with running(scripted(tmp_path)) as engine:
        for prompt, words in (("x" * 1024, "at most 1023"), ("", "empty")):
            with pytest.raises(RequestError, match=words):
                await answer_of(engine, make_request(prompt))
        with pytest.raises(RequestError, match="scores at most 1023"):
            await answer_of(engine, make_request("x" * 1024, max_tokens=0))
        text, done = await answer_of(engine, make_request("x" * 1020, max_tokens=100))
        assert (text, done.reason) == ("x" * 4, "length")  # as many as the context has room for
    assert [line["max_tokens"] for line in journal(tmp_path, "request")] == [4]


async def test_errors_of_one_request_leave_the_others_alone(tmp_path: Path) -> None:
    async with running(scripted(tmp_path, step_s=0.005)) as engine:
        other = asyncio.create_task(answer_of(engine, make_request("a neighbor", "n")))
        with pytest.raises(RequestError, match="not to its taste"):
            await answer_of(engine, make_request("refuse this", "a"))
        _, done = await answer_of(engine, make_request("fail this", "b"))
        assert (done.reason, done.retryable) == ("error", False)
        assert done.error == "it failed alone"
        _, done = await answer_of(engine, make_request("cancelled by itself", "c"))
        assert (done.reason, done.retryable) == ("error", True)
        text, done = await other
        assert (len(text), done.reason) == (100, "length")
        await engine.check()


@pytest.mark.parametrize("figures", [True, False])
async def test_load_is_counted_here_with_and_without_the_engines_figures(
    tmp_path: Path, figures: bool
) -> None:
    engine = scripted(
        tmp_path,
        deadlines=Deadlines(load_every_s=0.02),
        step_s=0.01,
        max_running=2,
        figures=figures,
    )
    async with running(engine):
        streams = [
            engine.generate(make_request("a prompt of 30 bytes, or so it is", f"{i}"))
            for i in range(2)
        ]
        for stream in streams:
            await anext(stream)
        load = engine.load()
        assert (load.running, load.waiting) == (2, 0)
        assert load.kv_tokens_used == 2 * math.ceil(34 / 16) * 16
        assert load.kv_tokens_total == 4096
        assert load.cached_prompt_tokens == 2 * 3
        for stream in streams:
            await stream.aclose()
        await eventually(lambda: engine.load().kv_tokens_used == 0)


async def test_a_token_that_the_model_has_not_ends_the_request(tmp_path: Path) -> None:
    plan = replace(scripted_plan(tmp_path, step_s=0.01), vocab_size=120)
    async with running(scripted(tmp_path, plan=plan)) as engine:
        request = GenerateRequest(
            request_id="r",
            prompt_ids=(110, 119),
            sampling=make_request(max_tokens=4).sampling,
        )
        assert (await answer_of(engine, request))[1].reason == "length"
        with pytest.raises(RequestError, match=r"0\.\.119"):
            await answer_of(engine, make_request("zz"))


def test_an_engine_serves_on_uvloop_too_which_serve_runs_replicas_on(tmp_path: Path) -> None:
    async def serve() -> tuple[str, Done]:
        async with running(scripted(tmp_path, ranks=1)) as engine:
            return await answer_of(engine, make_request("hello", max_tokens=3))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        text, done = runner.run(serve())
    assert (text, done.reason) == ("hel", "length")
