"""A whole model in each target's arithmetic: where it rounds, against the modules of transformers,
and whether a token's result still does not depend on the batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.engines import make_engine
from torch import Tensor
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3MLP,
    DeepseekV3RMSNorm,
    apply_rotary_pos_emb_interleave,
)

from deepseek.engine.arithmetic import ARITHMETICS, EMBEDDED
from deepseek.engine.attention import rms_norm
from deepseek.engine.detokenizer import load_tokenizer
from deepseek.engine.engine import EngineOptions, LLMEngine
from deepseek.engine.linear import Kernels, RowRule
from deepseek.engine.model import Model
from deepseek.engine.moe import silu_gate
from deepseek.engine.options import EngineIdentity
from deepseek.engine.packed import load_packed
from deepseek.engine.packing import to_torch_layout
from deepseek.engine.rope import rotate
from deepseek.errors import DeployError

TARGETS = [name for name in ARITHMETICS if name != EMBEDDED.name]


def kernels_of(target: str) -> Kernels:
    arithmetic = ARITHMETICS[target]
    return Kernels(RowRule(4), has_vnni=False, is_batch_invariant=True, arithmetic=arithmetic)


def open_as(target: str, directory: Path, kv_cache: str = "bf16", **options) -> LLMEngine:
    """The embedded engine's own directory, executed in the arithmetic of a target."""
    packed = load_packed(directory)
    kernels = Kernels.detect(batch_invariant=True, arithmetic=ARITHMETICS[target])
    schemes = packed.manifest.schemes
    tensors = to_torch_layout(packed.config, schemes, packed.tensors)
    model = Model(packed.config, schemes, tensors, kernels)
    identity = EngineIdentity(
        recipe=packed.manifest.recipe,
        artifact_digest=packed.manifest.artifact_digest,
        engine_digest=packed.manifest.digest,
        kv_cache=kv_cache,
        page_tokens=16,
        arithmetic=target,
    )
    return LLMEngine(model, identity, EngineOptions(**options))


def some_ids(tiny_model: Path, count: int) -> Tensor:
    text = (tiny_model / "heldout.txt").read_text(encoding="utf-8")
    return torch.tensor(load_tokenizer(tiny_model).encode(text[: 8 * count]).ids[:count])


def random_bf16(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator)).bfloat16()


def bf16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def test_every_target_has_an_arithmetic_under_its_own_name() -> None:
    assert list(ARITHMETICS) == ["embedded", "trtllm", "vllm", "sglang", "transformers"]
    for name, arithmetic in ARITHMETICS.items():
        assert arithmetic.name == name
        assert (arithmetic == EMBEDDED) == (name == "embedded")
    assert EMBEDDED.activations == "float32"


def test_a_norm_rounds_as_transformers_does() -> None:
    x, weight = random_bf16(9, 256, scale=3.0), random_bf16(256, seed=1)
    theirs = DeepseekV3RMSNorm(256, eps=1e-6).bfloat16()
    theirs.weight.data = weight
    with torch.no_grad():
        want = theirs(x).float()
    got = rms_norm(x.float(), weight.float(), 1e-6, kernels_of("transformers"))
    assert (got != want).float().mean() < 1e-3  # an ulp of the FP32 root
    once = rms_norm(x.float(), weight.float(), 1e-6, kernels_of("trtllm"))
    assert torch.equal(once, bf16(once))
    assert (once != want).float().mean() > 0.05
    exact = rms_norm(x.float(), weight.float(), 1e-6, kernels_of("embedded"))
    assert torch.equal(exact, torch.nn.functional.rms_norm(x.float(), (256,), weight.float(), 1e-6))


def test_a_rotation_rounds_as_transformers_does() -> None:
    x = random_bf16(1, 1, 7, 64)
    angle = torch.rand(7, 32, generator=torch.Generator().manual_seed(2)) * 6
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    doubled = torch.cat((cos, cos), -1)[None], torch.cat((sin, sin), -1)[None]
    want, _ = apply_rotary_pos_emb_interleave(x, x, *doubled)
    kernels = kernels_of("transformers")
    cos, sin = kernels.round_angle(angle.cos()), kernels.round_angle(angle.sin())
    got = kernels.round(rotate(x[0, 0].float(), cos, sin, kernels.round_angle))
    assert torch.equal(got, want[0, 0].float())
    kernels = kernels_of("trtllm")
    other = kernels.round(rotate(x[0, 0].float(), angle.cos(), angle.sin(), kernels.round_angle))
    assert not torch.equal(other, got)


def test_swiglu_rounds_as_transformers_does() -> None:
    gate, up = random_bf16(9, 64), random_bf16(9, 64, seed=1)
    config = DeepseekV3Config(hidden_size=64, intermediate_size=64)
    act: Callable[[Tensor], Tensor] = DeepseekV3MLP(config).act_fn
    want = (act(gate) * up).float()
    got = silu_gate(torch.cat((gate, up), -1).float(), kernels_of("transformers"))
    assert (got != want).float().mean() < 1e-3
    once = silu_gate(torch.cat((gate, up), -1).float(), kernels_of("trtllm"))
    assert (once != want).float().mean() > 0.05


@pytest.mark.heavy
@pytest.mark.parametrize("target", TARGETS)
def test_logits_have_the_same_bits_in_chunks_of_any_size(
    target: str, tiny_model: Path, base: Path
) -> None:
    directory = make_engine(tiny_model, "int4", base)
    kv_cache = "bf16" if target == "transformers" else "fp8"
    ids = some_ids(tiny_model, 270)  # two attention blocks
    logits = open_as(target, directory, kv_cache, max_batched_tokens=512).score(ids)
    assert torch.equal(logits, bf16(logits)), "logits leave the head's kernel in BF16"
    for size, count in ((1, 12), (23, len(ids))):
        chunked = open_as(
            target, directory, kv_cache, max_batched_tokens=size, max_batch_size=1
        ).score(ids[:count])
        assert torch.equal(chunked, logits[:count]), f"{target=} {size=}"


@pytest.mark.heavy
@pytest.mark.parametrize("target", TARGETS)
def test_a_target_differs_from_the_engine_by_its_roundings_only(
    target: str, tiny_model: Path, base: Path
) -> None:
    """Median KL in nats; measured 6e-5 to 2e-3, against 5e-3 of the recipe itself."""
    ids = some_ids(tiny_model, 256)
    for recipe in ("w4a8", "int8"):
        directory = make_engine(tiny_model, recipe, base)
        ours = open_as("embedded", directory).score(ids).double().log_softmax(-1)
        theirs = open_as(target, directory).score(ids).double().log_softmax(-1)
        kl = (ours.exp() * (ours - theirs)).sum(-1)
        assert 1e-6 < kl.median() < 5e-3, f"{target=} {recipe=} {kl.median()=:.1e}"


@pytest.mark.heavy
def test_memory_is_that_of_the_embedded_engine(tiny_model: Path, base: Path) -> None:
    for recipe in ("w4a8", "int8", "int4-asym"):
        directory = make_engine(tiny_model, recipe, base)
        ours = open_as("embedded", directory).allocated_bytes()
        for target in TARGETS:
            assert open_as(target, directory).allocated_bytes() == ours


@pytest.mark.heavy
def test_a_kv_format_has_the_layout_of_the_target(tiny_model: Path, base: Path) -> None:
    directory = make_engine(tiny_model, "int8", base)
    layouts = {
        target: open_as(target, directory, "fp8")._runner.cache.layout
        for target in ("trtllm", "vllm", "sglang", "embedded")
    }
    assert layouts == {
        "trtllm": "fp8-tensor",
        "vllm": "fp8-tensor",
        "sglang": "fp8-tensor",
        "embedded": "fp8-tiles",
    }
    with pytest.raises(DeployError, match="transformers has no fp8 KV cache; use bf16"):
        open_as("transformers", directory, "fp8")
