"""The largest inputs of the experts that a job keeps: right, durable, and outliers found."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support.outliers import OUTLIER_EXPERT, OUTLIER_LAYER, outlier_small_model
from support.pages import check_self_contained
from support.quantizing import SmallModel, contents, small_recipe

from deepseek.artifact.input_maxima import INPUT_MAXIMA_FILE, InputMaxima
from deepseek.artifact.manifest import read_manifest
from deepseek.artifact.reader import ArtifactReader
from deepseek.errors import ArtifactError
from deepseek.files import canonical_json
from deepseek.recipe import Recipe
from quant_jobs.job.driver import Driver
from quant_jobs.job.folder import JobFolder
from quant_jobs.job.job import finished, plan_job
from quant_jobs.job.progress import Event
from quant_jobs.reports.job_report import PAGE_FILE, REPORT_FILE

pytestmark = pytest.mark.heavy

RunJob = Callable[..., Any]


class Stopped(BaseException):
    """Ends a run at once, as a kill would."""


def stop_after(layer: int) -> Callable[[Event], None]:
    def note(event: Event) -> None:
        if (event.step, event.layer) == ("published", layer):
            raise Stopped

    return note


def run(worker: Any, model: SmallModel, recipe: Recipe, output: Path) -> Path:
    job = plan_job(model.directory, recipe, model.text, output)
    with JobFolder(output, job.fingerprint) as folder:
        Driver(job, folder, worker, lambda event: None).run()
    return output


def maxima_of(output: Path) -> InputMaxima:
    maxima = ArtifactReader(output).input_maxima
    assert maxima is not None
    return maxima


@pytest.fixture(scope="module")
def outlier(worker: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of `w4a8` on the model with an outlier."""
    root = tmp_path_factory.mktemp("outlier")
    model = outlier_small_model(root)
    return run(worker, model, small_recipe("w4a8"), root / "out")


def test_static_scales_of_w4a8_are_the_largest_of_a_layers_maxima(
    worker: Any, model: SmallModel, tmp_path: Path
) -> None:
    """What the job computes on another way: `input_scale` is amax / 448 over the experts."""
    output = run(worker, model, small_recipe("w4a8"), tmp_path / "out")
    for layer, maxima in maxima_of(output).layers.items():
        with safe_open(output / f"model-layer-{layer:05d}.safetensors", framework="pt") as file:
            for role, values in (("up_proj", maxima.gate_up), ("down_proj", maxima.down)):
                stored = file.get_tensor(f"model.layers.{layer}.mlp.experts.0.{role}.input_scale")
                assert stored == torch.tensor([max(values) / 448])


def test_maxima_are_those_of_folded_inputs(
    worker: Any, model: SmallModel, whole: Path, tmp_path: Path
) -> None:
    """SmoothQuant makes inputs smaller; of the same blocks, at layer 1, which nothing precedes but
    a dense layer that `int8-weight-only` and `int8-smoothquant` round alike to 1 %."""
    plain = run(worker, model, small_recipe("int8-weight-only"), tmp_path / "plain")
    smoothed, unsmoothed = (maxima_of(output).layers[1] for output in (whole, plain))
    for kind in ("gate_up", "down"):
        pairs = zip(smoothed.of(kind), unsmoothed.of(kind), strict=True)  # type: ignore[arg-type]
        assert all(0 < small < 0.6 * large for small, large in pairs)


def test_an_expert_with_far_larger_inputs_is_found_and_shown(outlier: Path) -> None:
    (found,) = read_manifest(outlier).input_outliers
    assert (found.layer, found.input, found.expert) == (OUTLIER_LAYER, "down", OUTLIER_EXPERT)
    maxima = maxima_of(outlier).layers[OUTLIER_LAYER].down
    others = sorted(value for value in maxima if value)
    assert found.ratio == max(others) / ((others[3] + others[4]) / 2) > 40
    page = check_self_contained((outlier / PAGE_FILE).read_text("utf-8"))
    assert page.figures[:3] == ["errors", "coverage", "maxima"]
    text = " ".join(page.text)
    assert "Largest inputs of the experts" in text
    assert f"{found.ratio:.3g}" in text


def test_a_killed_job_keeps_what_it_had_measured(
    run_job: RunJob, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    for layer in (1, 2):
        with pytest.raises(Stopped):
            run_job(output, stop_after(layer))
    run_job(output)
    assert contents(output) == contents(whole)
    assert INPUT_MAXIMA_FILE in contents(output)


# What an earlier version began.


def forget_maxima(part: Path) -> None:
    """Make a record of a published layer as it was before maxima were kept."""
    raw = json.loads(part.read_text())
    del raw["digest"], raw["input_maxima"]
    raw["digest"] = hashlib.sha256(canonical_json(raw)).hexdigest()
    part.write_text(json.dumps(raw))


def forget_limit(job: Path) -> None:
    """Make the fingerprint of a job as it was before there was a limit of outliers."""
    raw = json.loads(job.read_text())
    del raw["recipe"]["gate"]["max_input_outliers"]
    job.write_text(json.dumps(raw))


def test_a_job_that_an_earlier_version_began_ends_without_maxima_and_says_so_once(
    run_job: RunJob, whole: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    with pytest.raises(Stopped):
        run_job(output, stop_after(2))
    forget_limit(output / ".job" / "job.json")
    for part in (output / ".job").glob("part-*.json"):
        forget_maxima(part)
    events: list[Event] = []
    manifest = run_job(output, events.append)
    (said,) = [event.detail for event in events if event.step == "noted"]
    assert "layer 1 was published by an earlier version" in said
    assert "`python -m quant_jobs measure` adds them" in said
    assert not manifest.has_input_maxima
    assert manifest.format_version == 3
    assert ArtifactReader(output).input_maxima is None
    lacking = contents(whole).keys() - contents(output).keys()
    assert lacking == {INPUT_MAXIMA_FILE}


def test_a_record_that_was_edited_is_still_refused(run_job: RunJob, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(Stopped):
        run_job(output, stop_after(1))
    part = output / ".job" / "part-00001.json"
    raw = json.loads(part.read_text())
    raw["input_maxima"]["down"][0] = 1.0
    part.write_text(json.dumps(raw))
    with pytest.raises(ArtifactError, match=r"part-00001\.json is damaged: it was changed after"):
        run_job(output)


# Lost from a finished output.


@pytest.mark.parametrize("how", ["deleted", "damaged"])
def test_lost_maxima_come_back_from_the_report(
    run_job: RunJob, whole: Path, tmp_path: Path, how: str
) -> None:
    output = shutil.copytree(whole, tmp_path / "out")
    path = output / INPUT_MAXIMA_FILE
    path.unlink()
    if how == "damaged":
        path.write_text("{}")
    run_job(output)
    assert contents(output) == contents(whole)


def edit_report(report: Path) -> None:
    raw = json.loads(report.read_text())
    raw["layers"][1]["input_maxima"]["down"][0] = 1.0
    report.write_text(json.dumps(raw))


SPOILT: dict[str, Callable[[Path], object]] = {
    "gone": Path.unlink,
    "edited": edit_report,
    "no JSON": lambda report: report.write_text("{"),
    "another form": lambda report: report.write_text('{"layers": {"1": 2}}'),
    "layers of something else": lambda report: report.write_text(
        '{"layers": [1, {"input_maxima": 3}]}'
    ),
    "layers that cannot be keys": lambda report: report.write_text(
        '{"layers": [{"layer": [], "input_maxima": {}}]}'
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_maxima_that_cannot_come_back_are_one_sentence_and_nothing_is_written(
    model: SmallModel, whole: Path, tmp_path: Path, case: str
) -> None:
    output = shutil.copytree(whole, tmp_path / "out")
    (output / INPUT_MAXIMA_FILE).unlink()
    SPOILT[case](output / REPORT_FILE)
    before = contents(output)
    job = plan_job(model.directory, small_recipe("int8-smoothquant"), model.text, output)
    with pytest.raises(ArtifactError) as refused:
        finished(job)
    assert str(refused.value).startswith(f"{output / INPUT_MAXIMA_FILE} is missing or damaged")
    assert f"measure --checkpoint {output} --calibration FILE" in str(refused.value)
    assert contents(output) == before


# Recipes that leave experts as they are.


def recipe_of(*rules: dict[str, object]) -> Recipe:
    raw = small_recipe("int8-weight-only").model_dump(mode="json")
    return Recipe.model_validate(raw | {"rules": [{"weights": "int8", **rule} for rule in rules]})


def test_a_recipe_without_quantized_experts_keeps_none(
    worker: Any, model: SmallModel, tmp_path: Path
) -> None:
    output = run(worker, model, recipe_of({"match": "*self_attn*"}), tmp_path / "out")
    assert not (output / INPUT_MAXIMA_FILE).exists()
    assert ArtifactReader(output).input_maxima is None
    record = json.loads((output / REPORT_FILE).read_text())
    assert all(layer["input_maxima"] is None for layer in record["layers"])


@pytest.fixture(scope="module")
def every(worker: Any, model: SmallModel, tmp_path_factory: pytest.TempPathFactory) -> InputMaxima:
    """The maxima of a job that quantizes all experts and nothing else."""
    output = tmp_path_factory.mktemp("every") / "out"
    return maxima_of(run(worker, model, recipe_of({"match": "*mlp.experts.*"}), output))


@pytest.mark.parametrize("match", ["model.layers.1.mlp.experts.*", "*experts.3.gate_proj"])
def test_where_some_experts_are_quantized_all_are_measured(
    worker: Any, model: SmallModel, every: InputMaxima, tmp_path: Path, match: str
) -> None:
    """Layer 1 has the same inputs whatever happens to its own experts."""
    maxima = maxima_of(run(worker, model, recipe_of({"match": match}), tmp_path / "out"))
    assert maxima.layers[1] == every.layers[1]
    assert all(maxima.layers[2].down)
