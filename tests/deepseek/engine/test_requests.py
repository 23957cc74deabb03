"""Requests through the engine: accepted or refused, served, ended once, their KV pages freed."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
from support.engines import request, run, text, tokens

from deepseek.engine.batch import Batch
from deepseek.engine.engine import EngineOptions, LLMEngine
from deepseek.engine.kv_cache import LatentCache
from deepseek.engine.model import Model
from deepseek.engine.request import StepOutput
from deepseek.errors import DeployError, RequestError


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> LLMEngine:
    """Shared by tests that leave it idle; free pages hold NaN, and no request finds another's."""
    options = EngineOptions(
        poison_free_pages=True, max_kv_tokens=2048, max_model_len=512, prefix_cache=False
    )
    return LLMEngine.from_checkpoint(tiny_model, options)


@pytest.fixture(autouse=True)
def left_idle(engine: LLMEngine) -> object:
    yield
    assert not engine.has_work
    assert engine.current_load().kv_tokens_used == 0
    assert engine.failure is None


def test_every_request_ends_once_with_its_counts(engine: LLMEngine) -> None:
    outputs = run(engine, [request(str(n), range(10, 11 + n), max_tokens=n + 1) for n in range(5)])
    for n in range(5):
        mine = outputs[str(n)]
        assert [output.finish_reason for output in mine] == [None] * n + ["length"]
        assert mine[-1].prompt_tokens == len(range(10, 11 + n))
        assert mine[-1].completion_tokens == len(tokens(mine)) == n + 1


@pytest.mark.heavy
def test_free_pages_full_of_nan_change_nothing(engine: LLMEngine, tiny_model: Path) -> None:
    clean = LLMEngine.from_checkpoint(tiny_model, EngineOptions(max_kv_tokens=2048))
    requests = [request(str(n), range(5, 40 + 60 * n), max_tokens=12) for n in range(3)]
    first = run(engine, requests)  # and again, on pages that had other owners
    for outputs in (first, run(engine, requests)):
        for request_id, mine in run(clean, requests).items():
            assert tokens(outputs[request_id]) == tokens(mine)
            assert text(outputs[request_id]) == text(mine)


@pytest.mark.parametrize("kv_cache", ["bf16", "fp8", "int8", "fp32"])
def test_poison_reaches_the_logits_if_a_page_is_read_that_is_not_owned(
    kv_cache: str, tiny_model: Path
) -> None:
    """The poison itself works: without it the tests above would prove nothing."""
    engine = LLMEngine.from_checkpoint(
        tiny_model, EngineOptions(kv_cache=kv_cache, max_kv_tokens=256, max_model_len=256)
    )
    engine.add_request(request("a", range(5, 45)))
    engine.step()
    owned = engine._scheduler.running[0].pages
    engine._runner.cache.poison(owned[:1])
    [output] = engine.step()
    assert (output.finish_reason, output.error) == ("error", "the model's output is not finite")
    assert not output.retryable  # the same weights compute the same elsewhere
    assert not engine.has_work
    assert engine.current_load().kv_tokens_used == 0


def test_every_end_token_stops_unless_it_is_ignored(engine: LLMEngine) -> None:
    [whole] = run(engine, [request("a", range(30, 60), max_tokens=12)]).values()
    chosen = tokens(whole)
    # Whatever token comes at a first-time position can play the end token's part.
    at = next(i for i in range(3, 12) if chosen[i] not in chosen[:i])
    [mine] = run(
        engine, [request("b", range(30, 60), max_tokens=12, stop_token_ids=(chosen[at],))]
    ).values()
    assert tokens(mine) == chosen[: at + 1]
    assert mine[-1].finish_reason == "stop"
    assert mine[-1].completion_tokens == at + 1
    assert text(mine) == engine.tokenizer.decode(chosen[:at])  # an end token has no text

    eos = LLMEngine(
        engine._runner.model,
        engine.identity,
        EngineOptions(max_kv_tokens=512, max_model_len=512),
        end_token_ids=frozenset({1, chosen[at]}),
    )
    [stopped] = run(eos, [request("c", range(30, 60), 12, ignore_eos=False)]).values()
    [ignored] = run(eos, [request("d", range(30, 60), 12, ignore_eos=True)]).values()
    assert tokens(stopped) == chosen[: at + 1]
    assert tokens(ignored) == chosen


def test_a_stop_string_across_tokens_ends_the_text_before_it(engine: LLMEngine) -> None:
    prompt = range(100, 130)
    [whole] = run(engine, [request("a", prompt, max_tokens=24)]).values()
    full = text(whole)
    pieces = [output.text for output in whole]
    # From the last character of one piece to the first of the next: no token holds it alone.
    cuts = list(itertools.accumulate(len(piece) for piece in pieces))
    stop = next(
        full[cut - 1 : cut + 1]
        for cut in cuts
        if 0 < cut < len(full) and full.find(full[cut - 1 : cut + 1]) == cut - 1
    )
    [mine] = run(engine, [request("b", prompt, max_tokens=24, stop=(stop,))]).values()
    assert text(mine) == full[: full.index(stop)]
    assert mine[-1].finish_reason == "stop"
    assert tokens(mine) == tokens(whole)[: len(tokens(mine))]


def test_a_seed_gives_the_same_tokens_alone_and_in_company(engine: LLMEngine) -> None:
    seeded = request("s", range(50, 70), 15, temperature=1.0, top_p=0.95, seed=42)
    other_seed = request("o", range(50, 70), 15, temperature=1.0, top_p=0.95, seed=43)
    company = [request(str(n), range(n, n + 30), 20, temperature=1.5, seed=n) for n in range(3)]
    alone = tokens(run(engine, [seeded])["s"])
    crowd = run(engine, [*company, seeded, other_seed])
    assert tokens(crowd["s"]) == alone
    assert tokens(crowd["o"]) != alone


def test_without_a_seed_two_runs_differ(engine: LLMEngine) -> None:
    free = request("a", range(50, 70), 20, temperature=3.0)
    assert tokens(run(engine, [free])["a"]) != tokens(run(engine, [free])["a"])


def test_generation_continued_elsewhere_goes_on_as_it_would_have(engine: LLMEngine) -> None:
    """Prompt plus the tokens so far, same seed: what a second replica does when the first dies."""
    params = {"temperature": 1.0, "seed": 5}
    whole = tokens(run(engine, [request("a", range(50, 70), 16, **params)])["a"])
    rest = request("b", [*range(50, 70), *whole[:6]], 10, **params)
    assert tokens(run(engine, [rest])["b"]) == whole[6:]


def test_logprobs_are_log_softmax_of_the_scored_logits(engine: LLMEngine) -> None:
    prompt = list(range(200, 230))
    [mine] = run(engine, [request("a", prompt, 6, temperature=0.7, seed=1, logprobs=3)]).values()
    chosen = tokens(mine)
    scored = engine.score(torch.tensor(prompt + chosen)).log_softmax(-1)
    for i, output in enumerate(mine):
        [item] = output.logprobs
        row = scored[len(prompt) - 1 + i]
        assert item.token_id == chosen[i]
        assert item.logprob == pytest.approx(row[chosen[i]].item(), abs=1e-5)
        assert item.rank == int((row >= row[chosen[i]]).sum())
        assert [top.token_id for top in item.top] == row.topk(3).indices.tolist()
    [plain] = run(engine, [request("b", prompt, 2)]).values()
    assert all(output.logprobs == () for output in plain)


def test_an_aborted_request_ends_in_one_abort_and_frees_its_pages(engine: LLMEngine) -> None:
    for name in "abc":
        engine.add_request(request(name, range(10, 90), max_tokens=50))
    first = engine.step()
    used = engine.current_load().kv_tokens_used
    assert engine.abort("b")
    assert not engine.abort("b")
    assert not engine.abort("nobody")
    assert engine.current_load().kv_tokens_used < used
    assert engine.has_work
    outputs: list[StepOutput] = first + [out for step in iter(engine.step, []) for out in step]
    finals = {out.request_id: out.finish_reason for out in outputs if out.finish_reason}
    assert finals == {"a": "length", "b": "abort", "c": "length"}
    assert len([out for out in outputs if out.finish_reason]) == 3


def test_a_request_aborted_before_it_ran_still_gets_its_final_output(engine: LLMEngine) -> None:
    engine.add_request(request("a", range(5, 10)))
    engine.abort("a")
    [output] = engine.step()
    assert (output.finish_reason, output.completion_tokens, output.prefill_s) == ("abort", 0, 0.0)
    assert engine.step() == []


@pytest.mark.heavy
@pytest.mark.parametrize("seed", range(2))
def test_any_mix_of_finish_abort_and_preemption_gives_every_page_back(
    seed: int, tiny_model: Path
) -> None:
    engine = LLMEngine.from_checkpoint(
        tiny_model,
        EngineOptions(
            max_kv_tokens=12 * 16, max_batch_size=5, max_batched_tokens=40, poison_free_pages=True
        ),
    )
    chance = random.Random(seed)
    finals: dict[str, str] = {}
    arrived = 0
    while arrived < 30 or engine.has_work:
        if arrived < 30 and chance.random() < 0.7:
            prompt = [chance.randrange(5, 2000) for _ in range(chance.randint(1, 120))]
            engine.add_request(request(str(arrived), prompt, chance.randint(1, 60)))
            arrived += 1
        if chance.random() < 0.1:
            engine.abort(str(chance.randrange(30)))
        for output in engine.step():
            assert output.request_id not in finals, "an output after the final one"
            if output.finish_reason is not None:
                finals[output.request_id] = output.finish_reason
    assert len(finals) == 30
    assert set(finals.values()) == {"length", "abort"}
    assert engine.num_preemptions > 0
    assert engine.current_load().kv_tokens_used == 0


def test_what_can_never_be_served_is_refused_by_both_numbers(engine: LLMEngine) -> None:
    with pytest.raises(RequestError, match=r"512 tokens.* at most 511"):
        engine.add_request(request("a", [5] * 512))
    with pytest.raises(RequestError, match="empty"):
        engine.add_request(request("a", []))
    with pytest.raises(RequestError, match=r"0\.\.2047"):
        engine.add_request(request("a", [5, 2048]))
    with pytest.raises(RequestError, match=r"0\.\.2047"):
        engine.add_request(request("a", [-1]))
    with pytest.raises(RequestError, match=r"600 tokens.* at most 512"):
        engine.score(torch.full((600,), 5))


def test_a_cache_smaller_than_the_model_bounds_prompt_and_completion(tiny_model: Path) -> None:
    engine = LLMEngine.from_checkpoint(tiny_model, EngineOptions(max_kv_tokens=64))
    assert engine.max_model_len == 64
    with pytest.raises(RequestError, match=r"64 tokens.* at most 63"):
        engine.add_request(request("a", [5] * 64))
    [mine] = run(engine, [request("a", [5] * 60, max_tokens=50)]).values()
    assert mine[-1].finish_reason == "length"
    assert mine[-1].completion_tokens == 4


def test_an_id_in_use_is_refused_and_free_again_afterwards(engine: LLMEngine) -> None:
    engine.add_request(request("a", [5]))
    with pytest.raises(RequestError, match="'a' is in use"):
        engine.add_request(request("a", [6]))
    run(engine)
    run(engine, [request("a", [5])])


def test_scoring_needs_free_pages_and_leaves_running_requests_alone(engine: LLMEngine) -> None:
    alone = tokens(run(engine, [request("a", range(9, 40), 10)])["a"])
    engine.add_request(request("a", range(9, 40), 10))
    outputs = engine.step() + engine.step()
    engine.score(torch.arange(5, 200))
    assert tokens(outputs) + tokens(run(engine)["a"]) == alone


def test_scoring_says_so_when_running_requests_hold_the_pages(tiny_model: Path) -> None:
    engine = LLMEngine.from_checkpoint(tiny_model, EngineOptions(max_kv_tokens=64))
    engine.add_request(request("a", range(5, 45), 5))
    engine.step()
    with pytest.raises(RequestError, match=r"need 4 KV pages, but only 1 are free"):
        engine.score(torch.arange(5, 65))
    run(engine)
    assert engine.score(torch.arange(5, 65)).shape == (60, 2048)


class Failing:
    """A model that fails in one step."""

    def __init__(self, model: Model, at: int) -> None:
        self._model, self._at, self._calls = model, at, 0
        self.config = model.config
        self.allocated_bytes = model.allocated_bytes
        self.logits = model.logits

    def forward(self, batch: Batch, cache: LatentCache) -> torch.Tensor:
        self._calls += 1
        if self._calls == self._at:
            raise MemoryError("nothing left")
        return self._model.forward(batch, cache)


def test_a_failing_step_ends_its_requests_in_errors_and_frees_their_pages(
    engine: LLMEngine, caplog: pytest.LogCaptureFixture
) -> None:
    failing = LLMEngine(
        Failing(engine._runner.model, at=3),
        engine.identity,
        EngineOptions(max_kv_tokens=512, max_model_len=512, max_batch_size=2),
    )
    outputs = run(failing, [request(name, range(1000, 1010), 5) for name in "abc"])
    reasons = {name: mine[-1].finish_reason for name, mine in outputs.items()}
    assert reasons == {"a": "error", "b": "error", "c": "length"}  # c was not in that step
    assert outputs["a"][-1].error == "the engine failed in this step (MemoryError)"
    assert outputs["a"][-1].retryable
    assert isinstance(failing.failure, MemoryError)
    assert failing.current_load().kv_tokens_used == 0
    assert "1000" not in caplog.text  # no prompt in the log


def test_phases_are_timed_by_the_clock_that_is_passed_in(engine: LLMEngine) -> None:
    now = itertools.count()
    timed = LLMEngine(
        engine._runner.model,
        engine.identity,
        EngineOptions(max_kv_tokens=512, max_model_len=512, max_batch_size=1),
        clock=lambda: float(next(now)),
    )
    outputs = run(timed, [request("a", [5, 6], 3), request("b", [7], 2)])
    a, b = outputs["a"][-1], outputs["b"][-1]
    assert a.queue_s == 2.0  # arrivals of a and b, then the step's start
    assert a.prefill_s == 1.0
    assert a.decode_s > 0
    assert b.queue_s > a.queue_s + a.prefill_s + a.decode_s - 1
    assert [out.prefill_s for out in outputs["a"]] == [1.0] * 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_batch_size", 0),
        ("max_kv_tokens", 0),
        ("num_threads", 0),
        ("max_model_len", -5),
        ("page_tokens", 24),
        ("max_batched_tokens", 3),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(field: str, value: int) -> None:
    with pytest.raises(DeployError, match=field):
        EngineOptions(**{field: value})


def test_a_context_beyond_the_models_is_refused(tiny_model: Path) -> None:
    with pytest.raises(DeployError, match="5000 exceeds the model's 4096"):
        LLMEngine.from_checkpoint(tiny_model, EngineOptions(max_model_len=5000))
