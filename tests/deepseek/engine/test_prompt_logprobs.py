"""Logprobs of a prompt's own tokens: those of `score`, however the prompt was computed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
import torch
from support.engines import request, run, tokens

from deepseek.engine import prompt_scores
from deepseek.engine.engine import EngineOptions, LLMEngine
from deepseek.engine.request import StepOutput, TokenLogprob
from deepseek.errors import RequestError

Logprobs = Sequence[TokenLogprob | None]

PROMPT = [(37 * i) % 1900 + 100 for i in range(90)]


def open_engine(tiny_model: Path, **options: int) -> LLMEngine:
    given = {"max_kv_tokens": 1024, "max_model_len": 512} | options
    return LLMEngine.from_checkpoint(tiny_model, EngineOptions(poison_free_pages=True, **given))


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> LLMEngine:
    return open_engine(tiny_model)


def told(outputs: Iterable[StepOutput]) -> Logprobs:
    """The prompt's logprobs, which come once, and before any token."""
    outputs = list(outputs)
    reports = [output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None]
    assert outputs[0].prompt_logprobs is not None
    [report] = reports
    return report


@pytest.mark.parametrize("count", [0, 1, 5])
def test_they_are_log_softmax_of_the_scored_logits(engine: LLMEngine, count: int) -> None:
    [outputs] = run(engine, [request("a", PROMPT, 3, prompt_logprobs=count)]).values()
    first, *rest = told(outputs)
    reference = engine.score(torch.tensor(PROMPT)).log_softmax(-1)
    assert first is None
    assert len(rest) == len(PROMPT) - 1
    for position, item in enumerate(rest, start=1):
        assert item is not None
        row = reference[position - 1]
        assert item.token_id == PROMPT[position]
        assert item.logprob == row[item.token_id].item()
        assert item.rank == int((row >= row[item.token_id]).sum())
        assert [top.logprob for top in item.top] == row.topk(count).values.tolist()
        assert [row[top.token_id].item() for top in item.top] == [t.logprob for t in item.top]


def test_they_change_no_token_and_no_request_gets_them_unasked(engine: LLMEngine) -> None:
    [plain] = run(engine, [request("a", PROMPT, 12, logprobs=1)]).values()
    [scored] = run(engine, [request("a", PROMPT, 12, logprobs=1, prompt_logprobs=2)]).values()
    assert tokens(scored) == tokens(plain)
    assert [o.logprobs for o in scored] == [o.logprobs for o in plain]
    assert all(output.prompt_logprobs is None for output in plain)


@pytest.mark.heavy
def test_they_have_the_same_bits_alone_chunked_in_company_and_preempted(
    engine: LLMEngine, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [request(name, PROMPT[at:], 14, prompt_logprobs=2) for at, name in enumerate("abc")]
    alone = {item.request_id: told(run(engine, [item])[item.request_id]) for item in asked}
    monkeypatch.setattr(prompt_scores, "SLICE", 16)
    chunked = open_engine(tiny_model, max_batched_tokens=11, max_batch_size=4)
    company = [request("deaf", PROMPT[7:40], 20)]
    for name, outputs in run(chunked, [*company, *asked]).items():
        if name != "deaf":
            assert told(outputs) == alone[name], name
    # 19 pages: three prompts of 6 pages each fit, and the continuations do not.
    small = open_engine(tiny_model, max_kv_tokens=19 * 16, max_model_len=300, max_batched_tokens=64)
    preempted = run(small, asked)
    assert small.num_preemptions > 0
    for name, outputs in preempted.items():
        assert told(outputs) == alone[name], name


@pytest.mark.heavy
def test_a_prefill_that_is_cut_off_by_a_preemption_scores_no_token_twice(
    engine: LLMEngine, tiny_model: Path
) -> None:
    alone = told(run(engine, [request("b", PROMPT, 2, prompt_logprobs=1)])["b"])
    small = open_engine(tiny_model, max_kv_tokens=8 * 16, max_model_len=120, max_batched_tokens=16)
    small.add_request(request("b", PROMPT, 2, prompt_logprobs=1))
    small.step()
    [sequence] = small._scheduler.running
    assert sequence.num_scored == 17
    # What the scheduler does to the youngest when pages run out.
    small._scheduler.running.remove(sequence)
    small._pool.release(sequence)
    small._scheduler.waiting.appendleft(sequence)
    assert told(run(small)["b"]) == alone


def test_a_prompt_alone_is_computed_and_nothing_is_generated(engine: LLMEngine) -> None:
    asked = [
        request("a", PROMPT, 0, prompt_logprobs=0),
        request("b", PROMPT[:1], 0, prompt_logprobs=0),
        request("c", PROMPT, 0),
        request("d", PROMPT, 4),
    ]
    outputs = run(engine, asked)
    for name in "abc":
        [only] = outputs[name]
        assert (only.finish_reason, only.token_ids, only.text) == ("length", (), "")
        assert only.completion_tokens == 0
    assert outputs["a"][0].prompt_tokens == len(PROMPT)
    assert told(outputs["b"]) == (None,)
    assert outputs["c"][0].prompt_logprobs is None
    assert len(tokens(outputs["d"])) == 4
    assert engine.current_load().kv_tokens_used == 0


def test_a_prompt_alone_may_fill_the_whole_context(tiny_model: Path) -> None:
    engine = open_engine(tiny_model, max_kv_tokens=64, max_model_len=64)
    [outputs] = run(engine, [request("a", PROMPT[:64], 0, prompt_logprobs=0)]).values()
    assert len(told(outputs)) == 64
    with pytest.raises(RequestError, match=r"64 tokens.* at most 63"):
        engine.add_request(request("a", PROMPT[:64], 1, prompt_logprobs=0))


def test_an_aborted_prompt_reports_none(engine: LLMEngine) -> None:
    engine.add_request(request("a", PROMPT, 4, prompt_logprobs=0))
    engine.abort("a")
    [output] = engine.step()
    assert (output.finish_reason, output.prompt_logprobs) == ("abort", None)


class _Spoiled:
    """A model whose logits are not finite where it scores: every call but those of one row."""

    def __init__(self, engine: LLMEngine) -> None:
        self._model = engine._runner.model
        self.config = self._model.config
        self.allocated_bytes = self._model.allocated_bytes
        self.forward = self._model.forward

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self._model.logits(hidden)
        return logits if len(hidden) < 2 else logits.fill_(float("nan"))


def test_scores_that_are_not_finite_fail_their_request_once_and_spare_the_others(
    engine: LLMEngine,
) -> None:
    options = EngineOptions(max_kv_tokens=1024, max_model_len=512)
    spoiled = LLMEngine(_Spoiled(engine), engine.identity, options)  # type: ignore[arg-type]
    outputs = run(spoiled, [request("bad", PROMPT, 3, prompt_logprobs=0)])
    [only] = outputs["bad"]
    assert (only.finish_reason, only.error) == ("error", "the model's output is not finite")
    [fine] = run(spoiled, [request("fine", PROMPT, 3)]).values()
    assert fine[-1].finish_reason == "length"
    assert spoiled.current_load().kv_tokens_used == 0


def test_only_a_slice_of_the_logits_exists_at_a_time(
    engine: LLMEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    logits = engine._runner.model.logits
    monkeypatch.setattr(
        engine._runner.model, "logits", lambda hidden: rows.append(len(hidden)) or logits(hidden)
    )
    run(engine, [request("a", PROMPT * 3, 1, prompt_logprobs=0)])
    assert max(rows) == prompt_scores.SLICE
    assert sum(rows) == len(PROMPT) * 3  # every row once: all but the last score, the last chooses
    rows.clear()
    run(engine, [request("a", PROMPT * 3, 1)])
    assert rows == [1]


def test_half_a_million_stop_tokens_are_asked_as_a_set(engine: LLMEngine) -> None:
    engine.add_request(request("a", PROMPT, 4, stop_token_ids=tuple(range(2048, 500_000))))
    ends = engine._tracked["a"].end_token_ids
    assert isinstance(ends, frozenset)
    assert len(ends) == 500_000 - 2048
    run(engine)
