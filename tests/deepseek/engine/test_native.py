"""The native step against PyTorch's, layer by layer; what happens where there is no extension."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.engines import make_engine, request, run, tokens
from support.family import family_model
from support.synthetic import quantize_plainly, write_checkpoint
from torch import Tensor

from deepseek.artifact.reader import ArtifactReader
from deepseek.config import ModelConfig
from deepseek.engine import native
from deepseek.engine.batch import Batch, Span, make_batch
from deepseek.engine.engine import EngineOptions, LLMEngine
from deepseek.engine.kv_cache import LatentCache
from deepseek.engine.linear import Kernels
from deepseek.engine.model import Model
from deepseek.engine.opening import make_model
from deepseek.engine.packed import load_packed
from deepseek.engine.packing import pack_tensors, schemes_of, to_torch_layout
from deepseek.errors import DeployError
from deepseek.recipe import Recipe, Rule, Scheme, load_recipe
from deepseek.source.checkpoint import CheckpointReader

#: Relative error of the final hidden states and of the logits after any number of layers, on BF16
#: pages, the median over tokens: what the two round differently, not the formats. (A few tokens
#: choose another expert, and then differ by far more.) Measured after the last layer, where it is
#: largest: 0.003 to 0.008 with BF16 inputs, 0.013 to 0.019 with INT8 or FP8 ones,
#: where a code that differs by one counts for more than the rounding that made it so.
MAX_ERROR = {
    "unquantized": 0.01,
    "int8": 0.04,
    "int8-head": 0.04,
    "int8-weight-only": 0.02,
    "int8-asym": 0.01,
    "int8-block": 0.03,
    "int4": 0.01,
    "int4-all": 0.01,
    "int4-asym": 0.01,
    "int4-a8": 0.03,
    "w4a8": 0.03,
}


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    pytest.importorskip("deepseek._native", reason="the extension was not built")


def batch_of(ids: list[int]) -> Batch:
    """A step of one chunk, two single tokens and another chunk, over fresh pages of 16 tokens."""
    spans = [
        Span(ids[:90], 0, list(range(1, 8))),
        Span(ids[90:91], 0, [8]),
        Span(ids[91:92], 0, [9]),
        Span(ids[92:99], 0, [10]),
    ]
    return make_batch(spans, 16)


def layers_of(tensors: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The tensors of the first layers, and of what is outside of layers."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith("model.layers.") or int(name.split(".")[2]) < count
    }


def errors_by_depth(
    config: ModelConfig, schemes: dict[str, Scheme], tensors: dict[str, Tensor]
) -> list[float]:
    """Relative error of the native hidden states after 1, 2, ... layers, and of the logits."""
    batch = batch_of((torch.arange(99) * 7 % (config.vocab_size - 5) + 5).tolist())
    torch_kernels = Kernels.detect(batch_invariant=True)
    errors = []
    for depth in range(1, config.num_hidden_layers + 1):
        part = replace(
            config,
            num_hidden_layers=depth,
            first_k_dense_replace=min(depth, config.first_k_dense_replace),
        )
        given = layers_of(tensors, depth)
        fast = make_model(part, schemes, given, replace(torch_kernels, isa="any"))
        slow = Model(part, schemes, to_torch_layout(part, schemes, dict(given)), torch_kernels)
        hidden = [model.forward(batch, LatentCache(part, "bf16", 10, 16)) for model in (fast, slow)]
        errors.append(error_of(*hidden))
        errors.append(error_of(fast.logits(hidden[1][-9:]), slow.logits(hidden[1][-9:])))
    return errors


def error_of(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return ((got - want).norm(dim=1) / want.norm(dim=1)).median().item()


@pytest.mark.heavy
@pytest.mark.parametrize("recipe", MAX_ERROR)
def test_after_every_layer_the_native_step_is_torchs(
    recipe: str, tiny_model: Path, base: Path
) -> None:
    if recipe == "unquantized":
        source = CheckpointReader(tiny_model)
        config, schemes, tensors = source.config, schemes_of(source), pack_tensors(source)
    else:
        packed = load_packed(make_engine(tiny_model, recipe, base))
        config, schemes, tensors = packed.config, packed.manifest.schemes, packed.tensors
    errors = errors_by_depth(config, schemes, tensors)
    assert max(errors) < MAX_ERROR[recipe], f"{recipe}: {[f'{e:.1e}' for e in errors]}"


def mixed_recipe() -> Recipe:
    """Single experts, halves of fused projections and single layers in formats of their own."""
    rules = (
        ("*", Scheme(weights="int8", activations="int8")),
        ("*.q_a_proj", Scheme(weights="int8")),
        ("*.o_proj", Scheme(weights="source")),
        ("model.layers.1.mlp.experts.*", Scheme(weights="int4", group_size=32)),
        ("*.experts.1.*", Scheme(weights="int8-asym")),
        ("*.experts.2.gate_proj", Scheme(weights="int8-block", activations="int8")),
        ("*.experts.3.*", Scheme(weights="bf16")),
        ("*.shared_experts.up_proj", Scheme(weights="int4-asym", group_size=64)),
    )
    base = load_recipe("int8")
    made = tuple(
        Rule(match=match, **scheme.model_dump(exclude_unset=True)) for match, scheme in rules
    )
    return base.model_copy(update={"name": "mixed", "rules": made})


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_attention_heads": 3, "num_key_value_heads": 3, "v_head_dim": 32},
        {"n_shared_experts": 2, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
        {"n_group": 4, "topk_group": 2, "first_k_dense_replace": 0, "kv_lora_rank": 64},
    ],
    ids=["three-heads", "two-shared-unnormalized", "four-groups-no-dense"],
)
def test_so_it_is_with_other_shapes_and_formats_mixed_within_a_layer(
    overrides: dict[str, object], tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "source", experts=8, **overrides)
    quantize_plainly(tmp_path / "source", mixed_recipe(), tmp_path / "artifact")
    artifact = ArtifactReader(tmp_path / "artifact")
    errors = errors_by_depth(artifact.config, dict(artifact.schemes), pack_tensors(artifact))
    assert max(errors) < 0.03, [f"{e:.1e}" for e in errors]


def test_so_it_is_without_a_query_latent(base: Path) -> None:
    source = CheckpointReader(family_model("moonlight", base).directory)
    assert source.config.q_lora_rank is None
    errors = errors_by_depth(source.config, schemes_of(source), pack_tensors(source))
    assert max(errors) < 0.02, [f"{e:.1e}" for e in errors]


@pytest.mark.heavy
@pytest.mark.parametrize("threads", [2, 3])
def test_the_bits_do_not_depend_on_the_number_of_threads(
    threads: int, tiny_model: Path, base: Path
) -> None:
    before = torch.get_num_threads()
    ids = torch.arange(300) * 11 % 2000 + 5
    directory = make_engine(tiny_model, "int4-asym", base)
    try:
        scores = [
            LLMEngine.load(
                directory, EngineOptions(kernels="native", num_threads=count, kv_cache="int8")
            ).score(ids)
            for count in (1, threads)
        ]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*scores)


def test_a_weight_that_is_not_finite_ends_requests_in_an_error(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, fp8=False)
    (tmp_path / "tokenizer.json").unlink()
    source = CheckpointReader(tmp_path)
    engine = LLMEngine.from_checkpoint(tmp_path, EngineOptions(kernels="native", max_kv_tokens=64))
    tensors = pack_tensors(source)
    tensors["model.layers.1.mlp.gate.weight"][2, 3] = torch.nan
    kernels = Kernels.detect(batch_invariant=False, isa="any")
    broken = make_model(source.config, schemes_of(source), tensors, kernels)
    engine = LLMEngine(broken, engine.identity, EngineOptions(max_kv_tokens=64))
    [outputs] = run(engine, [request("a", [1, 2, 3])]).values()
    assert outputs[-1].finish_reason == "error"
    assert outputs[-1].error == "the model's output is not finite"


# --- where it is not ---


@pytest.fixture
def without_extension(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "deepseek._native", None)  # importing it then fails
    native._extension.cache_clear()
    native._say_fallback.cache_clear()
    yield
    native._extension.cache_clear()
    native._say_fallback.cache_clear()


@pytest.mark.heavy
def test_without_the_extension_torch_computes_and_says_so_once(
    tiny_model: Path,
    base: Path,
    without_extension: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    directory = make_engine(tiny_model, "int8", base)
    with caplog.at_level(logging.WARNING, logger="deepseek.engine.native"):
        engines = [LLMEngine.load(directory) for _ in range(2)]
    assert [engine.identity.kernels for engine in engines] == ["torch", "torch"]
    [said] = [r.getMessage() for r in caplog.records if r.name == "deepseek.engine.native"]
    assert said.startswith("the native kernels were not built here (")
    assert "several times slower" in said
    [outputs] = run(engines[0], [request("a", range(5, 30), max_tokens=6)]).values()
    assert len(tokens(outputs)) == 6
    with pytest.raises(DeployError, match="install again with a C"):
        LLMEngine.load(directory, EngineOptions(kernels="native"))


def test_widths_that_the_kernels_do_not_take_are_torchs(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, fp8=False, kv_lora_rank=66)
    (tmp_path / "tokenizer.json").unlink()
    engine = LLMEngine.from_checkpoint(tmp_path)
    assert engine.identity.kernels == "torch"
    assert engine.score(torch.arange(5)).isfinite().all()
    with pytest.raises(DeployError, match="do not take kv_lora_rank 66"):
        LLMEngine.from_checkpoint(tmp_path, EngineOptions(kernels="native"))


def test_an_instruction_set_that_there_is_not_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import deepseek._native as extension

    write_checkpoint(tmp_path, fp8=False)
    (tmp_path / "tokenizer.json").unlink()
    monkeypatch.setenv("INTSERVE_ISA", "avx1024")
    with pytest.raises(ValueError, match="INTSERVE_ISA is 'avx1024'; this CPU has portable"):
        extension.use_isa("")
    monkeypatch.delenv("INTSERVE_ISA")
    extension.use_isa("")
    engine = LLMEngine.from_checkpoint(tmp_path)
    assert engine.identity.kernels == f"native ({extension.isa()})"


@pytest.mark.parametrize("kernels", ["", "Native", "cuda"])
def test_unknown_kernels_are_refused(kernels: str) -> None:
    with pytest.raises(DeployError, match="kernels must be auto, native or torch, not"):
        EngineOptions(kernels=kernels)
