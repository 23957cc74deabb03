"""The language model's head, where a recipe quantizes it: measured on all blocks behind the last
layer, solved by one worker, published last; whatever was killed before, the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.quantizing import (
    NUM_LAYERS,
    SmallModel,
    contents,
    flip_source_byte,
    make_small_model,
    small_recipe,
)

from deepseek.artifact.reader import ArtifactReader
from deepseek.artifact.tensors import layer_file, pop_linear
from deepseek.errors import CheckpointError
from deepseek.formats import decompress
from deepseek.recipe import Recipe
from deepseek.source.checkpoint import CheckpointReader
from quant_jobs.job.driver import Driver
from quant_jobs.job.folder import JobFolder
from quant_jobs.job.job import finished, plan_job
from quant_jobs.job.progress import Event

pytestmark = pytest.mark.heavy

EXPERTS = {"match": "*.mlp.experts.*", "weights": "int8"}
HEADS: dict[str, dict[str, Any]] = {
    "int8-a8": {"weights": "int8", "activations": "int8"},
    "int4-gptq": {"weights": "int4", "group_size": 32, "algorithm": "gptq", "clip": "mse"},
}


class Stopped(BaseException):
    """Ends a run at once, as a kill would."""


def recipe_of(head: str) -> Recipe:
    return small_recipe("int8", rules=[EXPERTS, {"match": "lm_head"} | HEADS[head]])


def quantize(
    worker: Any,
    model: SmallModel,
    recipe: Recipe,
    output: Path,
    note: Callable[[Event], None] = lambda event: None,
) -> list[Event]:
    events: list[Event] = []

    def noted(event: Event) -> None:
        events.append(event)
        note(event)

    job = plan_job(model.directory, recipe, model.text, output)
    if finished(job) is None:
        with JobFolder(output, job.fingerprint) as folder:
            Driver(job, folder, worker, noted).run()
    return events


@pytest.fixture(scope="module")
def made(
    worker: Any, model: SmallModel, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Artifacts of undisturbed jobs, by the head's format."""
    root = tmp_path_factory.mktemp("heads")
    for name in HEADS:
        quantize(worker, model, recipe_of(name), root / name)
    return {name: root / name for name in HEADS}


@pytest.mark.parametrize("name", HEADS)
def test_the_error_of_the_head_is_that_of_its_outputs_on_calibration_data(
    made: dict[str, Path], model: SmallModel, name: str
) -> None:
    """Near that on Gaussian inputs, of which rounding to nearest knows nothing; less by GPTQ."""
    artifact = ArtifactReader(made[name])
    (error,) = artifact.manifest.record("globals").errors.values()
    source = CheckpointReader(model.directory).read_globals()
    weight = source["lm_head.weight"].data.float()
    scheme = artifact.schemes["lm_head"]
    stored = pop_linear(artifact.read_globals(), "lm_head", scheme)
    restored = decompress(stored, scheme, (weight.shape[0], weight.shape[1]))
    x = torch.randn(64, weight.shape[1], generator=torch.Generator().manual_seed(1))
    y = x @ weight.T
    relative = float((x @ restored.T - y).norm() / y.norm())
    assert error < 1.5 * relative
    assert (error > 0.5 * relative) == (scheme.algorithm != "gptq"), "which has seen the inputs"
    assert (error < 0.02) == scheme.weights.startswith("int8")


def test_gptq_of_the_head_sees_its_inputs(
    made: dict[str, Path], worker: Any, model: SmallModel, tmp_path: Path
) -> None:
    """Less error than rounding to nearest in the same ranges, on the inputs that it has seen."""
    nearest = {"weights": "int4", "group_size": 32, "clip": "mse"}
    recipe = small_recipe("int8", rules=[EXPERTS, {"match": "lm_head"} | nearest])
    quantize(worker, model, recipe, tmp_path / "out")
    errors = [
        ArtifactReader(path).manifest.record("globals").errors["lm_head"]
        for path in (made["int4-gptq"], tmp_path / "out")
    ]
    assert errors[0] < 0.97 * errors[1]


def test_everything_but_the_head_is_what_it_is_without_its_rule(
    made: dict[str, Path], worker: Any, model: SmallModel, tmp_path: Path
) -> None:
    quantize(worker, model, small_recipe("int8", rules=[EXPERTS]), tmp_path / "out")
    plain, headed = contents(tmp_path / "out"), contents(made["int8-a8"])
    for layer in range(NUM_LAYERS + 1):
        assert plain[layer_file(layer)] == headed[layer_file(layer)]
    before = ArtifactReader(tmp_path / "out").read_globals()
    after = ArtifactReader(made["int8-a8"]).read_globals()
    assert before.keys() - after.keys() == set()
    assert after.keys() - before.keys() == {"lm_head.weight_scale"}
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(before[name], after[name])


@pytest.mark.parametrize(
    ("step", "layer"),
    [("carried", 0), ("carried", NUM_LAYERS - 1)],
)
def test_a_killed_job_goes_on_and_writes_the_same_bytes(
    made: dict[str, Path],
    worker: Any,
    model: SmallModel,
    tmp_path: Path,
    step: str,
    layer: int,
) -> None:
    def stop(event: Event) -> None:
        if (event.step, event.layer) == (step, layer):
            raise Stopped

    output, recipe = tmp_path / "out", recipe_of("int4-gptq")
    with pytest.raises(Stopped):
        quantize(worker, model, recipe, output, stop)
    assert not (output / layer_file("globals")).exists()
    quantize(worker, model, recipe, output)
    assert contents(output) == contents(made["int4-gptq"])


def test_lost_globals_of_a_finished_output_are_made_again(
    made: dict[str, Path], worker: Any, model: SmallModel, tmp_path: Path
) -> None:
    output, recipe = tmp_path / "out", recipe_of("int8-a8")
    quantize(worker, model, recipe, output)
    (output / layer_file("globals")).unlink()
    events = quantize(worker, model, recipe, output)
    assert not [event for event in events if event.step == "solved"], "no layer is made again"
    assert contents(output) == contents(made["int8-a8"])


def test_a_source_whose_embedding_changes_before_the_head_is_read_is_noticed(
    worker: Any, tmp_path: Path
) -> None:
    model = make_small_model(tmp_path, vocab_size=512)

    def change(event: Event) -> None:
        if (event.step, event.layer) == ("published", 0):
            flip_source_byte(model, "model.embed_tokens.weight")

    with pytest.raises(CheckpointError, match="tensor model.embed_tokens.weight of"):
        quantize(worker, model, recipe_of("int8-a8"), tmp_path / "out", change)
