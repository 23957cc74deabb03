"""Directories as TensorRT-LLM loads them, made by hand from an artifact's tensors.

Independent of `build --target trtllm` and of `deepseek/trtllm/layout.py`: names, shapes and files
are written out here, so that a fault of the builder's is not a fault of the tests.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from support.synthetic import quantize_plainly, write_checkpoint
from torch import Tensor

from deepseek.artifact.engine_manifest import (
    EngineManifest,
    EnginePlan,
    RankLayout,
    TensorFile,
    read_engine_manifest,
    write_engine_manifest,
)
from deepseek.artifact.manifest import MANIFEST_FILE
from deepseek.artifact.reader import ArtifactReader
from deepseek.config import ModelConfig
from deepseek.files import write_json
from deepseek.formats import dequantize_fp8_block
from deepseek.recipe import load_recipe
from deepseek.source.index import INDEX_FILE
from deepseek.tensor_files import read_header
from deepseek.trtllm.fields import LayerInputScales, TrtllmFields
from deepseek.trtllm.llm_args import LLM_ARGS_FILE, llm_args_yaml, make_llm_args
from deepseek.trtllm.versions import EngineVersion

#: V3's head dims, and everything else small; every rank of tp 4 holds whole tiles and groups.
SHAPE: dict[str, Any] = {
    "layers": 2,
    "experts": 4,
    "hidden": 256,
    "moe_intermediate_size": 512,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 256,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "vocab_size": 98,
    "num_nextn_predict_layers": 0,
}

Dialect = Literal["mixed", "single"]
RANKS = RankLayout(tp=4, ep=4)
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
    ranks: RankLayout = RANKS,
    version: EngineVersion = "1.2.1",
    kv_cache: Literal["bf16", "fp8"] = "bf16",
) -> None:
    """A whole engine directory, engine.json included, without MTP layers."""
    directory.mkdir(parents=True)
    config = artifact.config
    raw = json.loads(artifact.documents["config.json"])
    raw.pop("quantization_config", None)
    raw["num_nextn_predict_layers"] = 0
    write_json(directory / "config.json", raw)
    for name in artifact.documents.keys() - {"config.json", INDEX_FILE}:
        (directory / name).write_bytes(artifact.documents[name])
    (directory / MANIFEST_FILE).write_bytes((artifact.directory / MANIFEST_FILE).read_bytes())
    schemes = {
        module: scheme
        for module, scheme in artifact.schemes.items()
        if int(module.split(".")[2]) < config.num_hidden_layers
    }
    formats = {s.weights for module, s in schemes.items() if ".mlp.experts." in module}
    algo = "W4A8_AWQ" if formats == {"int4"} else "W8A16"
    kv_algo = "FP8" if kv_cache == "fp8" else None
    for name, content in quant_files(config, algo, dialect, kv_algo).items():
        write_json(directory / name, content)
    args = make_llm_args(
        version,
        tp=ranks.tp,
        ep=ranks.ep,
        kv_cache=kv_cache,
        max_batch_size=8,
        max_num_tokens=512,
        max_seq_len=256,
    )
    (directory / LLM_ARGS_FILE).write_bytes(llm_args_yaml(args, version))
    weight_map: dict[str, str] = {}
    for layer in range(config.num_hidden_layers):
        _write_layer(artifact, artifact.read_layer(layer), layer, directory, dialect, weight_map)
    _write_layer(artifact, artifact.read_globals(), "globals", directory, dialect, weight_map)
    write_json(directory / INDEX_FILE, {"metadata": {}, "weight_map": weight_map})
    scales = {
        layer: LayerInputScales(
            gate_up=_f32(input_scale(layer, "up_proj")),
            down=_f32(input_scale(layer, "down_proj")),
            needed_gate_up=0.01,
            needed_down=0.01,
        )
        for layer in range(config.num_hidden_layers)
        if config.is_moe(layer) and algo == "W4A8_AWQ"
    }
    fields = TrtllmFields(
        dialect=dialect,
        engine_version=version,
        mtp="left out" if config.num_nextn_predict_layers else "absent",
        input_scales=scales,
    )
    manifest = EngineManifest(
        target="trtllm",
        ranks=ranks,
        recipe=artifact.recipe.name,
        artifact_digest=artifact.digest,
        source_fingerprint=artifact.manifest.source.fingerprint,
        kv_cache=kv_cache,
        schemes=schemes,
        versions={"intserve": "test"},
        plan=EnginePlan(rank_weight_bytes=(1,) * ranks.tp),
        files={},
        tensor_files={},
        target_fields=fields.model_dump(mode="json"),
    )
    write_engine_manifest(directory, manifest)
    redigest(directory)


def redigest(directory: Path, **changes: Any) -> None:
    """Write engine.json again for the files that are there now, as somebody would who edits an
    engine and knows how. `changes` are fields of the manifest."""
    manifest = read_engine_manifest(directory)
    files: dict[str, str] = {}
    tensor_files: dict[str, TensorFile] = {}
    for path in sorted(directory.iterdir()):
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        if path.suffix == ".safetensors":
            tensor_files[path.name] = TensorFile(num_bytes=path.stat().st_size, sha256=sha256)
        elif path.name != "engine.json":
            files[path.name] = sha256
    update = {"files": files, "tensor_files": tensor_files, **changes}
    write_engine_manifest(directory, manifest.model_copy(update=update))


def edit_tensors(directory: Path, file: str, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of one file in place."""
    tensors = load_file(directory / file)
    change(tensors)
    _save(tensors, directory / file)


def index_as_it_is(directory: Path) -> None:
    """An index that lists what the files hold."""
    places = {
        name: path.name
        for path in sorted(directory.glob("*.safetensors"))
        for name in read_header(path).tensors
    }
    content = {"metadata": {}, "weight_map": places}
    (directory / INDEX_FILE).write_text(json.dumps(content))


def _write_layer(
    artifact: ArtifactReader,
    tensors: dict[str, Tensor],
    layer: int | Literal["globals"],
    directory: Path,
    dialect: Dialect,
    weight_map: dict[str, str],
) -> None:
    name = "globals" if layer == "globals" else f"layer-{layer:05d}"
    file = f"model-{name}.safetensors"
    stored = stored_tensors(artifact, tensors, dialect)
    _save(stored, directory / file)
    weight_map |= dict.fromkeys(stored, file)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _f32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()
