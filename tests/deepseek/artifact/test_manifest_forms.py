"""intserve.json of form 1, as it was written before the maxima of the experts' inputs were kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.format_1 import ARTIFACT_DIGEST, give_older_config, write_format_1_artifact

from deepseek.artifact.built_engine import read_engine
from deepseek.artifact.manifest import FORMAT_VERSION, Manifest, read_manifest, write_manifest
from deepseek.artifact.reader import ArtifactReader
from deepseek.errors import ArtifactError
from deepseek.files import sha256_file, write_json


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return write_format_1_artifact(tmp_path)[0]


def test_an_artifact_of_form_1_is_read_whole_under_its_own_digest(old: Path) -> None:
    reader = ArtifactReader(old)
    for layer in range(2):
        reader.read_layer(layer)
    reader.read_globals()
    reader.finish()
    assert reader.digest == ARTIFACT_DIGEST
    assert reader.manifest.format_version == 1
    assert reader.input_maxima is None
    assert reader.manifest.input_outliers == ()
    assert reader.recipe.gate.max_input_outliers == 8


def test_writing_it_again_changes_no_byte(old: Path) -> None:
    before = (old / "intserve.json").read_bytes()
    write_manifest(old, read_manifest(old))
    assert (old / "intserve.json").read_bytes() == before


def test_an_engine_of_it_is_built_and_read(old: Path, tmp_path: Path) -> None:
    from quant_jobs.targets.embedded import pack_engine

    manifest = pack_engine(ArtifactReader(old), tmp_path / "engine")
    engine = read_engine(tmp_path / "engine")
    assert engine.artifact_digest == manifest.artifact_digest == ARTIFACT_DIGEST
    assert engine.target == "embedded"
    assert engine.manifest is not None
    assert engine.manifest.format_version == 1


LATER: dict[str, Callable[[dict[str, Any]], object]] = {
    "input_outliers": lambda raw: raw.update(input_outliers=[]),
    "recipe.gate.max_input_outliers": lambda raw: raw["recipe"]["gate"].update(
        max_input_outliers=1000
    ),
    "files.input_maxima.json": lambda raw: raw["files"].update({"input_maxima.json": "0" * 64}),
}


@pytest.mark.parametrize("field", LATER)
def test_form_1_cannot_hold_what_its_digest_does_not_cover(old: Path, field: str) -> None:
    raw = json.loads((old / "intserve.json").read_text())
    LATER[field](raw)
    write_json(old / "intserve.json", raw)
    with pytest.raises(ArtifactError, match=f"{field} is no field of its format_version"):
        read_manifest(old)


def test_form_1_does_not_become_form_2_by_its_number_alone(old: Path) -> None:
    raw = json.loads((old / "intserve.json").read_text())
    write_json(old / "intserve.json", raw | {"format_version": 2})
    with pytest.raises(ArtifactError, match="was changed after it was written"):
        read_manifest(old)


@pytest.mark.parametrize("version", [0, 4, True, "1", 1.0, None, [1]])
def test_other_forms_are_refused(old: Path, version: object) -> None:
    raw = json.loads((old / "intserve.json").read_text())
    write_json(old / "intserve.json", raw | {"format_version": version})
    with pytest.raises(ArtifactError, match=r"format_version .* is not supported, only 1, 2 and 3"):
        read_manifest(old)


@pytest.fixture
def of_form_2(artifact: Path) -> Path:
    """An artifact with FP8 blocks, as it was written before form 3."""
    give_older_config(artifact, form=2)
    raw = json.loads((artifact / "intserve.json").read_text()) | {"format_version": 2}
    raw["files"]["config.json"] = sha256_file(artifact / "config.json")
    raw["digest"] = Manifest.model_validate({k: v for k, v in raw.items() if k != "digest"}).digest
    write_json(artifact / "intserve.json", raw)
    return artifact


def test_an_artifact_of_form_2_is_read_and_keeps_its_config(of_form_2: Path) -> None:
    reader = ArtifactReader(of_form_2)
    assert reader.manifest.format_version == 2
    config = json.loads((of_form_2 / "config.json").read_text())
    assert config["quantization_config"]["format"] == "mixed-precision"


def test_a_config_of_another_form_is_refused(of_form_2: Path) -> None:
    raw = json.loads((of_form_2 / "intserve.json").read_text()) | {"format_version": 3}
    raw["digest"] = Manifest.model_validate({k: v for k, v in raw.items() if k != "digest"}).digest
    write_json(of_form_2 / "intserve.json", raw)
    with pytest.raises(ArtifactError, match="quantization_config in config.json does not describe"):
        ArtifactReader(of_form_2)


def test_new_manifests_have_form_3(artifact: Path) -> None:
    raw = json.loads((artifact / "intserve.json").read_text())
    assert raw["format_version"] == FORMAT_VERSION == 3
    assert raw["input_outliers"] == []
    assert raw["recipe"]["gate"]["max_input_outliers"] == 8


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layer": 0}, "figures of the input of expert 0 in layer 0, which the model"),
        ({"layer": 2}, "figures of the input of expert 0 in layer 2"),
        ({"expert": 4}, "figures of the input of expert 4 in layer 1"),
        ({"ratio": 8.0}, "input_outliers.0.ratio: Input should be greater than 8"),
        ({"input": "up"}, "input_outliers.0.input: Input should be 'gate_up' or 'down'"),
        ({}, "has other input_outliers than follow from input_maxima.json"),
    ],
)
def test_outliers_must_be_of_the_model_and_follow_from_the_maxima(
    artifact: Path, change: dict[str, object], says: str
) -> None:
    outlier = {"layer": 1, "input": "down", "expert": 0, "ratio": 9.0} | change
    raw = json.loads((artifact / "intserve.json").read_text()) | {"input_outliers": [outlier]}
    del raw["digest"]
    if not says.startswith("input_outliers"):
        raw["digest"] = Manifest.model_validate(raw).digest
    write_json(artifact / "intserve.json", raw)
    with pytest.raises(ArtifactError) as refused:
        ArtifactReader(artifact)
    assert says in str(refused.value)
