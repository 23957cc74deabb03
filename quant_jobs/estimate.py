"""How long quantizing takes on nodes of GPUs, and how much memory: on paper (`cost/`)."""

from __future__ import annotations

from deepseek.config import DEEPSEEK_V3, ModelConfig
from deepseek.recipe import load_recipe
from quant_jobs.cost.estimate import Estimate, make_estimate


def run_estimate(
    model: str, recipe: str, nodes: int, *, tokens: int, block_tokens: int, storage_gb: float
) -> Estimate:
    """`model` is `deepseek-v3` or a checkpoint directory; `storage_gb` is GB/s of one node.

    Raises:
        ConfigError: the directory holds no config.json that can be read.
        RecipeError: the recipe cannot be read, or a rule does not suit the model.
        DeployError: a number is out of range.
    """
    config = DEEPSEEK_V3 if model == "deepseek-v3" else ModelConfig.from_directory(model)
    rules = load_recipe(recipe)
    rules.resolve(config)  # says which rule does not suit the model
    return make_estimate(
        config, rules, nodes, tokens=tokens, block_tokens=block_tokens, storage=storage_gb * 1e9
    )
