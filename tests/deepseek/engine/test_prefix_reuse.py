"""Answers have the same bits with and without the prefix cache, and no page is lost."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from support.continuing import answer, splits
from support.engines import request, run, tokens
from support.page_checks import PageWatch, check_engine
from support.soaking import answer_alone, random_requests, soak
from support.synthetic import write_checkpoint

from deepseek.engine.arithmetic import ARITHMETICS, EMBEDDED
from deepseek.engine.engine import EngineOptions, LLMEngine
from deepseek.engine.linear import Kernels
from deepseek.engine.opening import make_model
from deepseek.engine.options import EngineIdentity
from deepseek.engine.packing import pack_tensors, schemes_of
from deepseek.engine.request import StepOutput
from deepseek.engine.runner import StepModel
from deepseek.source.checkpoint import CheckpointReader

#: KV formats of the embedded engine, on native and on torch's kernels; of a target, which has a
#: layout of its own.
FORMATS = [
    *(("native", kv) for kv in ("bf16", "fp8", "int8", "fp32")),
    *(("embedded", kv) for kv in ("fp8", "int8")),
    ("trtllm", "fp8"),
]

Open = Callable[..., LLMEngine]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Open:
    """Opens engines of one small random model; free pages that hold no prefix are NaN."""
    directory = tmp_path_factory.mktemp("small")
    write_checkpoint(directory, hidden=128, max_position_embeddings=1024)
    source = CheckpointReader(directory)
    models: dict[str, StepModel] = {}

    def make(target: str) -> StepModel:
        """`native` is the engine's own arithmetic on the native kernels."""
        arithmetic = EMBEDDED if target == "native" else ARITHMETICS[target]
        kernels = Kernels.detect(
            batch_invariant=True, arithmetic=arithmetic, isa=target if target == "native" else None
        )
        tensors = pack_tensors(source, layout=kernels.layout)
        return make_model(source.config, schemes_of(source), tensors, kernels)

    def open_engine(
        kv_cache: str = "bf16", target: str = "native", page_tokens: int = 16, **options: Any
    ) -> LLMEngine:
        if target not in models:
            models[target] = make(target)
        identity = EngineIdentity(
            recipe="source",
            artifact_digest=source.fingerprint,
            engine_digest=None,
            kv_cache=kv_cache,
            page_tokens=page_tokens,
            arithmetic=EMBEDDED.name if target == "native" else target,
        )
        given = {"max_kv_tokens": 1024, "max_model_len": 1024} | options
        return LLMEngine(models[target], identity, EngineOptions(poison_free_pages=True, **given))

    return open_engine


def text(count: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 96, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def cached(outputs: Iterable[StepOutput]) -> int:
    [count] = {output.cached_tokens for output in outputs}
    return count


@pytest.mark.heavy
@pytest.mark.parametrize(("target", "kv_cache"), FORMATS)
def test_answers_have_the_same_bits_wherever_the_computation_begins(
    target: str, kv_cache: str, small: Open
) -> None:
    """At any page of either attention block, in chunks of any size: logprobs are compared bit for
    bit, and so is every page that two requests computed."""
    prompt = text(300)
    plain = small(kv_cache, target, prefix_cache=False)
    watch = PageWatch()
    for size, cuts in ((512, (0, 31, 256)), (37, (16, 240, 273, 300))):
        reused = small(kv_cache, target, max_batched_tokens=size)
        run(reused, [request("whole", prompt, 1)], watch)
        for shared in cuts:
            item = request(str(shared), [*prompt[:shared], *text(30, shared + 1)], 5, logprobs=2)
            outputs = run(reused, [item], watch)[str(shared)]
            assert cached(outputs) == shared // 16 * 16
            assert answer(outputs) == answer_alone(plain, item), (size, shared)


@pytest.mark.parametrize("page_tokens", [1, 8, 256])
def test_pages_of_any_size_are_shared(page_tokens: int, small: Open) -> None:
    plain = small(page_tokens=page_tokens, prefix_cache=False)
    reused = small(page_tokens=page_tokens)
    watch = PageWatch()
    for number, length in enumerate((530, 300, 531)):
        item = request("a", [*text(280), *text(length - 280, length)], 3, logprobs=0)
        outputs = run(reused, [item], watch)["a"]
        assert answer(outputs) == answer_alone(plain, item)
        assert cached(outputs) == (280 // page_tokens * page_tokens if number else 0)


def test_the_next_turn_of_a_chat_finds_prompt_and_answer(small: Open) -> None:
    plain, reused = small(prefix_cache=False), small()
    first = request("first", text(50), 40)
    said = answer(run(reused, [first])["first"])
    turn = request("turn", [*text(50), *said.token_ids, *text(20, 1)], 10, logprobs=1)
    outputs = run(reused, [turn], PageWatch())["turn"]
    assert cached(outputs) == 80  # 89 of 90 tokens had been computed
    assert answer(outputs) == answer_alone(plain, turn)


def test_a_batch_shares_what_its_first_requests_have_computed(small: Open) -> None:
    """Pages with several users at once, in chunks beside decodes."""
    plain = small(prefix_cache=False)
    reused = small(max_batched_tokens=40, max_batch_size=6)
    prompt = text(200)
    items = [
        request(str(i), [*prompt[: 200 - 20 * i], *text(5, i)], 20, logprobs=0) for i in range(6)
    ]
    outputs = run(reused, items, PageWatch())
    assert sum(cached(mine) for mine in outputs.values()) > 400
    for item in items:
        assert answer(outputs[item.request_id]) == answer_alone(plain, item)
    used = [tokens(mine) for mine in outputs.values()]
    assert len({tuple(mine) for mine in used}) == 6  # they say different things


def test_answers_are_the_same_after_preemptions_that_find_pages_again(small: Open) -> None:
    plain = small(prefix_cache=False)
    # 12 pages for three that grow to 7 each.
    reused = small(page_tokens=4, max_kv_tokens=12 * 4, max_batched_tokens=64)
    items = [request(str(i), text(10, i), 15, logprobs=0) for i in range(3)]
    outputs = run(reused, items, PageWatch())
    assert reused.num_preemptions > 0
    for item in items:
        assert answer(outputs[item.request_id]) == answer_alone(plain, item)
        assert cached(outputs[item.request_id]) == 0  # its own pages are no find


def test_an_aborted_request_leaves_the_pages_that_it_has_filled(small: Open) -> None:
    plain, reused = small(prefix_cache=False), small(max_batched_tokens=40)
    reused.add_request(request("gone", text(200)))
    reused.step()
    reused.step()  # 80 tokens
    reused.abort("gone")
    item = request("next", text(200), logprobs=0)
    outputs = run(reused, [item], PageWatch())
    assert cached(outputs["next"]) == 80
    assert answer(outputs["next"]) == answer_alone(plain, item)


def test_a_continuation_finds_what_the_engine_itself_had_generated(small: Open) -> None:
    reused = small()
    whole = request("whole", text(50), 24, temperature=1.0, seed=3, logprobs=1)
    outputs = run(reused, [whole])["whole"]
    told = answer(outputs)
    for name, (begun, rest) in splits(whole, outputs).items():
        got = run(reused, [rest], PageWatch())[name]
        assert begun + answer(got) == told
        # 73 tokens are there; of those that are found, the prompt's count.
        assert cached(got) == min((50 + len(begun.token_ids) - 1) // 16 * 16, 50)


def test_a_salt_finds_only_its_own_pages(small: Open) -> None:
    plain, reused = small(prefix_cache=False), small()
    prompt = text(60)
    counts = []
    for salt in ("a", "b", "", "a", "b", ""):
        item = request("x", prompt, 3, salt=salt, logprobs=0)
        outputs = run(reused, [item])["x"]
        assert answer(outputs) == answer_alone(plain, item)
        counts.append(cached(outputs))
    assert counts == [0, 0, 0, 48, 48, 48]


def test_prompt_logprobs_neither_find_pages_nor_leave_any(small: Open) -> None:
    plain, reused = small(prefix_cache=False), small()
    scored = request("scored", text(60), 3, prompt_logprobs=2)
    for _ in range(2):
        outputs = run(reused, [scored])["scored"]
        assert cached(outputs) == 0
        assert reused.current_load().kv_tokens_cached == 0
    run(reused, [request("plain", text(60), 3)])
    outputs = run(reused, [scored])["scored"]
    [told] = [item.prompt_logprobs for item in outputs if item.prompt_logprobs]
    [want] = [
        item.prompt_logprobs for item in run(plain, [scored])["scored"] if item.prompt_logprobs
    ]
    assert len(told) == 60
    assert told == want
    assert cached(outputs) == 0
    assert reused.current_load().cached_prompt_tokens == 0


def test_scoring_reads_no_cached_page_and_leaves_none(small: Open) -> None:
    plain, reused = small(prefix_cache=False), small(max_kv_tokens=10 * 16)
    ids = torch.tensor(text(100))
    reused.score(ids)
    assert reused.current_load().kv_tokens_cached == 0
    run(reused, [request("a", text(100), 3)])
    assert reused.current_load().kv_tokens_cached == 6 * 16
    for page in reused._pool.prefixes.idle_pages:  # what reads them now is not finite
        reused._runner.cache.poison([page])
    assert torch.equal(reused.score(ids), plain.score(ids))  # takes the room of 3 of them
    check_engine(reused)
    assert reused.current_load().kv_tokens_cached == 3 * 16


def test_a_prompt_that_generates_nothing_is_found_and_ends(small: Open) -> None:
    engine = small()
    for count in (0, 32):
        [output] = run(engine, [request("a", text(48), 0)])["a"]
        assert (output.finish_reason, output.completion_tokens) == ("length", 0)
        assert output.cached_tokens == count


def test_an_engine_without_the_cache_finds_and_keeps_nothing(small: Open) -> None:
    engine = small(prefix_cache=False)
    for _ in range(2):
        [outputs] = run(engine, [request("a", text(60), 3)]).values()
        assert cached(outputs) == 0
        load = engine.current_load()
        assert (load.kv_tokens_cached, load.kv_tokens_used) == (0, 0)
    assert (load.cached_prompt_tokens, load.computed_prompt_tokens) == (0, 120)


def test_the_load_counts_pages_in_use_once_and_prompts_when_they_start(small: Open) -> None:
    engine = small()
    run(engine, [request("old", text(64), 1)])
    load = engine.current_load()
    assert (load.kv_tokens_used, load.kv_tokens_cached) == (0, 64)
    assert (load.cached_prompt_tokens, load.computed_prompt_tokens) == (0, 64)
    for name in "ab":
        engine.add_request(request(name, text(64), 40))
    engine.step()
    load = engine.current_load()
    assert load.kv_tokens_used == 64  # the fourth, whose last token both computed, is old's again
    assert load.kv_tokens_cached == 0
    assert (load.cached_prompt_tokens, load.computed_prompt_tokens) == (96, 64 + 32)
    run(engine)


def test_pages_that_made_an_output_not_finite_are_found_no_more(small: Open) -> None:
    """A memory fault in a shared page costs the requests that read it, and none after them."""
    engine = small()
    item = request("a", text(60), 3, logprobs=0)
    told = answer(run(engine, [item])["a"])
    engine._runner.cache.poison(engine._pool.prefixes.idle_pages[-1:])
    [output] = run(engine, [item])["a"]
    assert output.error == "the model's output is not finite"
    outputs = run(engine, [item])["a"]
    assert cached(outputs) == 0
    assert answer(outputs) == told
    assert cached(run(engine, [item])["a"]) == 48


def test_a_request_that_no_page_is_left_for_waits_and_finds_its_prefix_then(small: Open) -> None:
    plain, engine = small(prefix_cache=False), small(max_kv_tokens=8 * 16)
    items = [request(str(i), [*text(64), *text(20, i)], 20, logprobs=0) for i in range(4)]
    outputs = run(engine, items, PageWatch())
    for item in items:
        assert answer(outputs[item.request_id]) == answer_alone(plain, item)
    assert [cached(outputs[str(i)]) for i in range(4)] == [0, 64, 64, 64]


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("count", "kv_cache"),
    [
        (90, "bf16"),
        *(pytest.param(2000, kv, marks=pytest.mark.slow) for kv in ("bf16", "fp8", "int8")),
    ],
)
def test_random_requests_are_answered_as_alone_and_all_pages_come_back(
    count: int, kv_cache: str, small: Open
) -> None:
    """In a cache for about five of them."""
    chance = random.Random(count)
    plain = small(kv_cache, prefix_cache=False)
    reused = small(
        kv_cache, page_tokens=4, max_kv_tokens=40 * 4, max_batch_size=6, max_batched_tokens=24
    )
    items = random_requests(chance, count, [text(40, seed) for seed in range(3)], vocabulary=96)
    soak(reused, plain, items, chance)
