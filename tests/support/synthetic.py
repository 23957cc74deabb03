"""Small checkpoints with random weights, in the release's layout, made in milliseconds.

For tests that move tensors and do not judge answers; where answers matter, use the trained model
(`tiny_model` in conftest.py). The files are written with the reference library's `save_file`, so
that our reader is not tested with our own writer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from deepseek.artifact.input_maxima import InputMaxima
from deepseek.artifact.manifest import Manifest
from deepseek.artifact.tensors import store_tensor
from deepseek.artifact.writer import ArtifactWriter
from deepseek.config import ModelConfig
from deepseek.formats import quantize_fp8_block
from deepseek.inventory import tensors
from deepseek.recipe import Recipe
from deepseek.source.checkpoint import CheckpointReader, content_digest, scale_name

#: Keys of config.json that make a model DeepSeek-V3.2.
V3_2: dict[str, Any] = {
    "model_type": "deepseek_v32",
    "architectures": ["DeepseekV32ForCausalLM"],
    "index_n_heads": 2,
    "index_head_dim": 64,
    "index_topk": 64,
}
#: Static scale of FP8 inputs where nothing is calibrated.
INPUT_SCALE = torch.tensor([48 / 448])
TINY_TOKENIZER = {"tokenizer.json": "{}\n", "tokenizer_config.json": "{}\n"}


def config_dict(
    *, layers: int = 2, experts: int = 4, hidden: int = 256, fp8: bool = True, **overrides: Any
) -> dict[str, Any]:
    """A config.json like the release's: one dense layer, then MoE, one MTP layer behind."""
    raw: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_act": "silu",
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "vocab_size": 96,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "moe_intermediate_size": 128,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "n_shared_experts": 1,
        "n_routed_experts": experts,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
        "q_lora_rank": 128,
        "kv_lora_rank": 128,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "rope_scaling": None,
        "num_nextn_predict_layers": 1,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    if fp8:
        raw["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        }
    return raw | overrides


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every tensor of the source: norms near 1, weights near 1/sqrt(K), FP8 where configured."""
    generator = torch.Generator().manual_seed(seed)
    stored: dict[str, torch.Tensor] = {}
    for spec in tensors(config):
        values = torch.randn(spec.shape, generator=generator)
        if spec.kind == "float32":  # the router's bias, and norm and bias of the indexer
            stored[spec.name] = 0.1 * values + float(spec.name.endswith(".weight"))
        elif len(spec.shape) == 1:
            stored[spec.name] = (1 + 0.1 * values).bfloat16()
        else:
            values *= spec.shape[1] ** -0.5
            if spec.kind == "linear" and config.weight_block_size:
                stored[spec.name], stored[scale_name(spec.name)] = quantize_fp8_block(values)
            else:
                stored[spec.name] = values.bfloat16()
    return stored


def write_shards(
    directory: Path, stored: dict[str, torch.Tensor], *, by_layer: bool = True
) -> None:
    """Save as shards with an index (one per layer, one for the rest), or as a single file."""
    if not by_layer:
        save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
        return
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in stored.items():
        part = name.split(".")[2] if name.startswith("model.layers.") else "globals"
        parts.setdefault(part, {})[name] = tensor
    weight_map: dict[str, str] = {}
    for number, part in enumerate(sorted(parts), start=1):
        shard = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        save_file(parts[part], directory / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(parts[part], shard)
    total = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def write_checkpoint(
    directory: Path,
    *,
    layers: int = 2,
    experts: int = 4,
    hidden: int = 256,
    fp8: bool = True,
    seed: int = 0,
    by_layer: bool = True,
    **overrides: Any,
) -> ModelConfig:
    """A source checkpoint with random weights; `overrides` are keys of config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    raw = config_dict(layers=layers, experts=experts, hidden=hidden, fp8=fp8, **overrides)
    (directory / "config.json").write_text(json.dumps(raw, indent=2))
    for name, text in TINY_TOKENIZER.items():
        (directory / name).write_text(text)
    config = ModelConfig.from_directory(directory)
    write_shards(directory, random_tensors(config, seed), by_layer=by_layer)
    return config


def quantize_plainly(
    source: Path, recipe: Recipe, output: Path, maxima: InputMaxima | None = None
) -> Manifest:
    """A finished artifact by rounding every linear to its scheme, without calibration. `maxima` are
    what it says of its experts' inputs.

    Static FP8 inputs get one scale for all, which the example model's inputs (up to 45) fit in.
    """
    reader = CheckpointReader(source)
    writer = ArtifactWriter(output, source=reader, recipe=recipe)
    for layer in range(reader.config.num_layers_with_mtp):
        read = reader.read_layer(layer)
        stored: dict[str, torch.Tensor] = {}
        for tensor in read.values():
            scheme = writer.schemes.get(tensor.spec.module)
            stored |= store_tensor(tensor, scheme)
            if scheme is not None and scheme.activations == "fp8":
                stored[f"{tensor.spec.module}.input_scale"] = INPUT_SCALE
        writer.publish_layer(layer, stored, source_sha256=content_digest(read))
    read = reader.read_globals()
    carried: dict[str, torch.Tensor] = {}
    for tensor in read.values():
        carried |= store_tensor(tensor, writer.schemes.get(tensor.spec.module))
    writer.publish_layer("globals", carried, source_sha256=content_digest(read))
    reader.finish()
    return writer.finish(
        calibration=None,
        coverage={},
        fallbacks=[],
        tools={"intserve": "test"},
        input_maxima=maxima,
    )
