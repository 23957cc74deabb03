"""What TensorRT-LLM's loader would take without a word, `check_engine` refuses by a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.trtllm_directories import edit_tensors, index_as_it_is, redigest
from torch import Tensor

from deepseek.artifact.reader import ArtifactReader
from deepseek.errors import ArtifactError, DeployError
from deepseek.tensor_files import read_header
from deepseek.trtllm.check import check_engine

LAYER_0, LAYER_1 = "model-layer-00000.safetensors", "model-layer-00001.safetensors"
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
KV_A = "model.layers.1.self_attn.kv_a_proj_with_mqa"


def narrow(tensors: Tensors) -> None:
    tensors[f"{KV_A}.weight"] = tensors[f"{KV_A}.weight"][:, :128]


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
    (narrow, rf"{KV_A}.weight is float8_e4m3fn \[192, 128\], which TensorRT-LLM cannot put"),
    (transpose_scale, "kv_b_proj.weight_scale_inv has the shape"),
]


@pytest.mark.parametrize(("edit", "sentence"), TENSOR_EDITS)
def test_an_edited_tensor_is_refused_by_name_though_its_engine_was_signed_again(
    mixed: Path, edit: Callable[[Tensors], None], sentence: str
) -> None:
    edit_tensors(mixed, LAYER_1, edit)
    index_as_it_is(mixed)
    redigest(mixed)
    with pytest.raises((ArtifactError, DeployError), match=sentence):
        check_engine(mixed)


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


def test_a_config_that_says_another_model_is_seen_with_the_artifact(
    mixed: Path, artifact: ArtifactReader
) -> None:
    content = json.loads((mixed / "config.json").read_text())
    (mixed / "config.json").write_text(json.dumps(content | {"rope_theta": 50000}))
    redigest(mixed)
    check_engine(mixed)
    with pytest.raises(ArtifactError, match="config.json has rope_theta 50000, where .* 10000"):
        check_engine(mixed, artifact=artifact)
