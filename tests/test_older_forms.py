"""What older versions wrote (`tests/fixtures/old/`) is read with its values, or refused in one
sentence that says what to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from deepseek.artifact.built_engine import read_engine
from deepseek.artifact.engine_manifest import read_engine_manifest
from deepseek.artifact.reader import ArtifactReader
from deepseek.artifact.verdict import read_verdict
from deepseek.engine.engine import LLMEngine
from deepseek.errors import ArtifactError
from quant_jobs.build import BuildOptions, run_build
from quant_jobs.evaluation.record import read_evaluation
from quant_jobs.gate import run_gate
from serve_app.gating import admit

OLD = Path(__file__).parent / "fixtures" / "old"


@pytest.mark.parametrize("form", [1, 2])
def test_an_artifact_of_an_older_form_is_read_and_built(form: int, tmp_path: Path) -> None:
    reader = ArtifactReader(OLD / f"artifact-{form}")
    assert reader.manifest.format_version == form
    reader.read_layer(0)
    reader.read_globals()
    reader.finish()
    assert reader.input_maxima is None
    result = run_build(reader.directory, "embedded", tmp_path / "engine", BuildOptions())
    assert result.artifact_digest == reader.digest
    built = run_build(reader.directory, "transformers", tmp_path / "hf", BuildOptions())
    assert built.artifact_digest == reader.digest


def test_artifacts_of_all_forms_hold_the_same_tensors() -> None:
    first, second = (ArtifactReader(OLD / f"artifact-{form}") for form in (1, 2))
    tensors, others = first.read_layer(0), second.read_layer(0)
    assert tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)


def test_an_engine_of_form_1_is_refused() -> None:
    with pytest.raises(ArtifactError) as caught:
        read_engine_manifest(OLD / "engine-1")
    assert str(caught.value).endswith(
        "engine-1/engine.json: format_version 1 is not supported, only 2; delete "
        f"{OLD / 'engine-1'} and build again with this version"
    )


def test_an_embedded_engine_whose_tensors_lie_as_torch_wanted_them_is_refused() -> None:
    """Its manifest is still read, and a verdict beside it; its loader wants native tensors."""
    engine = read_engine(OLD / "engine-2")
    assert engine.artifact_digest == ArtifactReader(OLD / "artifact-2").digest
    with pytest.raises(ArtifactError, match=r"engine-2 was built by a version whose tensors lie"):
        LLMEngine.load(OLD / "engine-2")


def test_a_verdict_beside_an_engine_of_form_1_is_refused_with_the_engine() -> None:
    with pytest.raises(ArtifactError, match=r"engine.json: format_version 1 is not supported"):
        read_verdict(OLD / "engine-1")


@pytest.mark.parametrize("form", [2, 3, 4])
def test_a_verdict_of_an_older_form_names_the_embedded_engine_and_its_kv_format(form: int) -> None:
    directory = OLD / f"verdict-{form}"
    written = json.loads((directory / "gate.json").read_text())
    assert written["format_version"] == form
    verdict = read_verdict(directory)
    assert verdict.passed
    assert (verdict.target, verdict.arithmetic, verdict.executed_by) == ("embedded",) * 3
    assert verdict.kv_cache == "bf16"
    assert verdict.engine_digest == written["engine_digest"]
    assert verdict.engine_digest == read_engine_manifest(directory).digest


@pytest.mark.parametrize("form", [1, 2])
def test_an_evaluation_of_an_older_form_is_read_with_its_figures(form: int) -> None:
    written = json.loads((OLD / f"evaluation-{form}" / "evaluation.json").read_text())
    assert written["format_version"] == form
    evaluation = read_evaluation(OLD / f"evaluation-{form}")
    assert (evaluation.target, evaluation.arithmetic, evaluation.executed_by) == ("embedded",) * 3
    assert evaluation.perplexity == written["perplexity"]
    assert evaluation.data.judged_tokens == 2016


def test_the_gate_judges_an_evaluation_of_form_2_and_serves_what_it_passed(tmp_path: Path) -> None:
    shutil.copytree(OLD / "engine-2", tmp_path / "engine")
    run_gate(tmp_path / "engine", OLD / "evaluation-2")
    verdict = read_verdict(tmp_path / "engine")
    assert verdict.passed
    assert json.loads((tmp_path / "engine" / "gate.json").read_text())["format_version"] == 5
    admitted = admit(tmp_path / "engine", kv_cache=None)
    assert admitted.engine_digest == read_engine_manifest(tmp_path / "engine").digest


def test_the_server_admits_an_engine_with_its_verdict_of_form_4(tmp_path: Path) -> None:
    shutil.copytree(OLD / "engine-2", tmp_path / "engine")
    shutil.copyfile(OLD / "verdict-4" / "gate.json", tmp_path / "engine" / "gate.json")
    admitted = admit(tmp_path / "engine", kv_cache=None)
    assert admitted.engine_digest == read_verdict(tmp_path / "engine").engine_digest


def test_no_older_file_names_a_place_on_a_machine() -> None:
    for path in OLD.rglob("*.json"):
        text = path.read_text()
        assert "/tmp" not in text, path
        assert "/home" not in text, path
