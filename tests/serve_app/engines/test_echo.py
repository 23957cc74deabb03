"""The echo engine: what it repeats, where it stops, and that it keeps its schedule."""

from __future__ import annotations

import asyncio
import itertools

from support.serving import make_request, read_answer

from deepseek.engine.request import TokenLogprob, TopLogprob
from serve_app.config import EchoOptions
from serve_app.engines.echo import EchoEngine
from serve_app.engines.protocol import Done, PromptLogprobs


class _AnyTime(float):
    def __eq__(self, other: object) -> bool:
        return isinstance(other, float) and other >= 0.0

    __hash__ = float.__hash__


ANY_TIMES = [_AnyTime()] * 3


async def test_the_echo_says_the_prompt_back_and_counts() -> None:
    engine = EchoEngine(EchoOptions())
    answer = await read_answer(engine, make_request("hé €"))
    assert answer == ("hé €", Done("stop", 7, 7, 0, *ANY_TIMES))
    text, done = await read_answer(engine, make_request("abc", ignore_eos=True, max_tokens=8))
    assert (text, done.reason, done.completion_tokens) == ("abcabcab", "length", 8)
    assert engine.load().running == engine.load().kv_tokens_used == 0


async def test_a_prompts_tokens_are_certain_and_are_told_before_any_other() -> None:
    engine = EchoEngine(EchoOptions())
    asked = make_request("aé", max_tokens=1, prompt_logprobs=1)
    first, *_, done = [event async for event in engine.generate(asked)]
    half = TokenLogprob(0xC3, "", 0.0, (TopLogprob(0xC3, "", 0.0, b"\xc3"),), b"\xc3", 1)
    rest = TokenLogprob(0xA9, "é", 0.0, (TopLogprob(0xA9, "é", 0.0, b"\xa9"),), b"\xa9", 1)
    assert first == PromptLogprobs((None, half, rest))
    assert done.completion_tokens == 1
    alone = [event async for event in engine.generate(make_request("a", max_tokens=0))]
    assert alone == [Done("length", 1, 0, 0, *ANY_TIMES)]


async def test_no_part_of_a_stop_string_is_shown_however_the_pieces_fall() -> None:
    engine = EchoEngine(EchoOptions())
    for stop in (("lo",), ("llo w", "world"), ("ld!", "xyz"), ("h",), ("zzz",)):
        text, done = await read_answer(engine, make_request("hello world", stop=stop))
        cut = min((at for s in stop if (at := "hello world".find(s)) >= 0), default=11)
        assert text == "hello world"[:cut], stop
        assert done.reason == "stop"


async def test_the_echo_keeps_its_schedule_and_its_places() -> None:
    engine = EchoEngine(EchoOptions(ttft_s=0.05, itl_s=0.01, max_running=1))
    results = await asyncio.gather(
        *(read_answer(engine, make_request("abcdef", name=f"r{i}")) for i in range(2))
    )
    (_, first), (_, second) = results
    assert 0.05 <= first.prefill_s < 1.0
    assert first.decode_s < 1.0
    # The schedule is absolute: a first token that is late shortens the time of the others.
    assert first.prefill_s + first.decode_s >= 0.1 - 1e-6
    assert first.queue_s < second.queue_s
    assert second.queue_s >= 0.1
    for earlier, later in itertools.pairwise(results):
        assert earlier[0] == later[0] == "abcdef"
