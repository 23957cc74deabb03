"""The `estimate` command: time and memory of a quantize job on nodes of GPUs, computed by `cost/`.

Measures nothing and starts nothing. Called by `__main__.py`.
"""

from __future__ import annotations

from deepseek.models import load_model_config
from deepseek.recipe import load_recipe
from quant_jobs.cost.estimate import Estimate, make_estimate


def run_estimate(
    model: str, recipe: str, nodes: int, *, tokens: int, block_tokens: int, storage_gb: float
) -> Estimate:
    """Estimate a job on `nodes` nodes. `model` is a built-in model's name or a checkpoint
    directory; `tokens` is the number of calibration tokens, `storage_gb` the storage bandwidth of
    one node in GB/s.

    Raises:
        ConfigError: the directory has no readable config.json.
        RecipeError: the recipe cannot be read, or a rule does not suit the model.
        DeployError: a number is out of range.
    """
    config = load_model_config(model)
    rules = load_recipe(recipe)
    rules.resolve(config)  # its error names the rule that does not suit the model
    return make_estimate(
        config, rules, nodes, tokens=tokens, block_tokens=block_tokens, storage=storage_gb * 1e9
    )
