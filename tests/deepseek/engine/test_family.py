"""Kimi-K2 and Moonlight in the engine: transformers' logits, its rotary angles, and where texts
end."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.engine_reference import reference_logits
from support.engines import request, run, tokens
from support.family import NAMES, Name, family_model
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RotaryEmbedding

from deepseek.config_values import YarnScaling
from deepseek.engine.engine import LLMEngine
from deepseek.engine.options import EngineOptions
from deepseek.engine.rope import Rope, inverse_frequencies
from deepseek.models import KIMI_K2, MODELS
from deepseek.source.checkpoint import CheckpointReader
from quant_jobs.calibration.forward import to_hf_config
from quant_jobs.targets.embedded import pack_engine


@pytest.fixture
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_the_unquantized_model_are_those_of_transformers(name: Name, base: Path) -> None:
    source = family_model(name, base).directory
    ids = torch.randint(0, 96, (160,), generator=torch.Generator().manual_seed(1))
    options = EngineOptions(
        kv_cache="fp32",
        kernels="torch",
        max_batched_tokens=50,
        page_tokens=8,
        max_model_len=256,
    )
    engine = LLMEngine.from_checkpoint(source, options)
    got, want = engine.score(ids), reference_logits(source, ids)
    error = ((got - want).norm() / want.norm()).item()
    assert error < 1e-5, f"{name}: {error:.2e}"


@pytest.mark.parametrize("name", MODELS)
def test_rotary_angles_of_every_built_in_model_are_those_of_transformers(name: str) -> None:
    """Kimi-K2's ramp is a step, because its beta_fast equals its beta_slow."""
    config = MODELS[name]
    positions = torch.tensor([0, 1, 17, 4095, config.max_position_embeddings - 1])
    theirs = DeepseekV3RotaryEmbedding(to_hf_config(config))
    cos, sin = theirs(torch.zeros(1), positions[None])
    ours = Rope(config).angles(positions)
    half = config.qk_rope_head_dim // 2
    torch.testing.assert_close(ours[0], cos[0, :, :half], rtol=0, atol=1e-6)
    torch.testing.assert_close(ours[1], sin[0, :, :half], rtol=0, atol=1e-6)


def test_a_ramp_of_no_width_divides_by_no_zero_and_equals_transformers() -> None:
    """Both ends of the ramp at dimension 0, exactly."""
    assert KIMI_K2.yarn is not None
    rotations = KIMI_K2.yarn.original_max_position_embeddings / (2 * math.pi)
    yarn = YarnScaling(
        factor=64.0,
        original_max_position_embeddings=KIMI_K2.yarn.original_max_position_embeddings,
        beta_fast=rotations,
        beta_slow=rotations,
    )
    config = replace(KIMI_K2, yarn=yarn)
    found = inverse_frequencies(config)
    assert found.isfinite().all()
    assert torch.equal(found, DeepseekV3RotaryEmbedding(to_hf_config(config)).inv_freq)


def test_the_end_of_turn_of_generation_config_ends_a_text(base: Path, tmp_path: Path) -> None:
    """As Kimi-K2 has it: config.json names another end token. Whatever the model says third plays
    the end of turn."""
    source = shutil.copytree(family_model("kimi-k2", base).directory, tmp_path / "source")
    options = EngineOptions(kv_cache="fp32", max_model_len=64, max_kv_tokens=64)
    engine = LLMEngine.from_checkpoint(source, options)
    [whole] = run(engine, [request("a", range(30, 50), max_tokens=12)]).values()
    end = next(i for i in range(3, 12) if tokens(whole)[i] not in tokens(whole)[:i])
    generation = {"eos_token_id": [tokens(whole)[end]]}
    (source / "generation_config.json").write_text(json.dumps(generation))

    packed = tmp_path / "engine"
    pack_engine(CheckpointReader(source), packed)
    for engine in (LLMEngine.from_checkpoint(source, options), LLMEngine.load(packed, options)):
        [ended] = run(
            engine, [request("b", range(30, 50), max_tokens=12, ignore_eos=False)]
        ).values()
        assert tokens(ended) == tokens(whole)[: end + 1]
        assert ended[-1].finish_reason == "stop"
