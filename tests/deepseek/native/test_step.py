"""Whole native steps (deepseek/native/model.h) on every instruction set: against PyTorch's step,
over every KV layout, whatever the chunks, the batch and the threads; the router; and nothing beside
the engine's tensors is read or written.

The model has every weight format: one expert of a layer each, and some of the dense linears.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from support.native_linears import Frame, poisoned
from support.synthetic import quantize_plainly, write_checkpoint
from torch import Tensor

from deepseek import _native
from deepseek.artifact.reader import ArtifactReader
from deepseek.config import ModelConfig
from deepseek.engine.batch import Span, make_batch
from deepseek.engine.kv_cache import LatentCache
from deepseek.engine.linear import Kernels
from deepseek.engine.model import Model
from deepseek.engine.native_model import NativeModel
from deepseek.engine.packing import pack_tensors, schemes_of, to_torch_layout
from deepseek.engine.runner import StepModel
from deepseek.kv_layout import KVLayout
from deepseek.recipe import Recipe, Rule, Scheme, load_recipe
from deepseek.source.checkpoint import CheckpointReader

ISAS: list[str] = _native.available_isas()
LAYOUTS: tuple[KVLayout, ...] = get_args(KVLayout)
PAGE_TOKENS = 16
#: Relative error of a token's hidden state against torch's step on the same values: what the two
#: round differently; see MAX_ERROR in tests/deepseek/engine/test_native.py. Measured: the medians
#: are up to 0.027 (plain; FP8 pages) and 0.04 (mixed; INT8 inputs), of a token with another
#: expert 0.7.
MAX_ERROR = {"mixed": 0.06, "plain": 0.04}
#: Formats of the experts 0, 1, ... of the mixed model, by turns; every one that there is.
EXPERTS = (
    Scheme(weights="bf16"),
    Scheme(weights="int8"),
    Scheme(weights="int8-asym"),
    Scheme(weights="int8", activations="int8"),
    Scheme(weights="int8-block", activations="int8"),
    Scheme(weights="int4", group_size=128),
    Scheme(weights="int4-asym", group_size=32),
    Scheme(weights="int4", group_size=64, activations="int8"),
    Scheme(weights="int4-asym", group_size=128, activations="int8"),
    Scheme(weights="int4", group_size=128, activations="fp8"),
)


@dataclass(frozen=True)
class Packed:
    """A model's tensors in the native layout."""

    config: ModelConfig
    schemes: dict[str, Scheme]
    tensors: dict[str, Tensor]

    def native(self, **changed: Tensor) -> NativeModel:
        """`changed`: tensors by name, dots as double underscores."""
        given = {name.replace("__", "."): tensor for name, tensor in changed.items()}
        assert given.keys() <= self.tensors.keys()
        return NativeModel(self.config, self.schemes, self.tensors | given)

    def torch(self) -> Model:
        tensors = to_torch_layout(self.config, self.schemes, dict(self.tensors))
        return Model(self.config, self.schemes, tensors, Kernels.detect(batch_invariant=True))


def mixed_recipe() -> Recipe:
    schemes = {
        "*": EXPERTS[3],
        "*.q_a_proj": EXPERTS[6],
        "*.o_proj": Scheme(weights="int4", group_size=32, activations="int8"),
        "*.shared_experts.up_proj": EXPERTS[5],
        **{f"*.mlp.experts.{e}.*": scheme for e, scheme in enumerate(EXPERTS)},
        "*.mlp.experts.3.up_proj": EXPERTS[1],
        "lm_head": Scheme(weights="int8", activations="int8"),
    }
    rules = tuple(
        Rule(match=match, **scheme.model_dump(exclude_unset=True))
        for match, scheme in schemes.items()
    )
    return load_recipe("int8").model_copy(update={"name": "mixed", "rules": rules})


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """Three heads, a value narrower than a key, ten experts in two groups."""
    folder = tmp_path_factory.mktemp("mixed")
    write_checkpoint(
        folder / "source",
        experts=len(EXPERTS),
        num_attention_heads=3,
        num_key_value_heads=3,
        v_head_dim=32,
        max_position_embeddings=1024,
    )
    quantize_plainly(folder / "source", mixed_recipe(), folder / "artifact")
    artifact = ArtifactReader(folder / "artifact")
    return Packed(artifact.config, dict(artifact.schemes), pack_tensors(artifact))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """Unquantized, without a query latent, with two shared experts; every layer has experts."""
    folder = tmp_path_factory.mktemp("plain")
    write_checkpoint(
        folder,
        fp8=False,
        q_lora_rank=None,
        n_shared_experts=2,
        first_k_dense_replace=0,
        num_experts_per_tok=3,
        topk_group=2,
        max_position_embeddings=1024,
    )
    source = CheckpointReader(folder)
    return Packed(source.config, schemes_of(source), pack_tensors(source))


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    _native.use_isa(request.param)
    return str(request.param)


@pytest.fixture
def restored_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def token_ids(packed: Packed, count: int) -> list[int]:
    """Every token of the vocabulary, its last one too."""
    vocabulary = packed.config.vocab_size
    return [(vocabulary - 1 - 5 * i) % vocabulary for i in range(count)]


def make_cache(packed: Packed, layout: KVLayout, num_pages: int = 40) -> LatentCache:
    """A cache whose unwritten slots are NaN where their type has one."""
    cache = LatentCache(packed.config, layout, num_pages, PAGE_TOKENS)
    cache.poison(list(range(1, num_pages + 1)))
    return cache


def run_step(model: StepModel, cache: LatentCache, spans: list[Span]) -> list[Tensor]:
    """Hidden states f32 [tokens, D] of each span."""
    batch = make_batch(spans, PAGE_TOKENS)
    hidden = model.forward(batch, cache)
    counts = [len(span.token_ids) for span in spans]
    ends = zip(batch.last_rows, counts, strict=True)
    return [hidden[last + 1 - count : last + 1] for last, count in ends]


def ragged_spans(packed: Packed) -> list[Span]:
    """Chunks and single tokens from position 0, on pages up to the last one, in no order."""
    ids = token_ids(packed, 400)
    return [
        Span(ids[:83], 0, [40, 3, 9, 1, 38, 12]),
        Span(ids[90:91], 0, [2]),
        Span(ids[91:92], 0, [39]),
        Span(ids[92:109], 0, [5, 4]),
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["mixed", "plain"])
def test_a_step_is_torchs(
    name: str, layout: KVLayout, isa: str, request: pytest.FixtureRequest
) -> None:
    packed: Packed = request.getfixturevalue(name)
    spans = ragged_spans(packed)
    fast, slow = packed.native(), packed.torch()
    # The torch path multiplies what it masks by zero, so its cache holds no NaN.
    clean = LatentCache(packed.config, layout, 40, PAGE_TOKENS)
    for got, want in zip(
        run_step(fast, make_cache(packed, layout), spans),
        run_step(slow, clean, spans),
        strict=True,
    ):
        error = ((got - want).norm(dim=1) / want.norm(dim=1)).median()
        assert error < MAX_ERROR[name]
        torch.testing.assert_close(
            fast.logits(want), slow.logits(want), rtol=0.02, atol=0.02 * float(want.abs().max())
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["mixed", "plain"])
def test_a_token_s_bits_do_not_depend_on_chunks_batch_or_threads(
    name: str, layout: KVLayout, isa: str, restored_threads: None, request: pytest.FixtureRequest
) -> None:
    """300 tokens, two attention blocks: at once on one thread; then in chunks on three, beside
    another sequence, on other pages."""
    packed: Packed = request.getfixturevalue(name)
    model, ids = packed.native(), token_ids(packed, 300)
    torch.set_num_threads(1)
    pages = list(range(1, 20))
    [whole] = run_step(model, make_cache(packed, layout), [Span(ids, 0, pages)])
    logits = model.logits(whole)
    torch.set_num_threads(3)
    cache, start = make_cache(packed, layout), 0
    other, own = list(range(20, 40)), pages[::-1]
    for count in (1, 60, 1, 7, 130, 1, 57, 43):
        given = [Span(ids[start + 7 : start + 12], 0, other), Span(ids[start:][:count], start, own)]
        got = run_step(model, cache, given)[1]
        assert torch.equal(got, whole[start : start + count]), (start, count)
        assert torch.equal(model.logits(got[-3:]), logits[start : start + count][-3:])
        start += count
    assert start == len(ids)


@pytest.mark.parametrize("name", ["mixed", "plain"])
def test_memory_beside_the_engine_s_tensors_is_neither_read_nor_written(
    name: str, isa: str, request: pytest.FixtureRequest
) -> None:
    """Each tensor lies between bytes of 0xFF, which are NaN as floats: what was read from there
    would be in the results, and what was written there is seen."""
    packed: Packed = request.getfixturevalue(name)
    frames: list[Frame] = []
    framed: dict[str, Tensor] = {}
    for key, tensor in packed.tensors.items():
        framed[key], frame = poisoned(tensor)
        frames.append(frame)
    spans = ragged_spans(packed)
    expected = run_step(packed.native(), make_cache(packed, "int8"), spans)
    model = replace(packed, tensors=framed).native()
    got = run_step(model, make_cache(packed, "int8"), spans)
    assert all(map(torch.equal, got, expected))
    assert got[0].isfinite().all()
    assert torch.equal(model.logits(got[0]), packed.native().logits(got[0]))
    assert all(frame.is_whole() for frame in frames)


def test_other_pages_are_neither_read_nor_written(mixed: Packed, isa: str) -> None:
    spans = ragged_spans(mixed)
    used = torch.tensor(sorted({page for span in spans for page in span.pages}))
    for layout in LAYOUTS:
        cache = make_cache(mixed, layout)
        free = torch.tensor([p for p in range(41) if p not in used.tolist()])
        before = [t.view(torch.uint8).index_select(1, free) for t in cache.tensors]
        outputs = run_step(mixed.native(), cache, spans)
        after = [t.view(torch.uint8).index_select(1, free) for t in cache.tensors]
        assert all(map(torch.equal, before, after)), layout
        assert all(output.isfinite().all() for output in outputs), layout


def test_layers_may_be_narrower_than_a_query(tmp_path: Path, isa: str) -> None:
    """What a thread keeps of one row is as wide as the widest of them."""
    write_checkpoint(
        tmp_path,
        fp8=False,
        intermediate_size=16,
        moe_intermediate_size=16,
        qk_nope_head_dim=192,
        max_position_embeddings=1024,
    )
    source = CheckpointReader(tmp_path)
    narrow = Packed(source.config, schemes_of(source), pack_tensors(source))
    spans = ragged_spans(narrow)
    fast = run_step(narrow.native(), make_cache(narrow, "fp32"), spans)
    clean = LatentCache(narrow.config, "fp32", 40, PAGE_TOKENS)
    for got, want in zip(fast, run_step(narrow.torch(), clean, spans), strict=True):
        errors = (got - want).norm(dim=1) / want.norm(dim=1)
        assert errors.median() < MAX_ERROR["plain"]


def test_an_embedding_in_fp32_has_the_bits_of_its_values_in_bf16(mixed: Packed, isa: str) -> None:
    spans = ragged_spans(mixed)
    table = mixed.tensors["model.embed_tokens.weight"]
    assert table.dtype == torch.bfloat16
    model = mixed.native(model__embed_tokens__weight=table.float())
    results = [run_step(m, make_cache(mixed, "bf16"), spans) for m in (mixed.native(), model)]
    assert all(map(torch.equal, *results))


# --- the router ---


def with_router(packed: Packed, weight: Tensor, bias: Tensor) -> NativeModel:
    """The last layer with this router [E, D] and bias [E]."""
    prefix = f"model__layers__{packed.config.num_hidden_layers - 1}__mlp__gate"
    return packed.native(
        **{f"{prefix}__weight": weight, f"{prefix}__e_score_correction_bias": bias}
    )


def test_equal_scores_choose_the_lowest_experts_of_the_lowest_group(
    mixed: Packed, isa: str
) -> None:
    config, spans = mixed.config, ragged_spans(mixed)
    weight = torch.zeros(config.n_routed_experts, config.hidden_size)
    tied = with_router(mixed, weight, torch.zeros(config.n_routed_experts))
    bias = torch.zeros(config.n_routed_experts)
    bias[: config.num_experts_per_tok] = torch.tensor([2.0, 1.0])
    chosen = with_router(mixed, weight, bias)
    bias = torch.zeros(config.n_routed_experts)
    bias[-config.num_experts_per_tok :] = torch.tensor([2.0, 1.0])
    others = with_router(mixed, weight, bias)
    results = [run_step(m, make_cache(mixed, "bf16"), spans) for m in (tied, chosen, others)]
    assert all(map(torch.equal, results[0], results[1]))
    assert not any(map(torch.equal, results[0], results[2]))


def test_experts_without_tokens_and_two_experts_with_all_of_them(mixed: Packed, isa: str) -> None:
    """Each expert in turn and the next of its group are every token's; all others have none."""
    config, spans = mixed.config, ragged_spans(mixed)
    experts, width = config.n_routed_experts, config.n_routed_experts // config.n_group
    weight = torch.zeros(experts, config.hidden_size)
    outputs = set()
    for expert in range(experts):
        bias = torch.zeros(experts)
        bias[expert] = 5.0
        bias[expert // width * width + (expert + 1) % width] = 3.0
        model = with_router(mixed, weight, bias)
        got = run_step(model, make_cache(mixed, "bf16"), spans)
        # The same, token by token: runs of one row.
        for output, span in zip(got, spans, strict=True):
            token = Span(span.token_ids[:1], 0, span.pages)
            [alone] = run_step(model, make_cache(mixed, "bf16"), [token])
            assert torch.equal(alone, output[:1])
        outputs.add(tuple(got[0][0].tolist()))
    assert len(outputs) == experts


@pytest.mark.parametrize("name", ["mixed", "plain"])
def test_the_chosen_experts_are_torchs(name: str, isa: str, request: pytest.FixtureRequest) -> None:
    """Scores that lie apart by far more than rounding, so that every token, and not only the median
    one, has the same experts: one direction of the hidden states for each expert."""
    packed: Packed = request.getfixturevalue(name)
    config = packed.config
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(config.n_routed_experts, config.hidden_size, generator=generator)
    prefix = f"model.layers.{config.num_hidden_layers - 1}.mlp.gate"
    bias = torch.linspace(-0.2, 0.2, config.n_routed_experts)
    changed = packed.tensors | {
        f"{prefix}.weight": 0.02 * weight,
        f"{prefix}.e_score_correction_bias": bias,
    }
    routed = replace(packed, tensors=changed)
    spans = ragged_spans(packed)
    fast = run_step(routed.native(), make_cache(packed, "fp32"), spans)
    clean = LatentCache(config, "fp32", 40, PAGE_TOKENS)
    for got, want in zip(fast, run_step(routed.torch(), clean, spans), strict=True):
        errors = (got - want).norm(dim=1) / want.norm(dim=1)
        assert errors.quantile(0.9) < 1.5 * MAX_ERROR[name]


def test_a_token_that_is_not_finite_shows_in_its_own_sequence_alone(
    mixed: Packed, isa: str
) -> None:
    """Token 0 of the vocabulary is NaN, and so is its sequence from there on."""
    embedding = mixed.tensors["model.embed_tokens.weight"].clone()
    embedding[0] = torch.nan
    model = mixed.native(model__embed_tokens__weight=embedding)
    spans = [Span([5, 6, 0, 7], 0, [1]), Span([5, 6, 8, 7], 0, [2]), Span([9], 0, [3])]
    got = run_step(model, make_cache(mixed, "bf16"), spans)
    clean = run_step(mixed.native(), make_cache(mixed, "bf16"), spans)
    assert got[0][2:].isnan().all()
    assert torch.equal(got[1], clean[1])
    assert torch.equal(got[2], clean[2])


@pytest.mark.parametrize("rows", [0, 1, 2, 5, 17, 64])
def test_logits_of_any_number_of_rows_have_the_bits_of_single_ones(
    mixed: Packed, rows: int, isa: str
) -> None:
    model = mixed.native()
    hidden = torch.randn(64, mixed.config.hidden_size, generator=torch.Generator().manual_seed(0))
    whole = torch.cat([model.logits(row[None]) for row in hidden])
    assert torch.equal(model.logits(hidden[:rows]), whole[:rows])
