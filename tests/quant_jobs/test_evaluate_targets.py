"""An engine for another target is judged in that target's values and arithmetic, and its verdict
admits it and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.engines import make_engine
from support.quantizing import flip_byte
from support.synthetic import quantize_plainly
from support.trtllm_builds import make_maxima

from deepseek.artifact.built_engine import read_engine
from deepseek.artifact.engine_manifest import read_engine_manifest
from deepseek.artifact.verdict import read_verdict, write_verdict
from deepseek.config import ModelConfig
from deepseek.errors import ArtifactError, DeployError
from deepseek.recipe import load_recipe
from deepseek.target_engine import check_kv_format, check_memory
from quant_jobs.build import run_build
from quant_jobs.build_options import BuildOptions
from quant_jobs.evaluate import Settings, obtain_reference, run_evaluate
from quant_jobs.evaluation.record import Evaluation, read_evaluation
from quant_jobs.gate import run_gate
from quant_jobs.report import run_report
from serve_app.gating import admit

#: What each target builds the example model of: its head dims are 64, so that TensorRT-LLM takes it
#: in the dialect `single` only.
TARGETS: dict[str, dict[str, Any]] = {
    "trtllm": {"dialect": "single", "tp": 1, "ep": 1},
    "vllm": {"tp": 1},
    "sglang": {"tp": 1},
    "transformers": {},
}
#: (target, recipe) that pass the gate with calibration left out.
JUDGED = [
    ("trtllm", "w4a8"),
    ("trtllm", "int8-experts"),
    ("vllm", "int8"),
    ("sglang", "w4a8"),
    ("transformers", "int8-experts"),
]

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artifacts, engines and the reference, made once; nobody may change them."""
    return tmp_path_factory.mktemp("judged")


@pytest.fixture(scope="session")
def reference(folder: Path, tiny_model: Path) -> Path:
    """The source's run over 2040 judged tokens."""
    settings = Settings(num_blocks=8, block_tokens=256)
    obtain_reference(tiny_model, tiny_model / "heldout.txt", folder / "reference", settings)
    return folder / "reference"


@pytest.fixture(scope="session")
def brief(folder: Path, tiny_model: Path) -> Path:
    """The source's run over too few tokens for a verdict."""
    settings = Settings(num_blocks=2, block_tokens=96)
    obtain_reference(tiny_model, tiny_model / "heldout.txt", folder / "brief", settings)
    return folder / "brief"


def artifact(folder: Path, source: Path, recipe: str) -> Path:
    """A quantized checkpoint, rounded to nearest, with maxima of its experts' inputs."""
    output = folder / recipe
    if not output.exists():
        maxima = make_maxima(ModelConfig.from_directory(source))
        quantize_plainly(source, load_recipe(recipe), output, maxima)
    return output


def build(folder: Path, source: Path, target: str, recipe: str) -> Path:
    """The engine of a recipe for a target."""
    output = folder / f"{recipe}-{target}"
    if not output.exists():
        options = BuildOptions(**TARGETS[target])
        run_build(artifact(folder, source, recipe), target, output, options)
    return output


def judge(engine: Path, reference: Path, output: Path, kv_cache: Any = None) -> Evaluation:
    return run_evaluate(engine, reference, None, output, Settings(kv_cache=kv_cache))


@pytest.fixture
def judged(folder: Path, tiny_model: Path, reference: Path, tmp_path: Path) -> Path:
    """A copy of a TensorRT-LLM engine that passed its gate, free to damage; beside it `embedded`,
    the embedded engine of the same artifact with a passing verdict."""
    source = build(folder, tiny_model, "trtllm", "w4a8")
    if not (source / "gate.json").exists():
        judge(source, reference, folder / "judged-evaluation")
        run_gate(source, folder / "judged-evaluation")
    return shutil.copytree(source, tmp_path / "engine")


@pytest.mark.parametrize(("target", "recipe"), JUDGED)
def test_an_engine_is_built_judged_and_admitted_in_its_targets_arithmetic(
    folder: Path, tiny_model: Path, reference: Path, tmp_path: Path, target: str, recipe: str
) -> None:
    engine = shutil.copytree(build(folder, tiny_model, target, recipe), tmp_path / "engine")
    (engine / "gate.json").unlink(missing_ok=True)
    result = judge(engine, reference, tmp_path / "evaluation")
    assert (result.target, result.arithmetic, result.executed_by) == (target, target, "embedded")
    assert result.speed == ()
    assert result.no_speed is not None
    assert f"emulates the arithmetic of {target}" in result.no_speed
    assert any(size.group == "mtp" for size in result.sizes)  # the artifact has it
    outcome = run_gate(engine, tmp_path / "evaluation")
    assert outcome.verdict.passed, outcome.verdict.reasons
    assert f"arithmetic of {target} emulated by the embedded engine" in outcome.describe()[0]
    admitted = admit(engine, kv_cache=None, depth="bytes")
    assert (admitted.arithmetic, admitted.gated, admitted.emulated) == (target, True, True)
    assert run_report(engine, tmp_path / "evaluation", tmp_path / "page.html").verdict == "pass"
    page = (tmp_path / "page.html").read_text()
    assert f"An engine for {target}, judged by emulation" in page
    assert "says nothing about its kernels" in page


def test_the_targets_arithmetic_and_kv_layout_give_other_figures_than_the_embedded_engines(
    folder: Path, tiny_model: Path, brief: Path, tmp_path: Path
) -> None:
    """INT4 experts of a recipe without FP8 inputs have them under TensorRT-LLM, and its FP8 cache
    has one scale for everything where the embedded engine's has one per tile."""
    engines = {
        "trtllm": build(folder, tiny_model, "trtllm", "int4"),
        "embedded": make_engine(tiny_model, "int4", tmp_path),
    }
    found = {}
    for target, engine in engines.items():
        for kv_cache in ("bf16", "fp8"):
            output = tmp_path / f"{target}-{kv_cache}"
            result = judge(engine, brief, output, kv_cache)
            assert (result.arithmetic, result.kv_cache) == (target, kv_cache)
            found[target, kv_cache] = result.kl.mean.value
    assert len(set(found.values())) == 4
    assert found["trtllm", "bf16"] > 1.05 * found["embedded", "bf16"]
    assert found["trtllm", "fp8"] > found["trtllm", "bf16"]


# --- which verdict admits which directory ---


def refused(engine: Path, **how: Any) -> str:
    with pytest.raises(ArtifactError) as caught:
        admit(engine, **{"kv_cache": None, **how})
    return str(caught.value)


def test_a_verdict_on_the_same_artifact_under_another_target_does_not_admit(
    judged: Path, folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    assert admit(judged, kv_cache=None).gated
    embedded = tmp_path / "embedded"
    run_build(folder / "w4a8", "embedded", embedded, BuildOptions())
    shutil.copy(judged / "gate.json", embedded / "gate.json")
    theirs = read_verdict(judged)
    assert theirs.artifact_digest == read_engine_manifest(embedded).artifact_digest
    assert "gate.json judges the engine" in refused(embedded)
    # Also where somebody puts the right digest in: the target is another.
    digest = read_engine_manifest(embedded).digest
    write_verdict(embedded, theirs.model_copy(update={"engine_digest": digest}))
    assert "judges an engine for trtllm, but this one is for embedded" in refused(embedded)
    ours = {"target": "embedded", "arithmetic": "embedded"}
    write_verdict(judged, theirs.model_copy(update=ours))
    assert "judges an engine for embedded, but this one is for trtllm" in refused(judged)
    write_verdict(judged, theirs.model_copy(update={"arithmetic": "embedded"}))
    assert "judges the arithmetic of embedded, but trtllm would serve" in refused(judged)


def test_a_verdict_on_another_kv_format_or_another_build_does_not_admit(
    judged: Path, folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    assert "judges bf16 KV pages, but fp8 ones would be served" in refused(judged, kv_cache="fp8")
    other = tmp_path / "other"
    options = BuildOptions(tp=1, ep=1, dialect="single", kv_cache="fp8")
    run_build(folder / "w4a8", "trtllm", other, options)
    shutil.copy(judged / "gate.json", other / "gate.json")
    assert "gate.json judges the engine" in refused(other)
    write_verdict(judged, read_verdict(judged).model_copy(update={"kv_cache": "fp8"}))
    assert "judges fp8 KV pages, but bf16 ones would be served" in refused(judged)
    assert admit(judged, kv_cache="fp8").gated


# --- what is not judged ---


def test_a_kv_format_that_the_target_has_not_is_refused_before_anything_is_read(
    judged: Path, brief: Path, tmp_path: Path
) -> None:
    with pytest.raises(DeployError) as caught:
        judge(judged, brief, tmp_path / "evaluation", "int8")
    assert str(caught.value) == (
        "trtllm has no int8 KV cache, only the embedded engine has; give --kv-cache bf16"
    )
    assert not (tmp_path / "evaluation").exists()


def test_a_damaged_directory_is_refused_and_no_evaluation_is_written(
    judged: Path, brief: Path, tmp_path: Path
) -> None:
    flip_byte(judged / "model-layer-00002.safetensors", -300)
    with pytest.raises(ArtifactError, match=r"model-layer-00002\.safetensors was edited after"):
        judge(judged, brief, tmp_path / "evaluation")
    assert admit(judged, kv_cache=None, depth="headers").gated
    with pytest.raises(ArtifactError, match=r"model-layer-00002\.safetensors"):
        admit(judged, kv_cache=None, depth="bytes")
    (judged / "model-layer-00001.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"model-layer-00001\.safetensors is absent"):
        judge(judged, brief, tmp_path / "evaluation")
    assert not (tmp_path / "evaluation").exists()


def test_a_directory_that_the_targets_loader_would_misread_is_not_executed(
    judged: Path, brief: Path, tmp_path: Path
) -> None:
    path = judged / "hf_quant_config.json"
    raw = json.loads(path.read_text())
    raw["quantization"]["exclude_modules"] = []
    path.write_text(json.dumps(raw))
    with pytest.raises(ArtifactError, match="differs from what engine.json records"):
        judge(judged, brief, tmp_path / "evaluation")


def test_an_engine_that_memory_cannot_hold_is_refused_with_both_sizes(tmp_path: Path) -> None:
    check_memory(tmp_path, "trtllm", 64 << 30, 64 << 30)
    with pytest.raises(DeployError) as caught:
        check_memory(tmp_path, "trtllm", 700_000_000_000, 64_000_000_000)
    assert str(caught.value) == (
        f"{tmp_path} needs 700.0 GB to be executed as trtllm does, because the model is held in "
        "memory, and this machine has 64.0 GB; evaluate on a larger machine"
    )


def test_the_evaluation_of_a_target_is_read_back(
    judged: Path, folder: Path, tmp_path: Path
) -> None:
    result = read_evaluation(folder / "judged-evaluation")
    assert (result.format_version, result.target) == (3, "trtllm")
    assert read_verdict(judged).is_emulated


def test_the_layers_with_static_inputs_are_those_that_engine_json_has_scales_of(
    folder: Path, tiny_model: Path
) -> None:
    for target, layers in (("trtllm", {1, 2, 3}), ("vllm", set())):
        engine = read_engine(build(folder, tiny_model, target, "int4"))
        assert engine.static_input_layers == layers


def test_an_engine_for_a_target_that_is_not_emulated_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DeployError, match="an engine for onnx cannot be executed here; build for"):
        check_kv_format("onnx", "fp8")
