"""The advice of every refusal is true: followed, it leads to something that loads."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest
import yaml
from support.plans import recipe_of

from cluster.deployability import check, served_schemes
from cluster.hardware import GpuGeneration
from cluster.matrix import TARGETS, Refusal
from deepseek.config import ModelConfig
from deepseek.recipe import Recipe, builtin_recipes, load_recipe

GENERATIONS: tuple[GpuGeneration, ...] = ("sm80", "sm90", "cpu")


@pytest.fixture(scope="module")
def config(tiny_model: Path) -> ModelConfig:
    return ModelConfig.from_directory(tiny_model)


def refused(config: ModelConfig, recipe: Recipe, target: str, gpu: GpuGeneration) -> list[Refusal]:
    schemes = served_schemes(config, recipe.resolve(config))
    return check(schemes, recipe.kv_cache, target, gpu)


def follow(
    config: ModelConfig, recipe: Recipe, refusal: Refusal, gpu: GpuGeneration
) -> dict[str, bool]:
    """What each way that the advice names leads to: whether it loads."""
    change, target = refusal.change, refusal.target
    ways: dict[str, bool] = {}
    rules = [yaml.safe_load(rule) for rule in re.findall(r"\{match:[^}]*\}", change)]
    kv = re.search(r"kv_cache to (\w+)", change)
    if rules or kv:
        kept = [rule.model_dump(exclude_defaults=True) for rule in recipe.rules]
        other = recipe_of(*kept, *rules, kv_cache=kv[1] if kv else recipe.kv_cache)
        ways["this recipe, changed"] = not refused(config, other, target, gpu)
    for names in re.findall(r"the recipe ([\w, -]+?)(?:, or add|, or --target|$)", change):
        for name in re.split(r", | or ", names):
            ways[f"recipe {name}"] = not refused(config, load_recipe(name), target, gpu)
    for names in re.findall(r"--target ((?:\w+(?:, | or (?!Hopper|--))?)+)", change):
        on = "cpu" if "--hardware cpu" in change and "embedded" in names else gpu
        for name in filter(None, re.split(r", | or ", names)):
            ways[f"target {name}"] = not refused(config, recipe, name, on)
    if "Hopper GPUs" in change:
        ways["Hopper GPUs"] = not refused(config, recipe, target, "sm90")
    if "--hardware cpu" in change and "--target embedded" not in change:
        ways["the CPU"] = not refused(config, recipe, target, "cpu")
    return ways


@pytest.mark.parametrize(("target", "gpu"), list(product(TARGETS, GENERATIONS)))
def test_every_way_that_a_refusal_names_loads(
    target: str, gpu: GpuGeneration, config: ModelConfig
) -> None:
    for name in builtin_recipes():
        recipe = load_recipe(name)
        for refusal in refused(config, recipe, target, gpu):
            ways = follow(config, recipe, refusal, gpu)
            assert ways, refusal.sentence()
            assert all(ways.values()), (name, ways, refusal.sentence())


def test_a_kv_format_that_is_refused_too_is_changed_with_the_rules(config: ModelConfig) -> None:
    """Following either of two refusals alone would lead to the other."""
    rules = [rule.model_dump(exclude_defaults=True) for rule in load_recipe("int4-asym").rules]
    recipe = recipe_of(*rules, kv_cache="int8")
    found = refused(config, recipe, "trtllm", "sm90")
    assert len(found) == 4
    for refusal in found:
        assert follow(config, recipe, refusal, "sm90") == {"this recipe, changed": True}


def test_advice_that_is_wrong_is_noticed(config: ModelConfig) -> None:
    recipe = load_recipe("int4-asym")
    words = 'Add to the recipe {match: "*.mlp.experts.*", weights: int4, group_size: 64}'
    wrong = Refusal("trtllm", "routed experts", "a reason", words, "read")
    assert follow(config, recipe, wrong, "sm90") == {"this recipe, changed": False}
    moved = Refusal("trtllm", "routed experts", "a reason", "Use --target sglang or vllm", "read")
    assert follow(config, recipe, moved, "sm90") == {"target sglang": False, "target vllm": True}
