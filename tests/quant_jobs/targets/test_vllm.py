"""`build --target vllm`: the same bytes always, resumed where it was, and refused in a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.trtllm_builds import digests
from support.vllm_builds import LAYER_1, build_vllm_engine, make_vllm_artifact

from deepseek.artifact.engine_manifest import read_engine_manifest
from deepseek.artifact.reader import ArtifactReader
from deepseek.errors import ArtifactError, DeployError, OutputError
from deepseek.recipe import load_recipe
from quant_jobs.build import check_checkpoint, complete_options
from quant_jobs.build_options import BuildOptions
from quant_jobs.check import run_check
from quant_jobs.targets import vllm

pytestmark = pytest.mark.heavy  # engines are built and read


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> ArtifactReader:
    return make_vllm_artifact(tmp_path_factory.mktemp("artifact"), "int4")


@pytest.fixture(scope="module")
def built(int4: ArtifactReader, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("built") / "engine"
    build_vllm_engine(int4.directory, output)
    return output


def test_a_rerun_keeps_the_engine_and_another_output_has_the_same_bytes(
    int4: ArtifactReader, built: Path, tmp_path: Path
) -> None:
    before = digests(built)
    again = build_vllm_engine(int4.directory, built)
    assert again.bytes_read == 0
    assert digests(built) == before
    build_vllm_engine(int4.directory, tmp_path / "other")
    assert digests(tmp_path / "other") == before


def test_a_killed_build_goes_on_and_gives_the_same_bytes(
    int4: ArtifactReader, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_engine_manifest(built).num_bytes
    real = vllm.write_layer
    calls: list[str] = []

    def failing(directory: Path, source: Any, key: str, *rest: Any) -> Any:
        calls.append(key)
        if len(calls) == 2:
            raise OutputError("the disk went away")
        return real(directory, source, key, *rest)

    monkeypatch.setattr(vllm, "write_layer", failing)
    output = tmp_path / "engine"
    with pytest.raises(OutputError):
        build_vllm_engine(int4.directory, output)
    assert not (output / "engine.json").exists()
    monkeypatch.setattr(vllm, "write_layer", real)
    result = build_vllm_engine(int4.directory, output)
    assert digests(output) == digests(built)
    assert result.bytes_read is not None
    assert 0 < result.bytes_read <= whole


def test_a_lost_file_of_a_finished_engine_is_made_again(
    int4: ArtifactReader, built: Path, tmp_path: Path
) -> None:
    output = tmp_path / "engine"
    shutil.copytree(built, output)
    (output / LAYER_1).unlink()
    build_vllm_engine(int4.directory, output)
    assert digests(output) == digests(built)


def test_the_ranks_hold_what_the_plan_and_the_manifest_say(
    int4: ArtifactReader, built: Path
) -> None:
    result = build_vllm_engine(int4.directory, built)
    assert result.planned_rank_bytes is not None
    assert result.rank_weight_bytes[0] == pytest.approx(result.planned_rank_bytes, rel=0.02)
    # the vocabulary of 96 is padded to 128 rows there, in embedding and head
    padding = 2 * (128 - 96) // 2 * 2 * int4.config.hidden_size
    shapes = 8 * 4 * 3  # of packed experts, held as one per expert and projection, counted once
    held = result.ranks[0].held_bytes
    assert held - padding == pytest.approx(result.rank_weight_bytes[0], abs=4 * shapes)


def test_a_check_with_the_artifact_compares_every_value(int4: ArtifactReader, built: Path) -> None:
    result = run_check(built, int4.directory)
    assert (result.target, result.dialect) == ("vllm", None)
    assert result.compared > 50
    assert "vLLM 0.32.0 would load it" in result.describe()[0]


def test_scales_of_packed_int8_are_rounded_once_as_vllm_would(tmp_path: Path) -> None:
    artifact = make_vllm_artifact(tmp_path, "int8-weight-only")
    build_vllm_engine(artifact.directory, tmp_path / "engine")
    ours, theirs = load_file(tmp_path / "engine" / LAYER_1), artifact.read_layer(1)
    scales = [name for name in ours if name.endswith(".weight_scale")]
    assert len(scales) > 10
    for name in scales:
        assert ours[name].dtype == torch.bfloat16
        assert torch.equal(ours[name], theirs[name].bfloat16()), name
    for name in ours.keys() - set(scales):
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("recipe", ["int8", "int4-asym"])
def test_no_scale_is_rounded_that_vllm_holds_as_it_is(recipe: str, tmp_path: Path) -> None:
    artifact = make_vllm_artifact(tmp_path, recipe)
    build_vllm_engine(artifact.directory, tmp_path / "engine", tp=1, ep=1)
    ours, theirs = load_file(tmp_path / "engine" / LAYER_1), artifact.read_layer(1)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


def test_a_release_keeps_its_names_and_its_quantization_config(
    int4: ArtifactReader, tmp_path: Path
) -> None:
    source = int4.directory.parent / "source"
    result = build_vllm_engine(source, tmp_path / "engine")
    config = json.loads((tmp_path / "engine/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "fp8"
    assert "model.layers.1.self_attn.o_proj.weight_scale_inv" in load_file(
        tmp_path / "engine" / LAYER_1
    )
    assert "VLLM_USE_DEEP_GEMM_E8M0=0" in result.warnings[0]
    assert run_check(tmp_path / "engine").verified == 0


def test_the_mtp_layer_is_left_out_or_kept_with_its_drafting(
    int4: ArtifactReader, built: Path, tmp_path: Path
) -> None:
    config = json.loads((built / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 0
    assert not (built / "model-layer-00002.safetensors").exists()
    build_vllm_engine(int4.directory, tmp_path / "kept", mtp=True)
    launch = yaml.safe_load((tmp_path / "kept/vllm.yaml").read_text())
    assert launch["speculative-config"] == {"method": "mtp", "num_speculative_tokens": 1}
    assert (tmp_path / "kept/model-layer-00002.safetensors").exists()
    assert run_check(tmp_path / "kept", int4.directory).compared > 50


def test_the_launch_file_says_what_was_asked_for(int4: ArtifactReader, tmp_path: Path) -> None:
    options = {"kv_cache": "fp8", "context": 100, "concurrency": 3, "ep": 1}
    result = build_vllm_engine(int4.directory, tmp_path / "engine", **options)
    assert (result.kv_cache, result.ep) == ("fp8", 1)
    assert yaml.safe_load((tmp_path / "engine/vllm.yaml").read_text()) == {
        "dtype": "bfloat16",
        "load-format": "safetensors",
        "tensor-parallel-size": 2,
        "kv-cache-dtype": "fp8",
        "max-model-len": 100,
        "max-num-seqs": 3,
        "max-num-batched-tokens": 8192,
        "gpu-memory-utilization": 0.92,
    }
    assert run_check(tmp_path / "engine", int4.directory).compared > 50


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_cache": "int8"}, "vLLM has no int8 KV cache for this model; give --kv-cache fp8"),
        ({"dialect": "single"}, "--dialect means nothing to target vllm; leave it out"),
        ({"engine_version": "0.11.0"}, "vLLM 0.11.0 is not known to us; use --engine-version"),
        ({"tp": 8, "ep": 4}, "--ep 4 is neither 1 nor --tp 8"),
        ({"tp": 3}, "4 attention heads on 3 ranks: every rank holds whole heads; use --tp 2"),
        ({"context": 1000}, "--context must be 1 to 256, the model's limit, not 1000"),
        ({"concurrency": 0}, "--concurrency must be at least 1, not 0"),
    ],
)
def test_what_cannot_be_built_is_refused_before_anything_is_written(
    options: dict[str, Any], words: str, int4: ArtifactReader, tmp_path: Path
) -> None:
    with pytest.raises(DeployError) as refusal:
        build_vllm_engine(int4.directory, tmp_path / "engine", **options)
    assert words in str(refusal.value)
    assert not any(tmp_path.iterdir())


def test_static_fp8_inputs_are_refused_with_the_matrix_s_sentence(tmp_path: Path) -> None:
    artifact = make_vllm_artifact(tmp_path, load_recipe("w4a8"))
    with pytest.raises(DeployError, match="refuses static ones"):
        build_vllm_engine(artifact.directory, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_another_output_is_not_overwritten(
    int4: ArtifactReader, built: Path, tmp_path: Path
) -> None:
    output = tmp_path / "engine"
    shutil.copytree(built, output)
    with pytest.raises(ArtifactError, match="mtp"):
        build_vllm_engine(int4.directory, output, mtp=True)
    assert digests(output) == digests(built)


def test_submit_completes_the_options_before_the_job(int4: ArtifactReader) -> None:
    done = complete_options("vllm", BuildOptions(tp=2))
    assert (done.tp, done.ep, done.engine_version) == (2, 2, "0.32.0")
    assert check_checkpoint(int4.directory, "vllm", done).kv_cache == "bf16"
