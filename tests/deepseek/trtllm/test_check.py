"""What TensorRT-LLM's loader would take without a word, `check_engine` refuses by a sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.quantizing import flip_byte
from support.trtllm_directories import edit_tensors, redigest
from torch import Tensor

from deepseek.artifact.engine_manifest import EnginePlan, RankLayout, read_engine_manifest
from deepseek.artifact.reader import ArtifactReader
from deepseek.errors import ArtifactError, DeployError
from deepseek.tensor_files import read_header
from deepseek.trtllm.check import check_engine

LAYER_0, LAYER_1 = "model-layer-00000.safetensors", "model-layer-00001.safetensors"
GLOBALS = "model-globals.safetensors"
#: Tensors of the artifact, the shapes of compressed-tensors apart.
NUM_TENSORS = 69
EXPERT = "model.layers.1.mlp.experts.3"
DOWN, GATE, UP = (f"{EXPERT}.{role}" for role in ("down_proj", "gate_proj", "up_proj"))
O_PROJ = "model.layers.0.self_attn.o_proj"

Tensors = dict[str, Tensor]


def test_engines_of_both_dialects_pass(made: Path, artifact: ArtifactReader) -> None:
    for dialect in ("mixed", "single"):
        report = check_engine(made / dialect, artifact=artifact)
        assert report.dialect == dialect
        assert report.compared == NUM_TENSORS
        assert report.hashed_bytes == sum(
            path.stat().st_size for path in (made / dialect).glob("*.safetensors")
        )
        assert len(report.ranks) == 4
        entries = [
            entry
            for path in (made / dialect).glob("*.safetensors")
            for entry in read_header(path).tensors.values()
        ]
        assert report.tensors == len(entries)
        read = {load.read_bytes for load in report.ranks}
        assert max(read) < sum(entry.num_bytes for entry in entries)
    assert check_engine(made / "mixed").verified == NUM_TENSORS


# --- edits of tensors, by somebody who writes engine.json anew ---


def swap_nibbles(tensors: Tensors) -> None:
    codes = tensors[f"{DOWN}.weight"].view(torch.uint8)
    tensors[f"{DOWN}.weight"] = ((codes << 4) | (codes >> 4)).view(torch.int8)


def offset_binary(tensors: Tensors) -> None:
    codes = tensors[f"{DOWN}.weight"].view(torch.uint8) ^ 0x88
    tensors[f"{DOWN}.weight"] = codes.view(torch.int8)


def invert_scales(tensors: Tensors) -> None:
    key = f"{GATE}.weight_scale_inv"
    tensors[key] = (1 / tensors[key].float()).bfloat16()


def invert_tile_scales(tensors: Tensors) -> None:
    key = "model.layers.1.self_attn.q_b_proj.weight_scale_inv"
    tensors[key] = 1 / tensors[key]


def exchange_gate_and_up(tensors: Tensors) -> None:
    gate, up = f"{GATE}.weight", f"{UP}.weight"
    tensors[gate], tensors[up] = tensors[up], tensors[gate]


def change_code(tensors: Tensors) -> None:
    tensors[f"{UP}.weight"][0, 0] ^= 1


def change_tile(tensors: Tensors) -> None:
    tensors["model.layers.1.self_attn.o_proj.weight"].view(torch.uint8)[5, 5] ^= 1


def change_norm(tensors: Tensors) -> None:
    tensors["model.layers.1.input_layernorm.weight"][3] = 2.0


def leave_shape(tensors: Tensors) -> None:
    tensors[f"{DOWN}.weight_shape"] = torch.tensor([256, 512])


def leave_packed(tensors: Tensors) -> None:
    codes = tensors.pop(f"{DOWN}.weight").view(torch.uint8) ^ 0x88
    tensors[f"{DOWN}.weight_packed"] = codes.view(torch.int32)


def drop(key: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[key]

    return change


def scale_to(value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[f"{DOWN}.input_scale"] = torch.tensor([value])

    return change


def cast(key: str, dtype: torch.dtype) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[key] = tensors[key].to(dtype)

    return change


def as_unsigned(tensors: Tensors) -> None:
    tensors[f"{DOWN}.weight"] = tensors[f"{DOWN}.weight"].view(torch.uint8)


def stretched_norm(tensors: Tensors) -> None:
    tensors["model.layers.1.input_layernorm.weight"] = torch.ones(1, dtype=torch.bfloat16)


def transpose_scale(tensors: Tensors) -> None:
    key = "model.layers.1.self_attn.kv_b_proj.weight_scale_inv"
    tensors[key] = tensors[key].t()


def vector_of_scales(tensors: Tensors) -> None:
    tensors[f"{DOWN}.input_scale"] = torch.ones(2)


Q_B = "model.layers.1.self_attn.q_b_proj"
TENSOR_EDITS: list[tuple[Callable[[Tensors], None], str]] = [
    (swap_nibbles, rf"{DOWN}.weight in .* has its nibbles swapped"),
    (offset_binary, rf"{DOWN}.weight in .* has offset-binary codes"),
    (invert_scales, rf"{GATE}.weight_scale_inv in .* has inverted scales"),
    (invert_tile_scales, rf"{Q_B}.weight_scale_inv in .* has inverted scales"),
    (exchange_gate_and_up, rf"{GATE}.weight in .* holds the values of {UP}.weight_packed"),
    (change_code, rf"{UP}.weight in .* was changed"),
    (change_tile, "self_attn.o_proj.weight in .* was changed"),
    (change_norm, "model.layers.1.input_layernorm.weight in .* was changed"),
    (leave_shape, rf"holds {DOWN}.weight_shape, which is a checkpoint's of compressed-tensors"),
    (leave_packed, rf"lacks the tensor {DOWN}.weight, which TensorRT-LLM reads"),
    (drop(f"{DOWN}.input_scale"), rf"lacks the tensor {DOWN}.input_scale"),
    (drop(f"{Q_B}.weight_scale_inv"), rf"lacks the tensor {Q_B}.weight_scale_inv"),
    (drop("model.layers.1.mlp.gate.e_score_correction_bias"), "lacks the tensor model.layers.1"),
    (scale_to(0.5), rf"{DOWN}.input_scale in .* is 0.5, where all experts of the layer share"),
    (scale_to(0.0), rf"{DOWN}.input_scale in .* is 0.0, not a positive number"),
    (scale_to(-0.022), rf"{DOWN}.input_scale in .* not a positive number"),
    (scale_to(float("nan")), rf"{DOWN}.input_scale in .* is nan, not a positive number"),
    (scale_to(float("inf")), rf"{DOWN}.input_scale in .* is inf, not a positive number"),
    (vector_of_scales, rf"tensor {EXPERT}.* has the shape \[2\]; every expert needs one value"),
    (cast(f"{DOWN}.weight_scale_inv", torch.float32), "weight_scale_inv in .* is F32, not BF16"),
    (as_unsigned, rf"tensor {DOWN}.weight in .* is U8, not I8"),
    (cast(f"{Q_B}.weight_scale_inv", torch.bfloat16), "weight_scale_inv in .* is BF16, not F32"),
    (cast(f"{Q_B}.weight", torch.bfloat16), "is bfloat16 and is converted to float8_e4m3fn"),
    (stretched_norm, r"input_layernorm.weight is stretched from \[1\] to \[256\]"),
    (transpose_scale, "kv_b_proj.weight_scale_inv has the shape"),
]


@pytest.mark.parametrize(("edit", "sentence"), TENSOR_EDITS)
def test_an_edited_tensor_is_refused_by_name_though_its_engine_was_signed_again(
    mixed: Path, edit: Callable[[Tensors], None], sentence: str
) -> None:
    edit_tensors(mixed, LAYER_1, edit)
    _index_as_it_is(mixed)
    redigest(mixed)
    with pytest.raises((ArtifactError, DeployError), match=sentence):
        check_engine(mixed)


# --- edits of the directory ---


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
    _index_as_it_is(directory)
    redigest(directory)


def edit_json(name: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        content = json.loads((directory / name).read_text())
        change(content)
        (directory / name).write_text(json.dumps(content))
        redigest(directory)

    return edit


def _unlist(*modules: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for module in modules:
            del content["quantized_layers"][module]

    return change


def _experts_one_by_one(content: dict[str, Any]) -> None:
    entry = content["quantized_layers"].pop("model.layers.1.mlp.experts")
    for expert in range(4):
        content["quantized_layers"][f"model.layers.1.mlp.experts.{expert}.gate_proj"] = entry


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


def _index_as_it_is(directory: Path) -> None:
    """An index that lists what the files hold."""
    places = {
        name: path.name
        for path in sorted(directory.glob("*.safetensors"))
        for name in read_header(path).tensors
    }
    content = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(content))


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
        edit_json("config.json", lambda raw: raw.update(num_nextn_predict_layers=1)),
        "has num_nextn_predict_layers 1, but engine.json says that the MTP layers are absent",
    ),
    (edit_json("quant_cfg.json", _unlist(O_PROJ)), rf"tensor {O_PROJ}.weight is float8_e4m3fn"),
    (
        edit_json("quant_cfg.json", _unlist("model.layers.0.mlp.gate_up_proj")),
        "model.layers.0.mlp.gate_proj.weight is float8_e4m3fn and is converted",
    ),
    (edit_json("quant_cfg.json", _unlist(*FUSED)), "does not give .*kv_a_proj_with_mqa FP8_BLOCK"),
    (
        edit_json("quant_cfg.json", _unlist("model.layers.1.mlp.experts")),
        "whose bytes TensorRT-LLM takes for bfloat16",
    ),
    (edit_json("quant_cfg.json", _experts_one_by_one), "lists experts of .* one by one"),
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


SINGLE_EDITS: list[tuple[Callable[[Path], None], str]] = [
    (ranks(8, 1), "would multiply 64 inputs of model.layers.1.mlp.experts, no multiple of 128"),
    (ranks(8, 8), "8 ranks do not divide the 4 rows or columns of .*experts"),
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


def test_without_digests_documents_sizes_headers_and_input_scales_are_checked_only(
    mixed: Path,
) -> None:
    edit_tensors(mixed, LAYER_1, change_code)
    report = check_engine(mixed, digests=False)
    assert (report.hashed_bytes, report.verified) == (0, 0)
    edit_tensors(mixed, LAYER_1, scale_to(0.5))
    with pytest.raises(ArtifactError, match="is 0.5, where all experts"):
        check_engine(mixed, digests=False)


def test_a_dense_weight_of_one_algorithm_that_was_signed_again_is_seen_with_the_artifact(
    single: Path, artifact: ArtifactReader
) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{O_PROJ}.weight"][0, 0] += 1.0

    edit_tensors(single, LAYER_0, change)
    redigest(single)
    check_engine(single)
    with pytest.raises(ArtifactError, match=rf"rank 0 does not hold the values of {O_PROJ}.weight"):
        check_engine(single, artifact=artifact)


def test_an_engine_of_another_artifact_is_told_from_it(
    single: Path, artifact: ArtifactReader
) -> None:
    artifact.digest = "0" * 64
    with pytest.raises(ArtifactError, match="give the artifact that it was built from"):
        check_engine(single, artifact=artifact)
