"""A token's result is the same alone, batched, chunked, preempted, and with any threads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support.engines import make_engine, request, run, tokens

from deepseek.engine.detokenizer import load_tokenizer
from deepseek.engine.engine import EngineOptions, LLMEngine
from deepseek.engine.linear import Kernels
from deepseek.engine.moe import silu_gate

RECIPES = [
    *(None, "int8", "int8-weight-only", "int8-asym", "int8-block", "int4", "int4-all", "int4-asym"),
    *("w4a8", "int8-head", "int4-a8"),
]


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def open_engine(tiny_model: Path, recipe: str | None, base: Path, **options) -> LLMEngine:
    given = EngineOptions(**{"prefix_cache": False} | options)  # every token is computed
    if recipe is None:
        return LLMEngine.from_checkpoint(tiny_model, given)
    return LLMEngine.load(make_engine(tiny_model, recipe, base), given)


def some_text(tiny_model: Path, count: int) -> list[int]:
    text = (tiny_model / "heldout.txt").read_text(encoding="utf-8")
    return load_tokenizer(tiny_model).encode(text[: 8 * count]).ids[:count]


@pytest.mark.heavy
@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_logits_have_the_same_bits_in_chunks_of_any_size(
    recipe: str | None, kernels: str, tiny_model: Path, base: Path
) -> None:
    ids = torch.tensor(some_text(tiny_model, 280))  # two attention blocks
    options = {"kv_cache": "int8", "kernels": kernels}
    whole = open_engine(tiny_model, recipe, base, max_batched_tokens=512, **options)
    logits = whole.score(ids)
    for size, count in ((1, 30), (23, len(ids))):
        chunked = open_engine(
            tiny_model, recipe, base, max_batched_tokens=size, max_batch_size=1, **options
        )
        assert torch.equal(chunked.score(ids[:count]), logits[:count]), f"{recipe=} {size=}"


@pytest.mark.heavy
@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_logits_have_the_same_bits_on_two_threads_whatever_the_chunks(
    kernels: str, tiny_model: Path, restored_threads: None
) -> None:
    ids = torch.tensor(some_text(tiny_model, 60))
    logits = [
        LLMEngine.from_checkpoint(
            tiny_model,
            EngineOptions(
                max_batched_tokens=size, max_batch_size=1, num_threads=2, kernels=kernels
            ),
        ).score(ids)
        for size in (60, 13)
    ]
    assert torch.equal(*logits)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("recipe", "kernels"),
    [
        *((recipe, "native") for recipe in (None, "int8", "int8-head", "int4-asym", "int4-a8")),
        *((recipe, "torch") for recipe in (None, "int4-asym")),
    ],
)
def test_greedy_tokens_are_the_same_alone_batched_chunked_preempted_and_from_the_prefix_cache(
    recipe: str | None, kernels: str, tiny_model: Path, base: Path
) -> None:
    def opened(**options) -> LLMEngine:
        return open_engine(tiny_model, recipe, base, kernels=kernels, **options)

    ids = some_text(tiny_model, 400)
    lengths = [200, 30, 3, 64, 17]
    requests = [
        request(str(i), ids[10 * i : 10 * i + length], max_tokens=14)
        for i, length in enumerate(lengths)
    ]
    alone = {}
    engine = opened()
    for item in requests:
        alone[item.request_id] = tokens(run(engine, [item])[item.request_id])

    batched = run(engine, requests)
    chunked_engine = opened(max_batched_tokens=11, max_batch_size=4)
    chunked = run(chunked_engine, requests)
    # 16 pages: the first two fill 15 at once and both grow into one more.
    small = opened(max_kv_tokens=16 * 16, max_batched_tokens=64)
    preempted = run(small, requests)

    # The first round computes the pages that the second finds.
    reusing = opened(prefix_cache=True)
    run(reusing, requests)
    found = run(reusing, requests)

    assert engine.num_preemptions == chunked_engine.num_preemptions == 0
    assert small.num_preemptions > 0
    assert reusing.current_load().cached_prompt_tokens >= (192 + 16 + 48 + 16)
    for name, outputs in (
        ("batched", batched),
        ("chunked", chunked),
        ("preempted", preempted),
        ("found", found),
    ):
        got = {
            request_id: tokens(request_outputs) for request_id, request_outputs in outputs.items()
        }
        assert got == alone, f"{recipe=} {name}"


@pytest.mark.parametrize("width", [16, 24, 128, 152])
def test_a_gate_has_the_same_bits_in_any_batch(width: int) -> None:
    """torch's own sigmoid computes the tail of a tensor by another formula than the rest."""
    kernels = Kernels.detect(batch_invariant=False)
    x = 4 * torch.randn(21, 2 * width, generator=torch.Generator().manual_seed(0))
    whole = silu_gate(x, kernels)
    gate, up = x.double().chunk(2, dim=-1)
    torch.testing.assert_close(whole.double(), gate * gate.sigmoid() * up, rtol=1e-6, atol=1e-6)
    for first in range(len(x)):
        for last in (first + 1, first + 3):
            assert torch.equal(silu_gate(x[first:last], kernels), whole[first:last]), (first, last)


@pytest.mark.heavy
def test_without_batch_invariance_logits_differ_by_rounding_only(tiny_model: Path) -> None:
    ids = torch.tensor(some_text(tiny_model, 100))
    strict = LLMEngine.from_checkpoint(tiny_model, EngineOptions(kv_cache="fp32", kernels="torch"))
    loose = LLMEngine.from_checkpoint(
        tiny_model,
        EngineOptions(
            kv_cache="fp32",
            kernels="torch",
            batch_invariant=False,
            max_batched_tokens=1,
            max_batch_size=1,
        ),
    )
    torch.testing.assert_close(loose.score(ids), strict.score(ids), rtol=1e-3, atol=1e-3)
