"""`build --target sglang`: the directories of every dialect, the same bytes always, and what is
refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.sglang_builds import FITTING, build_sglang
from support.trtllm_builds import make_buildable

from deepseek.artifact.reader import ArtifactReader
from deepseek.artifact.tensors import pop_linear
from deepseek.errors import ArtifactError, DeployError
from deepseek.formats import decompress, unpack_int4
from quant_jobs.check import run_check

EXPERT = "model.layers.1.mlp.experts.3.down_proj"
KV_B = "model.layers.1.self_attn.kv_b_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact and its engine for every recipe of `FITTING`: NAME/artifact, NAME/engine."""
    root = tmp_path_factory.mktemp("sglang")
    for recipe in FITTING:
        make_buildable(root / recipe, recipe)
        build_sglang(root / recipe / "artifact", root / recipe / "engine")
    return root


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.heavy
@pytest.mark.parametrize("recipe", FITTING)
def test_the_dialect_is_the_one_in_which_the_artifact_runs_as_it_was_judged(
    made: Path, recipe: str
) -> None:
    assert (
        read(made / recipe / "engine" / "engine.json")["target_fields"]["dialect"]
        == (FITTING[recipe])
    )


@pytest.mark.heavy
@pytest.mark.parametrize("recipe", FITTING)
def test_every_rank_holds_the_artifacts_values_bit_for_bit(made: Path, recipe: str) -> None:
    result = run_check(made / recipe / "engine", made / recipe / "artifact")
    assert result.compared > 100
    assert result.verified > 50
    assert len(result.ranks) == 4


@pytest.mark.heavy
def test_config_json_says_the_method_or_nothing(made: Path) -> None:
    def method(recipe: str) -> Any:
        return read(made / recipe / "engine" / "config.json").get("quantization_config")

    assert method("w4a8") == {"quant_method": "w4afp8"}
    assert method("int8") is None
    assert method("int8-block") == {
        "quant_method": "blockwise_int8",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    groups = method("int4")
    assert groups["format"] == "pack-quantized"
    assert groups["config_groups"]["group_0"]["targets"][-1] == "Linear"


@pytest.mark.heavy
def test_the_launch_file_has_the_flags_that_the_method_needs(made: Path) -> None:
    launch = {
        recipe: yaml.safe_load((made / recipe / "engine" / "sglang.yaml").read_text())
        for recipe in FITTING
    }
    assert launch["int8"]["quantization"] == "w8a8_int8"
    assert not any("quantization" in launch[r] for r in FITTING if r != "int8")
    apart = {r for r in FITTING if launch[r].get("disable-shared-experts-fusion")}
    assert apart == {"w4a8", "int4", "int8-experts"}, "others have one format for all experts"
    assert launch["int4"]["tensor-parallel-size"] == 4
    assert launch["int4"]["expert-parallel-size"] == 2
    assert launch["int4"]["kv-cache-dtype"] == "bf16"


@pytest.mark.heavy
def test_int4_codes_are_two_in_a_byte_and_scales_powers_of_two(made: Path) -> None:
    tensors = load_file(made / "w4a8" / "engine" / "model-layer-00001.safetensors")
    artifact = ArtifactReader(made / "w4a8" / "artifact").read_layer(1)
    packed = tensors[f"{EXPERT}.weight"].to(torch.int16)
    low, high = (packed << 12).to(torch.int16) >> 12, packed >> 4
    codes = unpack_int4(artifact[f"{EXPERT}.weight_packed"], 2 * packed.shape[1])
    assert torch.equal(torch.stack((low, high), dim=-1).flatten(1).to(torch.int8), codes)
    assert torch.equal(
        tensors[f"{EXPERT}.weight_scale_inv"], artifact[f"{EXPERT}.weight_scale"].bfloat16()
    )
    scales = {
        role: {t.item() for key, t in tensors.items() if key.endswith(f"{role}.input_scale")}
        for role in ("gate_proj", "up_proj", "down_proj")
    }
    assert scales["gate_proj"] == scales["up_proj"]
    for found in scales.values():
        (scale,) = found
        assert torch.tensor(scale).frexp().mantissa == 0.5


@pytest.mark.heavy
def test_kv_b_proj_is_multiplied_out_where_groups_have_it_packed(made: Path) -> None:
    tensors = load_file(made / "int4-all" / "engine" / "model-layer-00001.safetensors")
    reader = ArtifactReader(made / "int4-all" / "artifact")
    scheme = reader.schemes[KV_B]
    parts = pop_linear(reader.read_layer(1), KV_B, scheme)
    rows, columns = parts["weight_shape"].tolist()
    weight = decompress(parts, scheme, (rows, columns)).bfloat16()
    assert torch.equal(tensors[f"{KV_B}.weight"], weight)
    assert f"{KV_B}.weight_packed" not in tensors
    fused = "model.layers.1.self_attn.q_a_proj"
    assert f"{fused}.weight_packed" in tensors
    assert f"{fused}.weight_shape" not in tensors, "SGLang puts two of them one after the other"


@pytest.mark.heavy
def test_the_same_inputs_give_the_same_bytes_and_a_lost_file_is_made_again(
    made: Path, tmp_path: Path
) -> None:
    artifact, engine = made / "w4a8" / "artifact", tmp_path / "engine"
    build_sglang(artifact, engine)
    expected = contents(made / "w4a8" / "engine")
    assert contents(engine) == expected
    (engine / "model-layer-00001.safetensors").unlink()
    result = build_sglang(artifact, engine)
    assert contents(engine) == expected
    assert result.dialect == "w4afp8"


@pytest.mark.heavy
def test_int4_experts_become_w4afp8_where_that_is_asked_for(made: Path, tmp_path: Path) -> None:
    artifact = made / "int4" / "artifact"
    result = build_sglang(artifact, tmp_path / "engine", dialect="w4afp8", kv_cache="fp8")
    assert result.dialect == "w4afp8"
    assert run_check(tmp_path / "engine", artifact).compared > 100
    launch = yaml.safe_load((tmp_path / "engine" / "sglang.yaml").read_text())
    assert launch["kv-cache-dtype"] == "fp8_e4m3"


@pytest.mark.heavy
def test_a_source_is_built_as_it_is_with_its_mtp_layer_if_asked(made: Path, tmp_path: Path) -> None:
    source = made / "int4" / "source"
    build_sglang(source, tmp_path / "plain")
    assert read(tmp_path / "plain" / "config.json")["num_nextn_predict_layers"] == 0
    build_sglang(source, tmp_path / "mtp", mtp=True)
    for name in ("plain", "mtp"):
        assert run_check(tmp_path / name).dialect == "released"
    launch = yaml.safe_load((tmp_path / "mtp" / "sglang.yaml").read_text())
    assert launch["speculative-algorithm"] == "EAGLE"
    own = load_file(tmp_path / "plain" / "model-layer-00001.safetensors")
    assert f"{EXPERT}.weight_scale_inv" in own


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "int8 in w4afp8": ("int8", {"dialect": "w4afp8"}, "w4afp8 is INT4 in symmetric groups of 128"),
    "int8 in groups": (
        "int8",
        {"dialect": "compressed-tensors"},
        "INT8 experts with INT8 inputs on NPUs only; use the recipe int8, and the dialect",
    ),
    "w4a8 in groups": ("w4a8", {"dialect": "compressed-tensors"}, "refuses static ones; use"),
    "int4 in w8a8_int8": ("int4", {"dialect": "w8a8_int8"}, "INT8 with INT8 inputs for every"),
    "tiles in groups": ("int8-block", {"dialect": "compressed-tensors"}, "no INT8 tiles; use"),
    "another target's": ("int4", {"dialect": "mixed"}, "dialect mixed is unknown to target sglang"),
    "released": ("int4", {"dialect": "released"}, "dialect released is unknown to target sglang"),
    "MTP": ("int4", {"mtp": True}, "the layer stays as released; leave out --mtp"),
    "KV": ("int4", {"kv_cache": "int8"}, "SGLang has no int8 KV cache for this model"),
    "ranks": ("int4", {"ep": 3}, "--ep 3 does not divide --tp 4"),
    "heads": ("int4", {"tp": 3, "ep": 1}, "attention heads on 3 ranks: every rank holds whole"),
    "version": ("int4", {"engine_version": "0.5.24"}, "SGLang 0.5.24 is not known to us; use"),
    "Ampere": ("w4a8", {"hardware": "8xA100-80GB"}, "w4afp8 kernels need GPUs of compute"),
    "context": ("int4", {"context": 0}, "--context must be 1 to "),
}


@pytest.mark.heavy
@pytest.mark.parametrize("case", REFUSED)
def test_what_sglang_cannot_load_is_refused_before_a_byte_is_written(
    made: Path, tmp_path: Path, case: str
) -> None:
    recipe, options, says = REFUSED[case]
    with pytest.raises(DeployError) as refused:
        build_sglang(made / recipe / "artifact", tmp_path / "engine", **options)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "engine").exists()


@pytest.mark.heavy
@pytest.mark.parametrize("recipe", ["int4-asym", "int8-asym"])
def test_zero_points_are_refused(tmp_path: Path, recipe: str) -> None:
    make_buildable(tmp_path, recipe)
    with pytest.raises(DeployError, match="zero points"):
        build_sglang(tmp_path / "artifact", tmp_path / "engine")


@pytest.mark.heavy
def test_w4afp8_without_maxima_says_how_to_measure_them(made: Path, tmp_path: Path) -> None:
    from support.synthetic import quantize_plainly

    from deepseek.recipe import load_recipe

    quantize_plainly(made / "int4" / "source", load_recipe("int4"), tmp_path / "artifact")
    with pytest.raises(ArtifactError, match="from which SGLang's static input scales are made"):
        build_sglang(tmp_path / "artifact", tmp_path / "engine", dialect="w4afp8")


@pytest.mark.heavy
def test_an_engine_of_another_dialect_is_not_overwritten(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "int4" / "engine", tmp_path / "engine")
    with pytest.raises(ArtifactError, match="dialect"):
        build_sglang(made / "int4" / "artifact", tmp_path / "engine", dialect="w4afp8")
