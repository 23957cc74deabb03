"""Directories as TensorRT-LLM loads them, made by hand from an artifact's tensors.

Independent of `build --target trtllm` and of `deepseek/trtllm/layout.py`: names, shapes and files
are written out here, so that a fault of the builder's is not a fault of the tests.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from support.synthetic import config_dict, quantize_plainly, write_checkpoint
from torch import Tensor

from deepseek.artifact.reader import ArtifactReader
from deepseek.config import ModelConfig
from deepseek.formats import dequantize_fp8_block
from deepseek.recipe import load_recipe

#: V3's head dims, and everything else small; every rank of tp 8 holds whole tiles and groups.
SHAPE: dict[str, Any] = {
    "layers": 2,
    "experts": 8,
    "hidden": 256,
    "moe_intermediate_size": 1024,
    "intermediate_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_group": 4,
    "topk_group": 2,
    "q_lora_rank": 256,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 300,
    "num_nextn_predict_layers": 0,
}

Dialect = Literal["mixed", "single"]
EXPERT_ROLES = ("gate_proj", "up_proj", "down_proj")


def make_source(directory: Path, **changes: Any) -> ModelConfig:
    """An FP8 checkpoint of random weights in the release's layout."""
    return write_checkpoint(directory, **{**SHAPE, **changes})


def make_artifact(source: Path, recipe: str, directory: Path) -> ArtifactReader:
    """The source rounded to a recipe, without calibration."""
    quantize_plainly(source, load_recipe(recipe), directory)
    return ArtifactReader(directory)


def input_scale(layer: int, role: str) -> float:
    """The one input scale of a layer's gate and up, or down projections."""
    return (0.011 if role == "down_proj" else 0.017) * (layer + 1)


def stored_tensors(
    artifact: ArtifactReader, tensors: dict[str, Tensor], dialect: Dialect
) -> dict[str, Tensor]:
    """The tensors of one artifact file as TensorRT-LLM's loader takes them."""
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        match suffix:
            case "weight_packed":
                int4 = artifact.schemes[module].weights == "int4"
                codes = tensor.contiguous().view(torch.uint8) ^ (0x88 if int4 else 0x80)
                stored[f"{module}.weight"] = codes.view(torch.int8)
                if int4:
                    layer, role = int(module.split(".")[2]), module.rpartition(".")[2]
                    scale = torch.tensor([input_scale(layer, role)])
                    stored[f"{module}.input_scale"] = scale
            case "weight_scale" if tensor.dtype == torch.bfloat16:
                stored[f"{module}.weight_scale_inv"] = tensor
            case "weight_scale" if tensor.shape[-1] == 1 and f"{module}.weight_packed" in tensors:
                stored[name] = tensor.bfloat16().reshape(-1)
            case "weight_scale":
                if dialect == "single":
                    plain = dequantize_fp8_block(tensors[f"{module}.weight"], tensor)
                    stored[f"{module}.weight"] = plain.bfloat16()
                else:
                    stored[f"{module}.weight_scale_inv"] = tensor
            case "weight_shape" | "input_scale":
                pass
            case _:
                stored.setdefault(name, tensor)
    return stored


def quant_files(
    config: ModelConfig, expert_algo: str, dialect: Dialect, kv_algo: str | None = None
) -> dict[str, dict[str, Any]]:
    """hf_quant_config.json and, for mixed, quant_cfg.json."""
    dense = range(config.first_k_dense_replace)
    quantization: dict[str, Any] = {"kv_cache_quant_algo": kv_algo}
    if dialect == "single":
        exclude = ["lm_head", "model.embed_tokens", "*self_attn*", "*shared_experts*"]
        exclude += [f"model.layers.{layer}.mlp*" for layer in dense]
        group = {"group_size": 128} if expert_algo == "W4A8_AWQ" else {}
        quantization |= {"quant_algo": expert_algo, "exclude_modules": exclude} | group
        return {"hf_quant_config.json": {"quantization": quantization}}
    layers: dict[str, dict[str, Any]] = {}
    fp8 = {"quant_algo": "FP8_BLOCK_SCALES"}
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}"
        for part in ("fused_a", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj", "o_proj"):
            layers[f"{name}.self_attn.{part}"] = fp8
        mlp = f"{name}.mlp" if layer in dense else f"{name}.mlp.shared_experts"
        for part in ("gate_up_proj", "down_proj"):
            layers[f"{mlp}.{part}"] = fp8
        if layer not in dense:
            layers[f"{name}.mlp.experts"] = {"quant_algo": expert_algo}
    mixed = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": kv_algo}
    return {
        "hf_quant_config.json": {"quantization": mixed | {"quantized_layers": layers}},
        "quant_cfg.json": mixed | {"quantized_layers": layers},
    }


def write_directory(
    artifact: ArtifactReader,
    directory: Path,
    dialect: Dialect = "mixed",
    *,
    kv_algo: str | None = None,
) -> None:
    """Config, quantization and tensor files; no engine.json."""
    directory.mkdir(parents=True)
    config = artifact.config
    raw = json.loads(artifact.documents["config.json"])
    raw.pop("quantization_config", None)
    raw["num_nextn_predict_layers"] = 0
    (directory / "config.json").write_text(json.dumps(raw, indent=2))
    formats = {
        scheme.weights
        for module, scheme in artifact.schemes.items()
        if ".mlp.experts." in module and int(module.split(".")[2]) < config.num_hidden_layers
    }
    algo = "W4A8_AWQ" if formats == {"int4"} else "W8A16"
    for name, content in quant_files(config, algo, dialect, kv_algo).items():
        (directory / name).write_text(json.dumps(content, indent=2))
    weight_map: dict[str, str] = {}
    for layer in [*range(config.num_hidden_layers), "globals"]:
        tensors = artifact.read_globals() if layer == "globals" else artifact.read_layer(int(layer))
        file = (
            "model-globals.safetensors"
            if layer == "globals"
            else f"model-layer-{layer:05d}.safetensors"
        )
        stored = stored_tensors(artifact, tensors, dialect)
        save_file({name: tensor.contiguous() for name, tensor in stored.items()}, directory / file)
        weight_map |= dict.fromkeys(stored, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


__all__ = ["SHAPE", "config_dict", "make_artifact", "make_source", "write_directory"]
