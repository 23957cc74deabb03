"""Thousands of random requests on the native kernels, of INT8 and of INT4, on every instruction set
that this CPU can stand for: each answer has the bits of the request alone; all pages come back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.engines import make_engine
from support.soaking import random_requests, soak

from deepseek.engine.detokenizer import load_tokenizer
from deepseek.engine.engine import EngineOptions, LLMEngine

_native = pytest.importorskip("deepseek._native", reason="the extension was not built")

BEST: str = _native.available_isas()[-1]
PAGE_TOKENS = 8


@pytest.fixture(autouse=True)
def _chosen_isa() -> Iterator[None]:
    yield
    _native.use_isa("")


def open_engine(directory: Path, kv_cache: str, **options: int | bool) -> LLMEngine:
    given = {"max_model_len": 384, "max_kv_tokens": 2048} | options
    return LLMEngine.load(
        directory,
        EngineOptions(
            kernels="native",
            kv_cache=kv_cache,
            page_tokens=PAGE_TOKENS,
            poison_free_pages=True,
            **given,
        ),
    )


def slow(*values: object) -> object:
    return pytest.param(*values, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("count", "recipe", "kv_cache", "isa"),
    [
        (60, "int8", "int8", BEST),
        (60, "int8-head", "bf16", BEST),
        (60, "int4-a8", "bf16", BEST),
        slow(2000, "int8", "bf16", BEST),
        slow(2000, "int4-a8", "int8", BEST),
        *(
            slow(count, recipe, kv_cache, isa)
            for isa, count in (("avx2", 500), ("portable", 120))
            for recipe, kv_cache in (("int8", "int8"), ("int4-a8", "fp8"))
        ),
    ],
)
def test_random_requests_have_the_bits_of_each_alone_and_all_pages_come_back(
    count: int, recipe: str, kv_cache: str, isa: str, tiny_model: Path, base: Path
) -> None:
    """In a cache for about six of them, and for one of the longest, which end in a second attention
    block. Free pages are NaN where their type has one."""
    if isa not in _native.available_isas():
        pytest.skip(f"this CPU has no {isa}")
    _native.use_isa(isa)
    directory = make_engine(tiny_model, recipe, base)
    plain = open_engine(directory, kv_cache, prefix_cache=False)
    engine = open_engine(
        directory, kv_cache, max_kv_tokens=320, max_batch_size=8, max_batched_tokens=24
    )
    assert engine.identity.kernels == f"native ({isa})"
    ids = load_tokenizer(tiny_model).encode((tiny_model / "heldout.txt").read_text()[:2000]).ids
    heads = [ids[:48], ids[50:98], ids[100:148]]
    chance = random.Random(count)
    items = random_requests(
        chance, count, heads, plain.config.vocab_size, longest_answer=40, long_prompt=280
    )
    soak(engine, plain, items, chance)
