"""Small models with the structure of Kimi-K2 and Moonlight, as tests quantize and serve them.

Small widths, but each has what sets its original apart from DeepSeek-V3: one group of experts, no
MTP layer, a rotary base of 50000; Moonlight BF16 weights, `q_proj` in place of the query latent,
two shared experts, experts of an odd number of groups (11 x 128 in the original, 3 x 128 here), no
YaRN; Kimi-K2 FP8 tiles, a number of experts that is no power of two, YaRN whose ramp is empty
(beta_fast = beta_slow), and an end of turn that only generation_config.json names.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, Literal

from support.quantizing import SmallModel, add_text
from support.synthetic import config_dict, write_checkpoint

from deepseek.config import ModelConfig

Name = Literal["moonlight", "kimi-k2"]
NAMES: tuple[Name, ...] = ("moonlight", "kimi-k2")
#: The end of turn of the small Kimi-K2, in generation_config.json only.
END_OF_TURN = 2

_SHARED: dict[str, Any] = {
    "n_group": 1,
    "topk_group": 1,
    "rope_theta": 50000.0,
    "num_nextn_predict_layers": 0,
}
_KEYS: dict[Name, dict[str, Any]] = {
    "moonlight": {
        "fp8": False,
        "experts": 8,
        "q_lora_rank": None,
        "n_shared_experts": 2,
        "moe_intermediate_size": 384,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 2.446,
        "rms_norm_eps": 1e-5,
    },
    "kimi-k2": {
        "model_type": "kimi_k2",
        "experts": 12,
        "num_experts_per_tok": 4,
        "routed_scaling_factor": 2.827,
        "max_position_embeddings": 4096,
        "pad_token_id": 3,
        "num_return_sequences": 1,
        "output_scores": False,
        "prefix": None,
        "rope_scaling": {
            "beta_fast": 1.0,
            "beta_slow": 1.0,
            "factor": 64.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 64,
            "type": "yarn",
        },
    },
}


def family_config(name: Name) -> ModelConfig:
    """The config alone."""
    return ModelConfig.from_dict(config_dict(**(_SHARED | _KEYS[name])))


@functools.cache
def family_model(name: Name, base: Path) -> SmallModel:
    """One dense layer and one MoE layer, a tokenizer and a text; made once per process. Read it."""
    directory = base / "family" / name
    write_checkpoint(directory, **(_SHARED | _KEYS[name]))
    if name == "kimi-k2":
        generation = {"eos_token_id": [END_OF_TURN], "max_length": 131072}
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return add_text(directory, base / "family" / f"{name}.txt", num_words=3000)
