"""`measure`: an artifact without maxima of its experts' inputs gets them; nothing else changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.chain import Ended
from support.format_1 import ARTIFACT_DIGEST, write_format_1_artifact
from support.outliers import OUTLIER_EXPERT, OUTLIER_LAYER, outlier_small_model
from support.quantizing import SmallModel, contents, flip_byte, make_small_model, small_recipe
from support.synthetic import quantize_plainly

from deepseek.artifact.input_maxima import INPUT_MAXIMA_FILE
from deepseek.artifact.manifest import MANIFEST_FILE
from deepseek.artifact.reader import ArtifactReader
from deepseek.config import ModelConfig
from deepseek.errors import ArtifactError, CalibrationError, DeployError, IntServeError
from deepseek.recipe import Recipe
from quant_jobs.build import run_build
from quant_jobs.build_options import BuildOptions
from quant_jobs.job.measure_pass import measure_experts
from quant_jobs.measure import Measurement, run_measure
from quant_jobs.quantize import run_quantize

pytestmark = pytest.mark.heavy


def silent(done: int, detail: str) -> None:
    pass


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SmallModel]:
    """An artifact of manifest form 1. Not to be written to."""
    return write_format_1_artifact(tmp_path_factory.mktemp("made"))


@pytest.fixture
def old(made: tuple[Path, SmallModel], tmp_path: Path) -> Path:
    return shutil.copytree(made[0], tmp_path / "old")


@pytest.fixture(scope="module")
def text(made: tuple[Path, SmallModel]) -> Path:
    return made[1].text


@pytest.fixture(scope="module")
def measured(
    made: tuple[Path, SmallModel], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Measurement]:
    """The same artifact, measured. Not to be written to."""
    directory = shutil.copytree(made[0], tmp_path_factory.mktemp("measured") / "artifact")
    return directory, run_measure(directory, text, 0, silent)


def test_an_older_artifact_gets_maxima_and_no_other_file_changes(
    made: tuple[Path, SmallModel], measured: tuple[Path, Measurement]
) -> None:
    directory, result = measured
    before, after = contents(made[0]), contents(directory)
    assert after.keys() - before.keys() == {INPUT_MAXIMA_FILE}
    assert {name for name in before if after[name] != before[name]} == {MANIFEST_FILE}
    reader = ArtifactReader(directory)
    assert reader.input_maxima == result.maxima
    assert reader.manifest == result.manifest
    assert reader.manifest.format_version == 2
    assert (result.before, result.kept) == (ARTIFACT_DIGEST, False)
    assert reader.digest != ARTIFACT_DIGEST
    layer = result.maxima.layers[1]
    assert list(result.maxima.layers) == [1]
    assert all(value > 0.1 for value in (*layer.gate_up, *layer.down))
    old, new = (json.loads(files[MANIFEST_FILE]) for files in (before, after))
    old["recipe"]["gate"]["max_input_outliers"] = 8
    old["files"][INPUT_MAXIMA_FILE] = new["files"][INPUT_MAXIMA_FILE]
    changed = {key for key in new if old.get(key) != new[key]}
    assert changed == {"digest", "format_version", "input_outliers"}


def test_it_says_that_engines_must_be_built_again(measured: tuple[Path, Measurement]) -> None:
    directory, result = measured
    (line,) = result.describe(directory)
    assert f"(was {ARTIFACT_DIGEST[:16]})" in line
    assert "engines built from it before must be built again" in line
    assert result.summary()["artifact_digest"] == result.manifest.digest


def test_maxima_that_are_there_are_verified_and_kept(
    measured: tuple[Path, Measurement], tmp_path: Path
) -> None:
    """Also with no calibration to be found: nothing is measured."""
    directory = shutil.copytree(measured[0], tmp_path / "artifact")
    before = contents(directory)
    result = run_measure(directory, tmp_path / "absent.txt", 0, silent)
    assert result.kept
    assert result.maxima == measured[1].maxima
    assert contents(directory) == before
    assert "verified and kept" in result.describe(directory)[0]


@pytest.mark.parametrize("damage", [Path.unlink, flip_byte, lambda path: path.write_text("{}")])
def test_lost_maxima_are_measured_again(
    measured: tuple[Path, Measurement], text: Path, tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    directory = shutil.copytree(measured[0], tmp_path / "artifact")
    damage(directory / INPUT_MAXIMA_FILE)
    with pytest.raises(ArtifactError, match=INPUT_MAXIMA_FILE):
        ArtifactReader(directory)
    assert not run_measure(directory, text, 0, silent).kept
    assert contents(directory) == contents(measured[0])


def test_a_run_that_ends_on_the_way_leaves_the_artifact_as_it_was(
    old: Path, text: Path, measured: tuple[Path, Measurement]
) -> None:
    class Stopped(BaseException):
        pass

    def stop(done: int, detail: str) -> None:
        if done == 2:
            raise Stopped

    before = contents(old)
    with pytest.raises(Stopped):
        run_measure(old, text, 0, stop)
    assert contents(old) == before
    run_measure(old, text, 0, silent)
    assert contents(old) == contents(measured[0])


def test_a_file_of_a_killed_run_is_refused_until_the_next_one_replaces_it(
    old: Path, text: Path, measured: tuple[Path, Measurement]
) -> None:
    """Killed between its two files."""
    (old / INPUT_MAXIMA_FILE).write_text("of another run")
    with pytest.raises(
        ArtifactError, match=r"not listed in intserve\.json, as after a `quant_jobs"
    ):
        ArtifactReader(old)
    run_measure(old, text, 0, silent)
    assert contents(old) == contents(measured[0])


@pytest.mark.parametrize("wave_blocks", [1, 3])
def test_the_order_of_the_blocks_does_not_show(
    measured: tuple[Path, Measurement], text: Path, wave_blocks: int
) -> None:
    from quant_jobs.calibration.token_blocks import load_token_blocks
    from quant_jobs.workers.in_process import InProcessWorker

    artifact = ArtifactReader(measured[0])
    ids = load_token_blocks(text, measured[0], 4, 48).ids
    with InProcessWorker() as worker:
        found = measure_experts(artifact, ids, worker, silent, wave_blocks=wave_blocks)
    assert found == measured[1].maxima


@pytest.mark.slow
@pytest.mark.ray
def test_the_number_of_workers_does_not_show(
    old: Path, text: Path, measured: tuple[Path, Measurement]
) -> None:
    run_measure(old, text, 3, silent)
    assert contents(old) == contents(measured[0])


def test_what_is_measured_is_what_a_job_measures_where_nothing_was_quantized_before(
    tmp_path: Path,
) -> None:
    """`int4` leaves all but the experts as they are, so the inputs of layer 1 are the same; those
    of `down_proj` come from quantized gate and up here."""
    model = outlier_small_model(tmp_path)
    output = tmp_path / "out"
    run_quantize(model.directory, small_recipe("int4"), model.text, output, 0, lambda event: None)
    kept = ArtifactReader(output).input_maxima
    for lost in (INPUT_MAXIMA_FILE, "job_report.json"):
        (output / lost).unlink()
    result = run_measure(output, model.text, 0, silent)
    assert kept is not None
    assert result.maxima.layers[1].gate_up == kept.layers[1].gate_up
    for layer in (1, 2):
        ours, theirs = (torch.tensor(m.layers[layer].down) for m in (result.maxima, kept))
        assert ((ours - theirs).abs() <= 0.25 * theirs).all()
    (found,) = result.manifest.input_outliers
    assert (found.layer, found.expert) == (OUTLIER_LAYER, OUTLIER_EXPERT)
    assert "layer 2, down input of expert 5" in result.describe(output)[1]


def test_what_an_engine_for_tensorrt_llm_lacks_is_added(
    old: Path, measured: tuple[Path, Measurement], tmp_path: Path
) -> None:
    """Its manifest has no coverage either: this artifact was made without calibration."""
    options = BuildOptions(tp=1, dialect="single")
    with pytest.raises(ArtifactError) as refused:
        run_build(old, "trtllm", tmp_path / "engine", options)
    assert f"python -m quant_jobs measure --checkpoint {old} --calib" in str(refused.value)
    built = run_build(measured[0], "trtllm", tmp_path / "engine", options)
    assert built.artifact_digest == measured[1].manifest.digest


# Bad input.


def test_a_damaged_tensor_is_named(old: Path, text: Path) -> None:
    before = contents(old)
    layer = old / "model-layer-00001.safetensors"
    flip_byte(layer)
    with pytest.raises(ArtifactError, match=r"tensor model\.layers\.1\S+ in .* is damaged"):
        run_measure(old, text, 0, silent)
    (old / "model-globals.safetensors").rename(old / ".globals")
    with pytest.raises(ArtifactError, match="model-globals.safetensors is absent"):
        run_measure(old, text, 0, silent)
    assert contents(old)[MANIFEST_FILE] == before[MANIFEST_FILE]
    assert not (old / INPUT_MAXIMA_FILE).exists()


def test_ids_of_another_vocabulary_are_refused(old: Path, tmp_path: Path) -> None:
    ids = tmp_path / "ids.safetensors"
    save_file({"input_ids": torch.full((8, 64), 96)}, ids)
    assert ModelConfig.from_directory(old).vocab_size == 96
    with pytest.raises(CalibrationError, match="id 96 .* is none of the model's 0 to 95"):
        run_measure(old, ids, 0, silent)


def test_what_cannot_be_measured_is_one_sentence(
    old: Path, text: Path, made: tuple[Path, SmallModel], tmp_path: Path
) -> None:
    source = made[1].directory
    with pytest.raises(CalibrationError, match="absent.txt"):
        run_measure(old, tmp_path / "absent.txt", 0, silent)
    with pytest.raises(CalibrationError, match="no calibration text is given"):
        run_measure(old, [], 0, silent)
    with pytest.raises(ArtifactError, match="not a finished quantized checkpoint"):
        run_measure(source, text, 0, silent)
    with pytest.raises(IntServeError):
        run_measure(tmp_path / "nowhere", text, 0, silent)
    with pytest.raises(DeployError, match="leave one of the two out"):
        run_measure(old, text, 0, silent, cpus_per_worker=2)


def test_an_artifact_without_quantized_experts_has_nothing_to_measure(tmp_path: Path) -> None:
    model = make_small_model(tmp_path)
    raw = small_recipe("int8-weight-only").model_dump(mode="json")
    raw["rules"] = [{"match": "*self_attn*", "weights": "int8"}]
    quantize_plainly(model.directory, Recipe.model_validate(raw), tmp_path / "out")
    with pytest.raises(ArtifactError, match="has no quantized routed experts") as refused:
        run_measure(tmp_path / "out", model.text, 0, silent)
    assert "nothing to measure" in str(refused.value)


def test_the_command_says_what_it_did(old: Path, text: Path, command: Callable[..., Ended]) -> None:
    words = ("measure", "--checkpoint", str(old), "--calibration", str(text), "--workers", "0")
    ended = command(*words)
    assert ended.code == 0, ended
    assert "must be built again" in ended.out
    assert json.loads(command(*words, "--json").out)["kept"] is True
    (old / "config.json").write_text("{}")
    ended = command(*words)
    assert ended.code == 2
    assert "config.json differs from what intserve.json records" in ended.err
