"""A run that goes on on another engine is the undisturbed one: tokens, text, logprobs, end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.continuing import Answer, Scripted, answer, continued, splits
from support.engines import request, run
from tokenizers import Tokenizer

from deepseek.engine.engine import EngineOptions, LLMEngine
from deepseek.engine.request import Request, StepOutput
from deepseek.errors import RequestError

#: What distinguishes requests of the real model.
SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"logprobs": 3},
    "seeded": {"temperature": 0.9, "top_k": 60, "top_p": 0.9, "seed": 11, "logprobs": 1},
    "hot": {"temperature": 2.5, "seed": -7, "logprobs": 0},
    "silent": {"temperature": 1.0, "seed": 2**63 - 1, "ignore_eos": False},
}
PROMPT = [(41 * i) % 1900 + 100 for i in range(50)]


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> LLMEngine:
    """Shared by tests that leave it idle. Each request computes all of its tokens."""
    options = EngineOptions(
        max_kv_tokens=4096,
        max_model_len=512,
        max_batch_size=40,
        poison_free_pages=True,
        prefix_cache=False,
    )
    return LLMEngine.from_checkpoint(tiny_model, options)


def another(engine: LLMEngine, model: Any = None, **options: Any) -> LLMEngine:
    """An engine of the same model, or of a fake one, with cache and scheduler of its own."""
    return LLMEngine(
        model or engine._runner.model,
        engine.identity,
        EngineOptions(poison_free_pages=True, prefix_cache=False, **options),
        tokenizer=engine.tokenizer,
        end_token_ids=engine._end_token_ids,
    )


@pytest.fixture(autouse=True)
def left_idle(engine: LLMEngine) -> Iterator[None]:
    yield
    check_idle(engine)


def check_idle(engine: LLMEngine) -> None:
    assert not engine.has_work
    assert engine.current_load().kv_tokens_used == 0


def check_continued(
    other: LLMEngine, parts: dict[str, tuple[Answer, Request]], whole: Answer, *company: Request
) -> None:
    """Every part and its continuation on `other` make up the whole run."""
    outputs = run(other, [*company, *(rest for _, rest in parts.values())])
    for name, (begun, _) in parts.items():
        assert begun + answer(outputs[name]) == whole, name
    check_idle(other)


# The model's own arithmetic.


@pytest.mark.heavy
@pytest.mark.parametrize("name", SAMPLINGS)
def test_at_every_token_the_rest_is_that_of_the_undisturbed_run(
    name: str, engine: LLMEngine
) -> None:
    asked = request(name, PROMPT, 20, **SAMPLINGS[name])
    whole = run(engine, [asked])[name]
    parts = splits(asked, whole)
    assert len(parts) > 10
    company = [request(str(n), PROMPT[n:], 9, temperature=1.5, seed=n) for n in range(3)]
    check_continued(engine, parts, answer(whole), *company)


@pytest.mark.heavy
def test_it_is_also_in_small_chunks_and_when_it_is_preempted_afterwards(
    engine: LLMEngine,
) -> None:
    runs = []
    for name in ("greedy", "seeded"):
        asked = request(name, PROMPT, 20, **SAMPLINGS[name])
        outputs = run(engine, [asked])[name]
        some = dict(list(splits(asked, outputs).items())[1::6])
        runs.append((some, answer(outputs)))
    chunked = another(engine, max_kv_tokens=512, max_batched_tokens=23, max_batch_size=4)
    # Two prompts and continuations fit, and after a few tokens only one.
    small = another(engine, max_kv_tokens=8 * 16)
    for some, whole in runs:
        check_continued(chunked, some, whole)
        check_continued(small, some, whole)
    assert small.num_preemptions > 0


@pytest.mark.heavy
@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_run_may_be_handed_on_after_each_of_its_tokens(name: str, engine: LLMEngine) -> None:
    asked = request(name, PROMPT, 12, **SAMPLINGS[name])
    whole = answer(run(engine, [asked])[name])
    said, rest = None, asked
    for _ in range(12):
        engine.add_request(rest)
        piece = answer(engine.step())
        said = piece if said is None else said + piece
        if piece.reason is not None:
            break
        engine.abort(rest.request_id)
        engine.step()
        rest = continued(asked, said, name)
    assert said == whole


def test_a_continuation_fills_the_context_to_the_undisturbed_end(engine: LLMEngine) -> None:
    short = another(engine, max_kv_tokens=64)
    asked = request("a", PROMPT, 100)
    outputs = run(short, [asked])["a"]
    whole = answer(outputs)
    assert (whole.reason, whole.completion_tokens) == ("length", 14)
    check_continued(short, dict(list(splits(asked, outputs).items())[-3:]), whole)
    check_ended(short, asked, whole, "length")


# Texts, with a model that says what is written.

TEXT = "Привет, 世界 🙂! It ends here: the end.\n\n"
INPUT = list(range(300, 320))


class Writer:
    """An engine whose model says one text, and then the end token."""

    def __init__(self, like: LLMEngine, text: str) -> None:
        tokenizer = like.tokenizer
        assert isinstance(tokenizer, Tokenizer)
        self.script = tokenizer.encode(text, add_special_tokens=False).ids
        self.end = next(iter(like._end_token_ids))
        self.model = Scripted(like._runner.model, len(INPUT), [*self.script, self.end])
        self.engine = another(like, self.model, max_kv_tokens=4096, max_batch_size=64)

    def run(self, **sampling: Any) -> tuple[Request, list[StepOutput]]:
        asked = request("a", INPUT, **({"max_tokens": 100, "ignore_eos": False} | sampling))
        return asked, run(self.engine, [asked])["a"]


@pytest.fixture(scope="module")
def writer(engine: LLMEngine) -> Writer:
    return Writer(engine, TEXT)


STOPS: list[Sequence[str]] = [(), ("the end",), ("世界",), ("🙂",), ("здесь", "here: th", "e end.")]


@pytest.mark.parametrize("stop", STOPS)
def test_text_and_logprobs_are_right_across_the_seam(writer: Writer, stop: Sequence[str]) -> None:
    asked, outputs = writer.run(stop=tuple(stop), logprobs=2)
    whole = answer(outputs)
    cut = min((TEXT.find(piece) for piece in stop if piece in TEXT), default=len(TEXT))
    assert (whole.text, whole.reason) == (TEXT[:cut], "stop")
    assert any(output.token_ids and not output.text for output in outputs[:-1])  # text held back
    check_continued(writer.engine, splits(asked, outputs), whole)


def test_a_character_cut_by_the_last_token_is_replaced_as_it_would_have_been(
    writer: Writer,
) -> None:
    before = len(writer.engine.tokenizer.encode("Привет, ", add_special_tokens=False).ids)  # type: ignore[union-attr]
    asked, outputs = writer.run(max_tokens=before + 2)  # two bytes of three
    assert answer(outputs).text == "Привет, \ufffd"
    check_continued(writer.engine, splits(asked, outputs), answer(outputs))
    check_ended(writer.engine, asked, answer(outputs), "length")


def check_ended(engine: LLMEngine, asked: Request, whole: Answer, reason: str) -> None:
    """With all tokens given, the next step says the end and what was not shown of the text."""
    for num_shown in (0, len(whole.text) // 2, len(whole.text)):
        engine.add_request(continued(asked, whole, "b", num_shown))
        assert engine.current_load().waiting == 0
        [only] = engine.step()
        assert (only.finish_reason, only.token_ids, only.logprobs) == (reason, (), ())
        assert only.text == whole.text[num_shown:]
        assert only.completion_tokens == whole.completion_tokens == len(whole.token_ids)
        check_idle(engine)


@pytest.mark.parametrize(
    ("reason", "sampling"),
    [
        ("length", {"max_tokens": 9}),
        ("stop", {"stop": ("the end",)}),
        ("stop", {"stop": ("\n",)}),
        ("stop", {}),
    ],
    ids=["max_tokens", "stop string", "stop string at the end", "end token"],
)
def test_an_end_that_was_reached_already_is_told_and_not_computed(
    writer: Writer, reason: str, sampling: dict[str, Any]
) -> None:
    asked, outputs = writer.run(**sampling)
    steps = writer.model.num_steps
    check_ended(writer.engine, asked, answer(outputs), reason)
    assert writer.model.num_steps == steps


def test_tokens_beyond_an_end_add_no_text_and_count(writer: Writer) -> None:
    asked, outputs = writer.run(stop=("here",))
    late = replace(asked, output_ids=(*writer.script, writer.end))
    [only] = run(writer.engine, [late])["a"]
    assert (only.finish_reason, only.text) == ("stop", answer(outputs).text)
    assert only.completion_tokens == len(writer.script) + 1


def test_text_that_was_not_passed_on_comes_with_the_next_output(writer: Writer) -> None:
    asked, outputs = writer.run()
    begun = answer(outputs[:20])
    for num_shown in range(len(begun.text)):
        rest = run(writer.engine, [continued(asked, begun, "b", num_shown)])["b"]
        assert rest[0].text == begun.text[num_shown:] + outputs[20].text
        assert answer(rest).text == TEXT[num_shown:]


def test_text_that_was_not_passed_on_comes_also_when_the_request_is_aborted_or_fails(
    writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, outputs = writer.run()
    begun = answer(outputs[:20])
    writer.engine.add_request(continued(asked, begun, "b", 3))
    writer.engine.abort("b")
    [only] = writer.engine.step()
    assert (only.finish_reason, only.text) == ("abort", begun.text[3:])
    monkeypatch.setattr(writer.model, "_rows", writer.model._rows * float("nan"))
    [only] = run(writer.engine, [continued(asked, begun, "b", 3)])["b"]
    assert (only.finish_reason, only.text) == ("error", begun.text[3:])
    assert only.completion_tokens == 20


@pytest.mark.heavy
@settings(max_examples=25, deadline=None)
@given(
    text=st.text(alphabet="ab \né世🙂", min_size=1, max_size=12),
    stop=st.lists(st.text(alphabet="ab é世🙂", min_size=1, max_size=3), max_size=2),
    max_tokens=st.integers(1, 40),
)
def test_any_text_with_any_stop_strings_goes_on_at_any_token(
    engine: LLMEngine, text: str, stop: list[str], max_tokens: int
) -> None:
    writer = Writer(engine, text)
    asked, outputs = writer.run(stop=tuple(stop), max_tokens=max_tokens, logprobs=1)
    check_continued(writer.engine, splits(asked, outputs), answer(outputs))
    check_ended(writer.engine, asked, answer(outputs), str(answer(outputs).reason))


# What cannot be gone on with.


@pytest.mark.parametrize(
    ("fields", "sampling", "sentence"),
    [
        ({"output_ids": (5,) * 9}, {}, r"there are 9 output_ids, more than max_tokens 8"),
        ({"output_ids": (5,)}, {"max_tokens": 0}, r"1 output_ids, more than max_tokens 0"),
        ({"output_ids": (5, 2048)}, {}, r"output_ids hold a token id outside 0\.\.2047"),
        ({"output_ids": (-1,)}, {}, r"output_ids hold a token id outside 0\.\.2047"),
        ({"num_shown": 1}, {}, r"num_shown is 1, but only 0 characters"),
        ({"num_shown": -1}, {}, r"num_shown is -1"),
        ({"output_ids": (300,), "num_shown": 99}, {}, r"num_shown is 99, but only \d characters"),
        ({"output_ids": (300,)}, {"prompt_logprobs": 1}, r"prompt_logprobs .* ask for none"),
        ({"output_ids": (300,)}, {"temperature": 0.5}, r"temperature above 0 need the seed"),
        (
            {"output_ids": (300,) * 500},
            {"max_tokens": 600},
            r"520 tokens together, but this engine takes at most 512",
        ),
    ],
)
def test_what_no_run_can_have_said_is_refused_in_one_sentence(
    engine: LLMEngine, fields: dict[str, Any], sampling: dict[str, Any], sentence: str
) -> None:
    asked = replace(request("a", INPUT, **sampling), **fields)
    with pytest.raises(RequestError, match=sentence) as refused:
        engine.add_request(asked)
    assert str(refused.value).isprintable()
    check_idle(engine)
    run(engine, [request("a", INPUT, 1)])  # the id is free


def test_half_a_character_or_of_a_stop_string_was_not_passed_on(writer: Writer) -> None:
    tokenizer = writer.engine.tokenizer
    assert isinstance(tokenizer, Tokenizer)
    first = tokenizer.encode("世", add_special_tokens=False).ids[0]
    asked = replace(request("a", INPUT), output_ids=(first,), num_shown=1)
    with pytest.raises(RequestError, match="only 0 characters"):
        writer.engine.add_request(asked)
    held = tokenizer.encode("th", add_special_tokens=False).ids
    asked = replace(request("a", INPUT, stop=("the end",)), output_ids=tuple(held), num_shown=2)
    with pytest.raises(RequestError, match="only 0 characters"):
        writer.engine.add_request(asked)


def test_without_a_tokenizer_tokens_go_on_and_have_no_text(engine: LLMEngine) -> None:
    bare = LLMEngine(engine._runner.model, engine.identity, EngineOptions(max_kv_tokens=512))
    asked = request("a", PROMPT, 10, logprobs=1)
    outputs = run(bare, [asked])["a"]
    check_continued(bare, splits(asked, outputs), answer(outputs))
    with pytest.raises(RequestError, match="only 0 characters"):
        bare.add_request(continued(asked, answer(outputs[:2]), "a", 1))
