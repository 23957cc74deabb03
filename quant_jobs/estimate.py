"""The `estimate` command: time and memory of a quantize job on nodes of GPUs, computed by `cost/`.

Measures nothing and starts nothing. Called by `__main__.py`.
"""

from __future__ import annotations

from deepseek.config import DEEPSEEK_V3, ModelConfig
from deepseek.recipe import load_recipe
from quant_jobs.cost.estimate import Estimate, make_estimate


def run_estimate(
    model: str, recipe: str, nodes: int, *, tokens: int, block_tokens: int, storage_gb: float
) -> Estimate:
    """Estimate a job on `nodes` nodes. `model` is `deepseek-v3` or a checkpoint directory; `tokens`
    is the number of calibration tokens, `storage_gb` the storage bandwidth of one node in GB/s.

    Raises:
        ConfigError: the directory has no readable config.json.
        RecipeError: the recipe cannot be read, or a rule does not suit the model.
        DeployError: a number is out of range.
    """
    config = DEEPSEEK_V3 if model == "deepseek-v3" else ModelConfig.from_directory(model)
    rules = load_recipe(recipe)
    rules.resolve(config)  # its error names the rule that does not suit the model
    rules.check_rules(config)
    return make_estimate(
        config, rules, nodes, tokens=tokens, block_tokens=block_tokens, storage=storage_gb * 1e9
    )
