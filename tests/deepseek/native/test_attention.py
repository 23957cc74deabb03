"""The native attention against a plain float64 one and against the engine's own over the same
cache, in every layout, on every instruction set of this CPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from deepseek.engine.attention import Attention
from deepseek.engine.batch import Span, make_batch
from deepseek.engine.kv_cache import LatentCache
from deepseek.engine.linear import Kernels
from deepseek.engine.pages import BLOCK_TOKENS
from deepseek.kv_layout import KVLayout
from deepseek.models import DEEPSEEK_V3

_native = pytest.importorskip("deepseek._native", reason="the extension is not built")
from deepseek.engine.native_attention import (  # noqa: E402  (it imports the extension)
    NativeCache,
    SpanTable,
    attend,
    takes_widths,
)

LAYOUTS: tuple[KVLayout, ...] = get_args(KVLayout)
ISAS: list[str] = _native.available_isas()
#: Relative error (Frobenius norm) against float64 over the values that the cache holds. fp32 adds
#: up in another order; BF16 rounds queries and weights by up to 2^-9; int8 rounds queries and
#: weights to 16 and 15 bits, and the rotary part of the queries to BF16.
TOLERANCE: dict[KVLayout, float] = {
    "fp32": 5e-6,
    "bf16": 6e-3,
    "fp8-tiles": 6e-3,
    "fp8-tensor": 6e-3,
    "int8": 3e-3,
}
#: H, R, r: less than a vector of rows, not a multiple of it; ragged groups and tiles of channels.
SHAPES = [(16, 256, 64), (4, 48, 16), (5, 200, 32), (24, 128, 8), (128, 512, 64)]
LAYER = 1


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _native.use_isa(request.param)
    yield request.param
    _native.use_isa("")


@dataclass
class World:
    """Sequences whose first tokens are in the cache, and the next ones of each."""

    cache: LatentCache
    native: NativeCache
    spans: list[Span]
    query: Tensor
    latent: Tensor
    key: Tensor

    def attend(self, threads: int = 2) -> Tensor:
        spans = SpanTable(self.native, self.spans)
        return attend(self.native, LAYER, self.query, self.latent, self.key, spans, threads)

    def rows(self, number: int) -> slice:
        first = sum(len(span.token_ids) for span in self.spans[:number])
        return slice(first, first + len(self.spans[number].token_ids))

    def alone(self, number: int, first: int, last: int) -> World:
        """Tokens [first, last) of one span, over the same cache."""
        span, rows = self.spans[number], self.rows(number)
        part = slice(rows.start + first, rows.start + last)
        spans = [Span([0] * (last - first), span.start + first, span.pages)]
        parts = [x[part].contiguous() for x in (self.query, self.latent, self.key)]
        return World(self.cache, self.native, spans, *parts)


def make_world(
    layout: KVLayout,
    shape: tuple[int, int, int],
    spans: list[tuple[int, int]],
    *,
    page_tokens: int = 16,
    poison: bool = True,
    seed: int = 0,
) -> World:
    """Sequences of `spans` (start, number of tokens) with pages in random order; every slot that
    holds no token is NaN where its type has one."""
    heads, latent, rope = shape
    generator = torch.Generator().manual_seed(seed)
    needed = [-(-(start + count) // page_tokens) for start, count in spans]
    num_pages = sum(needed) + 3
    config = replace(DEEPSEEK_V3, kv_lora_rank=latent, qk_rope_head_dim=rope, num_hidden_layers=3)
    cache = LatentCache(config, layout, num_pages, page_tokens)
    if poison:
        cache.poison(list(range(1, num_pages + 1)))
    order = (torch.randperm(num_pages, generator=generator) + 1).tolist()
    placed = []
    for (start, count), pages in zip(spans, needed, strict=True):
        own, order = order[:pages], order[pages:]
        placed.append(Span([0] * count, start, own))
        slots = torch.tensor([own[t // page_tokens] * page_tokens + t % page_tokens
                              for t in range(start)], dtype=torch.int64)  # fmt: skip
        cache.write(
            LAYER,
            slots,
            torch.randn(start, latent, generator=generator),
            3 * torch.randn(start, rope, generator=generator),
        )
    tokens = sum(count for _, count in spans)
    # Scores of a few units: neither uniform weights nor one token alone.
    query = torch.randn(tokens, heads, latent + rope, generator=generator)
    query *= 2 * (latent + 9 * rope) ** -0.5
    return World(
        cache,
        NativeCache(cache),
        placed,
        query,
        torch.randn(tokens, latent, generator=generator),
        3 * torch.randn(tokens, rope, generator=generator),
    )


def reference(world: World) -> Tensor:
    """Softmax over what the cache holds, in float64; the step's tokens must be written."""
    results = []
    for number, span in enumerate(world.spans):
        keys = world.cache.read(LAYER, torch.tensor([span.pages]))[0].double()
        for i, query in enumerate(world.query[world.rows(number)].double()):
            visible = keys[: span.start + i + 1]
            weights = torch.softmax(query @ visible.T, dim=-1)
            results.append(weights @ visible[:, : world.native.latent])
    return torch.stack(results)


def torch_path(world: World) -> Tensor:
    """The engine's own attention over the same cache, in FP32."""
    attention = Attention.__new__(Attention)
    attention._layer = LAYER
    attention._kernels = Kernels.detect(batch_invariant=False)
    attention._config = replace(DEEPSEEK_V3, kv_lora_rank=world.native.latent)
    batch = make_batch(world.spans, world.native.page_tokens)
    order = sorted(range(len(world.spans)), key=lambda i: batch.last_rows[i])
    given = torch.cat([torch.arange(world.query.shape[0])[world.rows(i)] for i in order])
    results = [attention._attend(world.query[given][g.rows], g, world.cache) for g in batch.groups]
    output = torch.empty_like(torch.cat(results))
    output[given] = torch.cat(results)
    return output


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_decodes_and_chunks_of_ragged_contexts(
    layout: KVLayout, shape: tuple[int, int, int], isa: str
) -> None:
    """One token, block boundaries from both sides, several runs of blocks, chunks over earlier
    context; free pages and the unused ends of pages are poisoned."""
    spans = [(0, 1), (255, 1), (256, 1), (700, 1), (250, 9), (0, 37), (1290, 3)]
    world = make_world(layout, shape, spans)
    got = world.attend()
    assert error(got, reference(world)) < TOLERANCE[layout]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page_tokens", [1, 4, 64, 256])
def test_any_size_of_pages(layout: KVLayout, page_tokens: int) -> None:
    spans = [(300, 1), (0, 70), (513, 2)]
    world = make_world(layout, (16, 64, 16), spans, page_tokens=page_tokens)
    assert error(world.attend(), reference(world)) < TOLERANCE[layout]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_agrees_with_the_engine_s_torch_path(layout: KVLayout, isa: str) -> None:
    # The torch path multiplies what it masks by zero, so unused slots must be zeros for it.
    spans = [(299, 1), (17, 1), (1100, 1), (0, 5), (500, 40)]
    world = make_world(layout, (16, 256, 64), spans, poison=False)
    got = world.attend()
    assert error(got, torch_path(world)) < TOLERANCE[layout]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(16, 256, 64), (5, 200, 32)])
def test_latents_are_stored_with_the_bits_of_the_cache_s_own_write(
    layout: KVLayout, shape: tuple[int, int, int], isa: str
) -> None:
    world = make_world(layout, shape, [(40, 9), (0, 3)])
    # Zeros, subnormal numbers, ties, values that saturate e4m3, negative zero.
    world.latent[0], world.key[0] = 0.0, -0.0
    world.latent[1] *= 1e-40
    world.latent[2, :4] = torch.tensor([1000.0, -448.0, 464.0, 2.0**-10])
    world.latent[3] = (torch.arange(shape[1]) % 37 - 18) * 2.0**-10
    world.latent[4] = (torch.arange(shape[1]) - 100) * 1.0625
    world.key[2, :3] = torch.tensor([-7e4, 1 + 2.0**-8, 1 + 3 * 2.0**-8])
    world.latent[5] *= 1e30
    world.attend()
    other = LatentCache(
        replace(DEEPSEEK_V3, kv_lora_rank=shape[1], qk_rope_head_dim=shape[2], num_hidden_layers=3),
        layout,
        world.native.num_pages - 1,
        16,
    )
    slots = torch.tensor(
        [s.pages[p // 16] * 16 + p % 16 for s in world.spans for p in range(s.start, s.stop)]
    )
    other.write(LAYER, slots, world.latent, world.key)
    for got, want in zip(world.cache.tensors, other.tensors, strict=True):
        rows = [x[LAYER].flatten(0, 1).view(torch.uint8)[slots] for x in (got, want)]
        assert torch.equal(*rows)
        assert not got[LAYER, 0].view(torch.uint8).any(), "the zero page stays zero"
        assert not got[[0, 2], 0].view(torch.uint8).any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_s_bits_do_not_depend_on_batch_chunks_or_threads(layout: KVLayout, isa: str) -> None:
    spans = [(1500, 1), (30, 1), (250, 20), (0, 300), (2 * BLOCK_TOKENS - 1, 2)]
    world = make_world(layout, (16, 64, 16), spans)
    together = world.attend()
    for threads in (1, 3, 8):
        assert torch.equal(world.attend(threads), together)
    for number, span in enumerate(spans):
        rows, count = together[world.rows(number)], span[1]
        for size in {1, 7, count}:
            if size == 1 and count > 30:
                pieces = [(i, i + 1) for i in (0, 1, 255, 256, count - 1)]
            else:
                pieces = [(i, min(i + size, count)) for i in range(0, count, size)]
            for first, last in pieces:
                alone = world.alone(number, first, last).attend(1 + size % 2)
                assert torch.equal(alone, rows[first:last]), (number, first, last)


@pytest.mark.parametrize("heads", [3, 16, 40])
def test_heads_that_do_not_fill_vectors_have_the_bits_of_others(heads: int) -> None:
    world = make_world("bf16", (heads, 64, 16), [(600, 3)])
    together = world.attend()
    for head in range(0, heads, 7):
        one = replace(world, query=world.query[:, head : head + 1].contiguous())
        assert torch.equal(one.attend()[:, 0], together[:, head])


def test_int8_has_the_same_integers_on_every_instruction_set() -> None:
    """Without a rotary key only the exponential and scales are floating-point; they use the same
    fused operations on all but the portable one."""
    results = {}
    for name in ISAS:
        _native.use_isa(name)
        world = make_world("int8", (16, 256, 64), [(700, 4)])
        world.query[..., 256:] = 0.0
        results[name] = world.attend()
    _native.use_isa("")
    fused = [result for name, result in results.items() if name != "portable"]
    assert all(torch.equal(result, fused[0]) for result in fused)
    assert error(results["portable"], (fused or [results["portable"]])[0]) < 1e-5


def test_extreme_int8_values_do_not_overflow(isa: str) -> None:
    """Queries and codes all at their largest: every partial sum is as large as it can be."""
    world = make_world("int8", (16, 512, 64), [(255, 1)])
    ones = torch.ones(255, 512)
    slots = torch.tensor([world.spans[0].pages[t // 16] * 16 + t % 16 for t in range(255)])
    for sign in (1.0, -1.0):
        world.cache.write(LAYER, slots, sign * ones, torch.zeros(255, 64))
        world.latent, world.key = sign * torch.ones(1, 512), torch.zeros(1, 64)
        world.query = torch.full((1, 16, 576), 0.01)
        got = world.attend()
        torch.testing.assert_close(got, torch.full((1, 16, 512), sign), rtol=1e-4, atol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_that_lie_far_apart(layout: KVLayout, isa: str) -> None:
    """Weights that vanish, and a maximum that grows from block to block."""
    world = make_world(layout, (16, 64, 16), [(1200, 2)])
    world.query *= 60
    want = reference_after(world)
    got = world.attend()
    assert got.isfinite().all()
    # Scores of hundreds: rounding of the queries moves them by a fraction of a unit.
    assert error(got, want) < (1e-4 if layout == "fp32" else 0.3)


def reference_after(world: World) -> Tensor:
    world.attend()
    return reference(world)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_the_rows_that_see_it(
    layout: KVLayout, value: float, isa: str
) -> None:
    if layout == "fp8-tensor" and value == float("inf"):
        pytest.skip("infinity saturates in this layout")
    for where in ("latent", "key", "query"):
        world = make_world(layout, (16, 64, 16), [(300, 1), (20, 1)])
        tensor = getattr(world, where)
        tensor[0].view(-1)[3] = value
        got = world.attend()
        hit = got[0, 0] if where == "query" else got[0]
        assert not hit.isfinite().any(dim=-1).all(), where
        assert got[1].isfinite().all(), "another sequence is not touched"


def test_exp_against_float64(isa: str) -> None:
    """The weights of two tokens are e^d / (1 + e^d) and the rest: with fp32 pages and latents of
    0 and 1 the output is the weight itself. The polynomial is exact within 2 units in the last
    place, and the quotient adds as many."""
    gaps = torch.cat((torch.linspace(-86, 0, 4001), torch.tensor([-1e-6, -0.34657, -0.34658])))
    world = make_world("fp32", (len(gaps), 4, 2), [(1, 1)])
    slot = torch.tensor([world.spans[0].pages[0] * 16])
    world.cache.write(LAYER, slot, torch.zeros(1, 4), torch.zeros(1, 2))
    world.latent, world.key = torch.ones(1, 4), torch.zeros(1, 2)
    world.query = torch.zeros(1, len(gaps), 6)
    world.query[0, :, 0] = gaps
    got = world.attend()[0, :, 0].double()
    exact = gaps.double().exp()
    want = exact / (1 + exact)
    assert ((got - want).abs() / want).max() < 4 * 2.0**-23


def test_widths_that_the_kernels_take() -> None:
    assert takes_widths(512, 64)
    assert takes_widths(4, 2)
    assert not takes_widths(510, 64)
    assert not takes_widths(512, 63)
    assert not takes_widths(2048, 64)
    config = replace(DEEPSEEK_V3, kv_lora_rank=66, qk_rope_head_dim=16)
    with pytest.raises(AssertionError):
        NativeCache(LatentCache(config, "bf16", 2, 16))
