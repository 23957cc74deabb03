"""What an engine says on after another replica: for both adapters, the rest of the whole answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.configs import make_config
from support.serving import make_request

from deepseek.engine.request import SamplingParams, TokenLogprob
from deepseek.errors import RequestError
from deepseek.source.checkpoint import CheckpointReader
from quant_jobs.targets.embedded import pack_engine
from serve_app.config import EchoOptions
from serve_app.engines.echo import EchoEngine
from serve_app.engines.embedded import EmbeddedEngine
from serve_app.engines.protocol import Done, Engine, Event, GenerateRequest, Tokens

Answer = tuple[tuple[int, ...], str, tuple[TokenLogprob, ...]]


def said(events: Sequence[Event]) -> Answer:
    """The tokens, text and logprobs of some events."""
    tokens = [event for event in events if isinstance(event, Tokens)]
    return (
        tuple(token for event in tokens for token in event.token_ids),
        "".join(event.text for event in tokens),
        tuple(item for event in tokens for item in event.logprobs),
    )


def ending(events: Sequence[Event]) -> tuple[str, int, int]:
    """The reason and the counts."""
    done = events[-1]
    assert isinstance(done, Done)
    return done.reason, done.prompt_tokens, done.completion_tokens


async def events_of(engine: Engine, request: GenerateRequest) -> list[Event]:
    return [event async for event in engine.generate(request)]


def after(request: GenerateRequest, begun: Sequence[Event], name: str = "rest") -> GenerateRequest:
    tokens, text, _ = said(begun)
    return replace(request, request_id=name, output_ids=tokens, num_shown=len(text))


async def check_every_split(engine: Engine, request: GenerateRequest) -> None:
    """Wherever the events before `Done` are cut in two, the rest is as if nothing had been cut."""
    whole = await events_of(engine, request)
    told = said(whole)
    cuts = range(1, len(whole))
    rests = await asyncio.gather(
        *(events_of(engine, after(request, whole[:cut], f"rest-{cut}")) for cut in cuts)
    )
    for cut, rest in zip(cuts, rests, strict=True):
        begun = said(whole[:cut])
        now = said(rest)
        assert (begun[0] + now[0], begun[1] + now[1], begun[2] + now[2]) == told, cut
        assert ending(rest) == ending(whole), cut


# The echo.


@settings(max_examples=60, deadline=None)
@given(
    prompt=st.text(alphabet="abc é世🙂", min_size=1, max_size=10),
    stop=st.lists(st.text(alphabet="abc é世🙂", min_size=1, max_size=4), max_size=3),
    max_tokens=st.integers(1, 40),
    ignore_eos=st.booleans(),
    logprobs=st.sampled_from([None, 0, 2]),
)
def test_an_echo_goes_on_at_any_token(
    prompt: str, stop: list[str], max_tokens: int, ignore_eos: bool, logprobs: int | None
) -> None:
    request = make_request(
        prompt, max_tokens=max_tokens, stop=tuple(stop), ignore_eos=ignore_eos, logprobs=logprobs
    )
    engine = EchoEngine(EchoOptions())
    asyncio.run(check_every_split(engine, request))
    assert engine.load().running == engine.load().kv_tokens_used == 0


async def test_the_schedule_of_a_continued_echo_starts_anew() -> None:
    engine = EchoEngine(EchoOptions(ttft_s=0.05, itl_s=0.02))
    rest = await events_of(engine, replace(make_request("abcdef"), output_ids=tuple(b"abc")))
    done = rest[-1]
    assert isinstance(done, Done)
    assert said(rest)[:2] == (tuple(b"def"), "abcdef")  # no text had been passed on
    assert done.prefill_s >= 0.05 - 1e-6
    assert done.prefill_s + done.decode_s >= 0.05 + 2 * 0.02 - 1e-6


async def test_a_continued_echo_does_not_wait_for_the_tokens_that_it_was_given() -> None:
    engine = EchoEngine(EchoOptions(itl_s=600.0))
    request = replace(make_request("abcdef", max_tokens=4), output_ids=tuple(b"abc"), num_shown=3)
    async with asyncio.timeout(30):
        rest = await events_of(engine, request)
    assert said(rest)[:2] == (tuple(b"d"), "d")
    assert ending(rest) == ("length", 6, 4)


async def test_an_echo_that_had_ended_says_so_without_waiting() -> None:
    engine = EchoEngine(EchoOptions(ttft_s=60.0))
    async with asyncio.timeout(30):
        for sampling, given_ids, text, reason in (
            ({"max_tokens": 2}, b"ab", "ab", "length"),
            ({"stop": ("c",)}, b"abc", "ab", "stop"),
            ({}, b"abcd", "abcd", "stop"),
        ):
            request = replace(make_request("abcd", **sampling), output_ids=tuple(given_ids))
            rest = await events_of(engine, replace(request, num_shown=1))
            assert said(rest) == ((), text[1:], ())
            assert ending(rest) == (reason, 4, len(given_ids))


@pytest.mark.parametrize(
    ("output_ids", "num_shown", "sampling", "sentence"),
    [
        (b"abd", 0, {}, r"differ from what an echo says at position 2"),
        (b"abcda", 0, {}, r"differ from what an echo says at position 4"),
        (b"abc", 0, {"max_tokens": 2}, r"3 output_ids, more than max_tokens 2"),
        (b"abc", 4, {}, r"num_shown is 4, but only 3 characters"),
        (b"abc", 3, {"stop": ("cd",)}, r"num_shown is 3, but only 2 characters"),
        (b"a", 1, {"prompt_logprobs": 0}, r"prompt_logprobs .* ask for none"),
    ],
)
async def test_what_no_echo_said_is_refused_before_it_takes_a_place(
    output_ids: bytes, num_shown: int, sampling: dict[str, Any], sentence: str
) -> None:
    engine = EchoEngine(EchoOptions(max_running=1))
    request = replace(
        make_request("abcd", **sampling), output_ids=tuple(output_ids), num_shown=num_shown
    )
    for _ in range(2):
        with pytest.raises(RequestError, match=sentence):
            await events_of(engine, request)
    assert await events_of(engine, make_request("a"))


async def test_a_token_that_is_no_byte_is_no_echo() -> None:
    engine = EchoEngine(EchoOptions())
    with pytest.raises(RequestError, match=r"outside 0\.\.255"):
        await events_of(engine, replace(make_request("a"), output_ids=(256,)))


# The embedded engine.


@pytest.fixture(scope="module")
def engine_dir(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("continuing") / "tiny"
    pack_engine(CheckpointReader(tiny_model), directory)
    return directory


@pytest.fixture
async def embedded(engine_dir: Path) -> AsyncIterator[EmbeddedEngine]:
    config = make_config(
        engine=engine_dir, allow_ungated=True, max_model_len=256, kv_tokens=4096, num_threads=1
    )
    engine = EmbeddedEngine(config.pool.engine)
    info = await engine.start()
    assert info.continues
    yield engine
    async with asyncio.timeout(10):
        while engine.load().kv_tokens_used:
            await asyncio.sleep(0.001)
    await engine.shutdown()


def asked(**sampling: Any) -> GenerateRequest:
    fields = {"max_tokens": 16, "temperature": 0.0, "ignore_eos": True} | sampling
    return GenerateRequest(
        request_id="r", prompt_ids=tuple(range(300, 330)), sampling=SamplingParams(**fields)
    )


@pytest.mark.heavy
@pytest.mark.parametrize(
    "sampling",
    [{"logprobs": 2}, {"temperature": 1.2, "top_p": 0.95, "top_k": 200, "seed": 9, "logprobs": 0}],
    ids=["greedy", "seeded"],
)
async def test_the_embedded_engine_goes_on_at_any_token(
    embedded: EmbeddedEngine, sampling: dict[str, Any]
) -> None:
    await check_every_split(embedded, asked(**sampling))


async def test_an_aborted_continuation_counts_the_tokens_of_both(embedded: EmbeddedEngine) -> None:
    begun = asked(max_tokens=200)
    first = embedded.generate(begun)
    events = [await anext(first) for _ in range(3)]
    await first.aclose()
    stream = embedded.generate(after(begun, events))
    rest = [await anext(stream) for _ in range(2)]
    await embedded.abort(["rest"])
    rest += [event async for event in stream]
    reason, _, completion_tokens = ending(rest)
    assert (reason, completion_tokens) == ("abort", 3 + len(said(rest)[0]))


async def test_the_embedded_engine_refuses_what_it_cannot_go_on_with(
    embedded: EmbeddedEngine,
) -> None:
    unseeded = replace(asked(temperature=1.0), output_ids=(300,))
    with pytest.raises(RequestError, match="need the seed"):
        await events_of(embedded, unseeded)
    with pytest.raises(RequestError, match="num_shown is 99"):
        await events_of(embedded, replace(asked(), output_ids=(300,), num_shown=99))
