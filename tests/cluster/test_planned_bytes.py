"""Planned bytes against what a real engine allocates on the CPU."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from support.engines import make_engine
from support.family import NAMES, Name, family_model
from support.plans import recipe_of
from support.synthetic import V3_2, write_checkpoint

from cluster.hardware import parse_hardware
from cluster.plan import Plan, make_plan
from deepseek.config import ModelConfig
from deepseek.engine.engine import LLMEngine
from deepseek.engine.options import EngineOptions
from deepseek.recipe import load_recipe

KV_TOKENS = 2048


def planned_bytes(plan: Plan) -> dict[str, int]:
    """By the names of `LLMEngine.allocated_bytes`, without the groups that hold nothing."""
    found = Counter(
        {name: group.values + group.scales for name, group in plan.footprint.groups.items()}
    )
    found["kv_cache"] = plan.footprint.kv_bytes(KV_TOKENS)
    return {name: size for name, size in found.items() if size}


@pytest.mark.heavy
@pytest.mark.parametrize(
    "name",
    ["int8", "int8-weight-only", "int8-experts", "int8-asym", "int8-block"]
    + ["int4", "int4-all", "int4-asym", "w4a8"],
)
def test_a_quantized_engine_allocates_what_was_planned(
    name: str, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert_planned(tiny_model, name, tmp_path_factory.getbasetemp())


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["int8", "int4", "int4-asym"])
@pytest.mark.parametrize("model", NAMES)
def test_so_does_one_of_kimi_or_moonlight(
    model: Name, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = tmp_path_factory.getbasetemp()
    assert_planned(family_model(model, base).directory, name, base)


def assert_planned(source: Path, recipe: str, base: Path) -> None:
    config = ModelConfig.from_directory(source)
    plan = make_plan(config, load_recipe(recipe), parse_hardware("cpu"))
    num_tokens = min(KV_TOKENS, config.max_position_embeddings)
    engine = LLMEngine.load(
        make_engine(source, recipe, base),
        EngineOptions(max_kv_tokens=KV_TOKENS, max_model_len=num_tokens),
    )
    allocated = engine.allocated_bytes()
    planned = planned_bytes(plan)
    assert planned.keys() == allocated.keys()
    for group, size in allocated.items():
        assert planned[group] == pytest.approx(size, rel=0.02), group


@pytest.mark.parametrize("kv_cache", ["bf16", "int8"])
def test_an_unquantized_engine_allocates_what_was_planned(kv_cache: str, tiny_model: Path) -> None:
    config = ModelConfig.from_directory(tiny_model)
    plan = make_plan(config, recipe_of(kv_cache=kv_cache), parse_hardware("cpu"))
    engine = LLMEngine.from_checkpoint(
        tiny_model,
        EngineOptions(kv_cache=kv_cache, max_kv_tokens=KV_TOKENS, max_model_len=KV_TOKENS),
    )
    allocated = engine.allocated_bytes()
    planned = planned_bytes(plan)
    assert sum(planned.values()) == pytest.approx(sum(allocated.values()), rel=0.02)
    assert planned["kv_cache"] == pytest.approx(allocated["kv_cache"], rel=0.02)


def test_an_engine_of_deepseek_v3_2_allocates_what_was_planned_without_its_indexer(
    tmp_path: Path,
) -> None:
    config = write_checkpoint(tmp_path, **V3_2)
    (tmp_path / "tokenizer.json").unlink()
    plan = make_plan(config, recipe_of(), parse_hardware("cpu"))
    engine = LLMEngine.from_checkpoint(tmp_path, EngineOptions(max_kv_tokens=KV_TOKENS))
    assert planned_bytes(plan) == engine.allocated_bytes()
    assert "indexer" not in engine.allocated_bytes()
