"""Recipes, plans and the command that several of the cluster's tests ask for."""

from __future__ import annotations

from typer.testing import CliRunner

from cluster.__main__ import app
from cluster.hardware import parse_hardware
from cluster.plan import Plan, make_plan
from deepseek.errors import IntServeError
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


def command(*words: str) -> tuple[int, str]:
    """Exit code and stdout of `python -m cluster plan ...`, in this process."""
    done = CliRunner().invoke(app, ["plan", *words])
    if isinstance(done.exception, IntServeError):
        raise done.exception
    return done.exit_code, done.stdout
