"""The quantization config of a TensorRT-LLM engine directory, with exactly the names looked up.

The loader asks for the method of a module by the module's own name, which is not always the name of
a checkpoint tensor: q_a and kv_a are one module `kv_a_proj_with_mqa`, gate and up one
`gate_up_proj`, the experts of a layer one `mlp.experts`. In the dialect `mixed` a linear that is
not listed becomes BF16 without a word: its FP8 codes are cast and its scales are never read. So
every linear that is not BF16 is listed here, the fused one under both of its names (`fused_a` is
the official script's).

Both hf_quant_config.json and quant_cfg.json are written in the dialect `mixed`: 1.2 takes the list
from the second file only, later versions from either; what both say is the same, because the second
file wins in silence. The group size at the top is what the width of a dense MLP is cut in whole
pieces of; without it FP8 tiles may be cut. In the dialect `single` the exclusions are
globs that mean the same to `fnmatch` (1.2) and to a match against any ancestor of the name (later).
Read in TensorRT-LLM's `model_config.py` (`load_modelopt_quant_config`), `modeling_utils.py`
(`apply_layerwise_quant_config`) and `modeling_deepseekv3.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from deepseek.artifact.layout import stored_layers
from deepseek.config import ModelConfig
from deepseek.inventory import linears
from deepseek.recipe import Scheme
from deepseek.trtllm.layout import TILE, Dialect

HF_QUANT_CONFIG_FILE, QUANT_CFG_FILE = "hf_quant_config.json", "quant_cfg.json"
#: KV formats that the loader has for MLA on Hopper: the KV format -> `kv_cache_quant_algo`.
KV_ALGOS: dict[str, str | None] = {"bf16": None, "fp8": "FP8"}
#: Weight format -> the name of the method, for routed experts and for every other linear.
EXPERT_ALGOS = {"int4": "W4A8_AWQ", "int8": "W8A16", "fp8-block": "FP8_BLOCK_SCALES"}
LINEAR_ALGOS = {"fp8-block": "FP8_BLOCK_SCALES"}

#: Role of a checkpoint's linear -> the names of the module that holds it.
_MODULES = {
    "q_a_proj": ("fused_a", "kv_a_proj_with_mqa"),
    "kv_a_proj_with_mqa": ("fused_a", "kv_a_proj_with_mqa"),
    "gate_proj": ("gate_up_proj",),
    "up_proj": ("gate_up_proj",),
}


def quant_config_files(
    config: ModelConfig,
    stored: Mapping[str, Scheme],
    dialect: Dialect,
    kv_cache: Literal["bf16", "fp8"],
    *,
    mtp: bool = False,
) -> dict[str, dict[str, Any]]:
    """The content of the config files by name; `stored` is what `layout.stored_schemes` returned.
    A release has none, because its config.json says how it is stored."""
    if dialect == "released":
        return {}
    kv_algo = KV_ALGOS[kv_cache]
    if dialect == "single":
        quantization = {
            "quant_algo": _one_algo(stored),
            "kv_cache_quant_algo": kv_algo,
            "group_size": TILE,
            "exclude_modules": _excluded(config),
        }
        return {HF_QUANT_CONFIG_FILE: _produced(quantization)}
    mixed = {
        "quant_algo": "MIXED_PRECISION",
        "kv_cache_quant_algo": kv_algo,
        # The MLPs are divided by whole groups of this size; without it FP8 tiles would be cut.
        "group_size": TILE,
        "quantized_layers": quantized_layers(config, stored, mtp=mtp),
    }
    return {HF_QUANT_CONFIG_FILE: _produced(mixed), QUANT_CFG_FILE: mixed}


def quantized_layers(
    config: ModelConfig, stored: Mapping[str, Scheme], *, mtp: bool = False
) -> dict[str, dict[str, Any]]:
    """Method of every module that is not BF16, by the module's name."""
    listed: dict[str, dict[str, Any]] = {}
    for layer in stored_layers(config, mtp=mtp):
        if layer == "globals":
            continue
        for spec in linears(config, layer):
            weights = stored[spec.module].weights
            if weights == "bf16":
                continue
            entry: dict[str, Any] = {"quant_algo": LINEAR_ALGOS.get(weights)}
            if spec.expert is not None:
                entry = {"quant_algo": EXPERT_ALGOS[weights]}
                names = [f"model.layers.{layer}.mlp.experts"]
            else:
                assert entry["quant_algo"], f"{spec.module}: {weights} is for experts only"
                names = [f"{spec.parent}.{name}" for name in _MODULES.get(spec.role, (spec.role,))]
            if weights != "int8":
                entry["group_size"] = TILE
            listed |= dict.fromkeys(names, entry)
    return listed


def _one_algo(stored: Mapping[str, Scheme]) -> str:
    """The method of all routed experts in the dialect `single`."""
    (weights,) = {scheme.weights for scheme in stored.values() if scheme.weights != "bf16"}
    return EXPERT_ALGOS[weights]


def _excluded(config: ModelConfig) -> list[str]:
    """Globs of all modules but the routed experts. `model.layers.1.mlp*` cannot match layer 10,
    whose name goes on with a digit before the dot."""
    dense = [n for n in range(config.num_hidden_layers) if not config.is_moe(n)]
    return [
        "lm_head",
        "model.embed_tokens",
        "*self_attn*",
        "*shared_experts*",
        *(f"model.layers.{layer}.mlp*" for layer in dense),
    ]


def _produced(quantization: dict[str, Any]) -> dict[str, Any]:
    return {"producer": {"name": "intserve"}, "quantization": quantization}
