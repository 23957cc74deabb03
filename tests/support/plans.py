"""Recipes and plans that several of the cluster's tests ask for."""

from __future__ import annotations

from cluster.hardware import parse_hardware
from cluster.plan import Plan, make_plan
from deepseek.models import DEEPSEEK_V3
from deepseek.recipe import Recipe, load_recipe, parse_recipe

GATE = {"max_perplexity_ratio": 1.1, "max_mean_kl": 0.1, "min_top1": 0.5}


def recipe_of(*rules: dict[str, object], kv_cache: str = "bf16") -> Recipe:
    """A recipe made of rules; without any, everything as the source has it."""
    raw = {
        "name": "test",
        "description": "made by a test",
        "rules": list(rules) or [{"match": "*", "weights": "source"}],
        "kv_cache": kv_cache,
        "gate": GATE,
    }
    return parse_recipe(raw, where="test")


def plan_v3(recipe: Recipe | str, hardware: str, **options: object) -> Plan:
    """DeepSeek-V3 on that hardware."""
    loaded = load_recipe(recipe) if isinstance(recipe, str) else recipe
    return make_plan(DEEPSEEK_V3, loaded, parse_hardware(hardware), **options)
