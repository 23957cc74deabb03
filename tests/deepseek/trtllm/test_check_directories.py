"""Files of an engine directory that do not belong together are refused by a sentence each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.quantizing import flip_byte
from support.trtllm_directories import edit_tensors, index_as_it_is, redigest
from torch import Tensor

from deepseek.artifact.engine_manifest import EnginePlan, RankLayout, read_engine_manifest
from deepseek.errors import ArtifactError, DeployError
from deepseek.trtllm.check import check_engine

LAYER_0, LAYER_1 = "model-layer-00000.safetensors", "model-layer-00001.safetensors"
GLOBALS = "model-globals.safetensors"
O_PROJ = "model.layers.0.self_attn.o_proj"

Tensors = dict[str, Tensor]


def stray_shard(directory: Path) -> None:
    shutil.copy(directory / LAYER_1, directory / "model-layer-00001-old.safetensors")


def consolidated(directory: Path) -> None:
    shutil.copy(directory / LAYER_1, directory / "consolidated.safetensors")


def stray_bin(directory: Path) -> None:
    (directory / "pytorch_model.bin").write_bytes(b"PK")


def duplicate_tensor(directory: Path) -> None:
    norm = "model.layers.1.input_layernorm.weight"
    edit_tensors(directory, GLOBALS, lambda tensors: tensors.update({norm: torch.ones(256)}))
    redigest(directory)


def mtp_tensor(directory: Path) -> None:
    name = "model.layers.2.enorm.weight"
    edit_tensors(directory, GLOBALS, lambda tensors: tensors.update({name: torch.ones(256)}))
    redigest(directory)


def unknown_tensor(directory: Path) -> None:
    name = "model.layers.1.self_attn.k_scale"
    edit_tensors(directory, LAYER_1, lambda tensors: tensors.update({name: torch.ones(1)}))
    redigest(directory)


def moved_tensor(directory: Path) -> None:
    taken: Tensors = {}
    name = "model.layers.1.input_layernorm.weight"
    edit_tensors(directory, LAYER_1, lambda tensors: taken.update({name: tensors.pop(name)}))
    edit_tensors(directory, GLOBALS, lambda tensors: tensors.update(taken))
    index_as_it_is(directory)
    redigest(directory)


def edit_json(name: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        content = json.loads((directory / name).read_text())
        change(content)
        (directory / name).write_text(json.dumps(content))
        redigest(directory)

    return edit


def in_both(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """Change the list of modules in both files, as a builder would that does not know better."""

    def edit(directory: Path) -> None:
        for name in ("quant_cfg.json", "hf_quant_config.json"):
            edit_json(name, lambda raw: change(raw.get("quantization", raw)["quantized_layers"]))(
                directory
            )

    return edit


def unlisted(*modules: str) -> Callable[[Path], None]:
    def change(layers: dict[str, Any]) -> None:
        for module in modules:
            del layers[module]

    return in_both(change)


def _experts_one_by_one(layers: dict[str, Any]) -> None:
    entry = layers.pop("model.layers.1.mlp.experts")
    for expert in range(4):
        layers[f"model.layers.1.mlp.experts.{expert}.gate_proj"] = entry


def without(name: str) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        (directory / name).unlink()
        redigest(directory)

    return edit


def ranks(tp: int, ep: int) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        plan = EnginePlan(rank_weight_bytes=(1,) * tp)
        redigest(directory, ranks=RankLayout(tp=tp, ep=ep), plan=plan)

    return edit


def field(name: str, value: object) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        fields = read_engine_manifest(directory).target_fields
        redigest(directory, target_fields=fields | {name: value})

    return edit


def flipped(name: str, at: int = -5) -> Callable[[Path], None]:
    return lambda directory: flip_byte(directory / name, at)


def cut_short(directory: Path) -> None:
    content = (directory / LAYER_1).read_bytes()
    (directory / LAYER_1).write_bytes(content[:-64])
    redigest(directory)


def linked_out(directory: Path) -> None:
    elsewhere = directory.parent / "elsewhere.safetensors"
    shutil.move(directory / GLOBALS, elsewhere)
    (directory / GLOBALS).symlink_to(elsewhere)


FP8_RELEASE = {"quant_method": "fp8", "weight_block_size": [128, 128]}
FUSED = ("model.layers.0.self_attn.fused_a", "model.layers.0.self_attn.kv_a_proj_with_mqa")
DIRECTORY_EDITS: list[tuple[Callable[[Path], None], str]] = [
    (stray_shard, "model-layer-00001-old.safetensors is no file of this engine"),
    (consolidated, "consolidated.safetensors is no file of this engine"),
    (stray_bin, "pytorch_model.bin is no file of this engine"),
    (duplicate_tensor, "input_layernorm.weight is in .*globals.* and .*00001"),
    (mtp_tensor, "holds model.layers.2.enorm.weight of an MTP layer"),
    (unknown_tensor, "holds model.layers.1.self_attn.k_scale, which TensorRT-LLM never reads"),
    (moved_tensor, "globals.safetensors holds .*input_layernorm.weight, which belongs into"),
    (
        edit_json("config.json", lambda raw: raw.update(quantization_config=FP8_RELEASE)),
        "config.json still has quantization_config beside hf_quant_config.json",
    ),
    (
        edit_json("config.json", lambda raw: raw.update(auto_map={"AutoModel": "x.Y"})),
        "config.json has auto_map",
    ),
    (
        edit_json("config.json", lambda raw: raw.update(torch_dtype="float16")),
        "config.json has torch_dtype 'float16', to which TensorRT-LLM would convert everything",
    ),
    (
        edit_json("config.json", lambda raw: raw.update(num_nextn_predict_layers=1)),
        "has num_nextn_predict_layers 1, but engine.json says that the MTP layers are absent",
    ),
    (unlisted(O_PROJ), rf"tensor {O_PROJ}.weight is float8_e4m3fn"),
    (
        unlisted("model.layers.0.mlp.gate_up_proj"),
        "model.layers.0.mlp.gate_proj.weight is float8_e4m3fn and is converted",
    ),
    (unlisted(*FUSED), "does not give .*kv_a_proj_with_mqa FP8_BLOCK"),
    (
        unlisted("model.layers.1.mlp.experts"),
        "whose bytes TensorRT-LLM takes for bfloat16",
    ),
    (in_both(_experts_one_by_one), "lists experts of .* one by one"),
    (
        edit_json(
            "hf_quant_config.json",
            lambda raw: raw["quantization"]["quantized_layers"].pop(O_PROJ),
        ),
        f"hf_quant_config.json and quant_cfg.json do not list the same for {O_PROJ}",
    ),
    (without("quant_cfg.json"), "has no quant_cfg.json, without which TensorRT-LLM 1.2.1"),
    (without("hf_quant_config.json"), "has no hf_quant_config.json, without which TensorRT-LLM"),
    (
        edit_json("quant_cfg.json", lambda raw: raw.update(kv_cache_quant_algo="FP8")),
        "kv_cache_quant_algo is FP8 in quant_cfg.json and None in hf_quant_config.json",
    ),
    (
        lambda directory: redigest(directory, kv_cache="fp8"),
        "kv_cache_quant_algo None, but the engine was built for a KV cache in fp8",
    ),
    (lambda directory: redigest(directory, kv_cache="int8"), "KV cache in int8, which Tensor"),
    (ranks(8, 4), "each of 8 ranks would hold 192 rows or columns of model.layers.0"),
    (ranks(3, 3), "tp 3 does not divide the 8 attention heads"),
    (
        lambda directory: redigest(directory, schemes={}),
        "engine.json lacks linear model.layers.0",
    ),
    (field("mtp", "kept"), "num_nextn_predict_layers 0, but engine.json says .* are kept"),
    (field("engine_version", "1.1.0"), "target_fields.engine_version"),
    (field("dialect", "single"), "quant_cfg.json does not belong to the dialect single"),
    (field("input_scales", {}), "has no input scales of layer 1"),
    (flipped(LAYER_0), "tensor model.layers.0.* in .*00000.safetensors was changed"),
    (flipped("tokenizer_config.json", 1), "tokenizer_config.json differs from what engine.json"),
    (flipped("quant_cfg.json", 5), "quant_cfg.json differs from what engine.json records"),
    (flipped("engine.json", 20), "engine.json"),
    (cut_short, "safetensors has .* bytes where its header announces"),
    (linked_out, "is a link to a file outside its directory"),
    (lambda directory: (directory / GLOBALS).unlink(), "globals.safetensors is absent"),
]


@pytest.mark.parametrize(("edit", "sentence"), DIRECTORY_EDITS)
def test_an_edited_directory_is_refused_by_its_sentence(
    mixed: Path, edit: Callable[[Path], None], sentence: str
) -> None:
    edit(mixed)
    with pytest.raises((ArtifactError, DeployError), match=sentence):
        check_engine(mixed)


def args(old: bytes, new: bytes) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / "llm_args.yaml"
        content = path.read_bytes()
        assert old in content
        path.write_bytes(content.replace(old, new))
        redigest(directory)

    return edit


ARGS_EDITS: list[tuple[Callable[[Path], None], str]] = [
    (
        args(b"tensor_parallel_size: 4\nmoe", b"tensor_parallel_size: 2\nmoe"),
        "llm_args.yaml: moe_expert_parallel_size 4 times",
    ),
    (args(b"dtype: auto", b"dtype: fp8"), "llm_args.yaml: kv_cache_config.dtype fp8 disagrees"),
    (args(b"CUTLASS", b"TRITON"), "llm_args.yaml: moe_config.backend TRITON has no kernel"),
    (args(b"stream_interval", b"stream_intervall"), "llm_args.yaml.* stream_intervall"),
    (without("llm_args.yaml"), "has no llm_args.yaml"),
]


@pytest.mark.parametrize(("edit", "sentence"), ARGS_EDITS)
def test_arguments_that_do_not_belong_to_the_engine_are_refused(
    mixed: Path, edit: Callable[[Path], None], sentence: str
) -> None:
    edit(mixed)
    with pytest.raises((ArtifactError, DeployError), match=sentence):
        check_engine(mixed)


SINGLE_EDITS: list[tuple[Callable[[Path], None], str]] = [
    (ranks(8, 1), "would multiply 64 inputs of model.layers.1.mlp.experts, no multiple of 128"),
    (
        edit_json("hf_quant_config.json", lambda raw: raw["quantization"].pop("group_size")),
        "has group_size None for W4A8_AWQ, not 128",
    ),
    (
        edit_json(
            "hf_quant_config.json",
            lambda raw: raw["quantization"]["exclude_modules"].remove("lm_head"),
        ),
        "does not exclude lm_head, which is stored in BF16",
    ),
    (ranks(8, 8), "ep 8 does not divide the 4 experts of model.layers.1"),
    (
        edit_json(
            "hf_quant_config.json",
            lambda raw: raw["quantization"]["exclude_modules"].remove("*self_attn*"),
        ),
        "hf_quant_config.json quantizes model.layers.0.self_attn.q_b_proj like the routed experts",
    ),
    (
        edit_json(
            "hf_quant_config.json",
            lambda raw: raw["quantization"]["exclude_modules"].append("re:.*experts"),
        ),
        "exclude_modules holds 're:.*experts', which is no plain glob",
    ),
    (
        edit_json(
            "hf_quant_config.json",
            lambda raw: raw["quantization"]["exclude_modules"].append("*kv_b_proj*"),
        ),
        "lacks the tensor .*kv_b_proj.weight_scale_inv",
    ),
    (flipped(LAYER_0), "00000.safetensors was edited after the engine was built"),
]


@pytest.mark.parametrize(("edit", "sentence"), SINGLE_EDITS)
def test_an_edited_engine_of_one_algorithm_is_refused_by_its_sentence(
    single: Path, edit: Callable[[Path], None], sentence: str
) -> None:
    edit(single)
    with pytest.raises((ArtifactError, DeployError), match=sentence):
        check_engine(single)
