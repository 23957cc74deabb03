"""The quantize job on a real Ray: the same bytes for any number of workers and after any kill."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.jobs import driver_command, kill_driver_when, without_ray_address
from support.quantizing import (
    NUM_LAYERS,
    SmallModel,
    changed_model,
    contents,
    make_small_model,
    small_recipe,
    starve_expert,
)
from support.synthetic import V3_2, write_checkpoint

from cluster.connect import connect
from deepseek.artifact.reader import ArtifactReader
from deepseek.artifact.tensors import layer_file
from deepseek.errors import ArtifactError, CheckpointError, IntServeError, OutputError, RecipeError
from deepseek.formats import decompress
from deepseek.recipe import Recipe
from deepseek.source.checkpoint import CheckpointReader
from quant_jobs.algorithms.linear import modelopt_quantizer
from quant_jobs.job.driver import Driver
from quant_jobs.job.folder import JobFolder
from quant_jobs.job.job import finished, plan_job, tools
from quant_jobs.job.progress import Event, Step
from quant_jobs.quantize import run_quantize
from quant_jobs.reports.job_report import REPORT_FILE
from quant_jobs.workers.in_process import InProcessWorker
from quant_jobs.workers.messages import SolveSummary, WorkerUsage
from quant_jobs.workers.pool import WorkerPool
from quant_jobs.workers.protocol import Workers, WorkersLost

pytestmark = pytest.mark.ray

#: Every algorithm and every format.
RECIPES = (
    *("int8", "int4", "int4-all", "int8-smoothquant", "int8-asym", "int4-asym"),
    *("int4-gptq", "int4-all-awq", "w4a8", "int4-a8"),
)


class Stopped(BaseException):
    """Ends a run at once, as a kill would: nothing catches it."""


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    with connect(num_cpus=16):
        yield


@pytest.fixture(scope="module")
def three(ray_here: None) -> Iterator[WorkerPool]:
    with WorkerPool(3) as pool:
        yield pool


@pytest.fixture(scope="module")
def in_process(three: WorkerPool) -> Iterator[InProcessWorker]:
    """Depends on `three`, whose processes load their libraries at the same time."""
    with InProcessWorker() as worker:
        yield worker


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return make_small_model(tmp_path_factory.mktemp("small"))


def quantize(
    small: SmallModel, recipe: Recipe, output: Path, pool: Workers, *stops: Event
) -> list[Event]:
    """Run the job on a warm pool; stop at the first event with step and layer of one of `stops`."""
    events: list[Event] = []

    def note(event: Event) -> None:
        events.append(event)
        if any((event.step, event.layer) == (stop.step, stop.layer) for stop in stops):
            raise Stopped

    job = plan_job(small.directory, recipe, small.text, output)
    assert finished(job) is None
    with JobFolder(output, job.fingerprint) as folder:
        Driver(job, folder, pool, note).run()
    return events


@pytest.fixture(scope="module")
def whole(
    small: SmallModel, in_process: InProcessWorker, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Outputs of uninterrupted runs on one worker, by recipe."""
    outputs = {name: tmp_path_factory.mktemp(name) / "out" for name in RECIPES}
    for name, output in outputs.items():
        quantize(small, small_recipe(name), output, in_process)
    return outputs


@pytest.mark.parametrize("name", RECIPES)
def test_three_workers_write_the_bytes_of_one(
    small: SmallModel, whole: dict[str, Path], three: WorkerPool, tmp_path: Path, name: str
) -> None:
    quantize(small, small_recipe(name), tmp_path / "out", three)
    assert contents(tmp_path / "out") == contents(whole[name])


def test_a_model_with_an_indexer_gives_the_same_bytes_stopped_and_resumed_on_three_workers(
    in_process: InProcessWorker, three: WorkerPool, tmp_path: Path
) -> None:
    model, recipe = make_small_model(tmp_path, **V3_2), small_recipe("int8-smoothquant")
    quantize(model, recipe, tmp_path / "one", in_process)
    with pytest.raises(Stopped):
        quantize(model, recipe, tmp_path / "three", three, Event("published", 1))
    quantize(model, recipe, tmp_path / "three", three)
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


@pytest.mark.parametrize("wave_blocks", [1, 2])
def test_blocks_in_small_waves_give_the_same_bytes(
    small: SmallModel,
    whole: dict[str, Path],
    three: WorkerPool,
    tmp_path: Path,
    wave_blocks: int,
) -> None:
    """In a wave of one or two blocks, of three workers some have none."""
    recipe, output = small_recipe("int4-gptq"), tmp_path / "out"
    assert recipe.calibration.num_blocks > wave_blocks
    job = plan_job(small.directory, recipe, small.text, output)
    with JobFolder(output, job.fingerprint) as folder:
        Driver(job, folder, three, lambda event: None, wave_blocks).run()
    assert contents(output) == contents(whole["int4-gptq"])


def test_stopped_after_every_step_and_resumed_it_writes_the_same_bytes(
    small: SmallModel,
    whole: dict[str, Path],
    in_process: InProcessWorker,
    three: WorkerPool,
    tmp_path: Path,
) -> None:
    """One output, stopped again and again, by runs on one and on three workers in turn."""
    recipe, output = small_recipe("int8-smoothquant"), tmp_path / "out"
    stops = [Event("started", 0), Event("published", NUM_LAYERS), Event("published", "globals")]
    for layer in range(NUM_LAYERS):
        steps: list[Step] = ["calibrated", "solved", "carried", "published"]
        if layer == NUM_LAYERS - 1:
            steps.remove("carried")
        stops += [Event(step, layer) for step in steps]
    for number, stop in enumerate(stops):
        with pytest.raises(Stopped):
            quantize(small, recipe, output, (in_process, three)[number % 2], stop)
        assert not (output / "intserve.json").exists()
    assert len(list((output / ".job").glob("boundary-*"))) == 1
    events = quantize(small, recipe, output, in_process)
    assert [event.step for event in events] == ["started", "finished"]  # all layers were published
    assert contents(output) == contents(whole["int8-smoothquant"])


def test_a_resumed_run_repeats_no_published_layer(
    small: SmallModel, three: WorkerPool, tmp_path: Path
) -> None:
    recipe, output = small_recipe("int8"), tmp_path / "out"
    with pytest.raises(Stopped):
        quantize(small, recipe, output, three, Event("published", 1))
    events = quantize(small, recipe, output, three)
    steps = [(event.step, event.layer) for event in events]
    last = [("calibrated", 2), ("solved", 2), ("published", 2), ("finished", "globals")]
    assert steps == [("started", 2), *last]

    shutil.rmtree(output)
    with pytest.raises(Stopped):
        quantize(small, recipe, output, three, Event("published", 1))
    shutil.rmtree(output / ".job" / "boundary-00002")
    events = quantize(small, recipe, output, three)
    steps = [(event.step, event.layer) for event in events]
    assert steps == [("started", 1), ("carried", 1), *last]  # layer 1 runs again, as published


def test_a_worker_killed_in_any_layer_costs_that_layer_only(
    small: SmallModel, whole: dict[str, Path], three: WorkerPool, tmp_path: Path
) -> None:
    kills = [("calibrated", 1, 2), ("published", 1, 0)]
    steps: list[tuple[str, object]] = []

    def kill(event: Event) -> None:
        steps.append((event.step, event.layer))
        for step, layer, index in kills:
            if (event.step, event.layer) == (step, layer) and steps.count((step, layer)) == 1:
                (usage,) = three.each(lambda worker, _: worker.usage.remote(), [index])
                assert isinstance(usage, WorkerUsage)
                os.kill(usage.pid, signal.SIGKILL)

    recipe, output = small_recipe("int4-all"), tmp_path / "out"
    job = plan_job(small.directory, recipe, small.text, output)
    with JobFolder(output, job.fingerprint) as folder:
        Driver(job, folder, three, kill).run()
    assert contents(output) == contents(whole["int4-all"])
    assert steps.count(("calibrated", 0)) == steps.count(("published", 1)) == 1
    assert steps.count(("calibrated", 1)) == 2  # died before it was solved: the layer again
    assert steps.count(("calibrated", 2)) == 2  # died as it began, after layer 1 was durable
    assert [layer for step, layer in steps if step == "lost"] == [1, 2]
    assert json.loads((output / REPORT_FILE).read_text())["workers_lost"] == 2


def test_workers_that_keep_dying_end_the_job_with_a_sentence(
    small: SmallModel, whole: dict[str, Path], in_process: InProcessWorker, tmp_path: Path
) -> None:
    class Dying:
        """A pool whose worker dies in every solve, and so does its replacement."""

        def __init__(self, pool: Workers) -> None:
            self._pool, self.replaced = pool, 0

        def __len__(self) -> int:
            return len(self._pool)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._pool, name)

        def each(self, call: Callable[..., Any], indices: Any = None) -> list[Any]:
            results = self._pool.each(call, indices)
            if results and isinstance(results[0], SolveSummary):
                raise WorkersLost
            return results

        def recover(self) -> list[int]:
            self.replaced += 1
            return [0]

    dying = Dying(in_process)
    job = plan_job(small.directory, small_recipe("int8"), small.text, tmp_path / "out")
    with (
        JobFolder(tmp_path / "out", job.fingerprint) as folder,
        pytest.raises(IntServeError, match=r"workers \[0\] died.*layer 0.*fewer --workers"),
    ):
        Driver(job, folder, dying, lambda event: None).run()  # type: ignore[arg-type]
    assert dying.replaced == 4
    quantize(small, small_recipe("int8"), tmp_path / "out", in_process)
    assert contents(tmp_path / "out") == contents(whole["int8"])


def test_a_driver_killed_with_its_own_ray_leaves_no_process_and_resumes(
    small: SmallModel,
    whole: dict[str, Path],
    in_process: InProcessWorker,
    tmp_path: Path,
    root: Path,
) -> None:
    output = tmp_path / "out"
    kill_driver_when(output / ".job" / "part-00000.json", small, "int8", output, tmp_path, root)
    quantize(small, small_recipe("int8"), output, in_process)
    assert contents(output) == contents(whole["int8"])


@pytest.mark.slow
@pytest.mark.parametrize("step", ["calibrated", "solved", "published"])
def test_a_worker_killed_at_every_step_of_every_layer_changes_no_byte(
    small: SmallModel, whole: dict[str, Path], three: WorkerPool, tmp_path: Path, step: str
) -> None:
    killed: set[object] = set()

    def kill(event: Event) -> None:
        if event.step == step and event.layer in range(NUM_LAYERS) and event.layer not in killed:
            killed.add(event.layer)
            (usage,) = three.each(lambda worker, _: worker.usage.remote(), [len(killed) % 3])
            os.kill(usage.pid, signal.SIGKILL)

    output = tmp_path / "out"
    job = plan_job(small.directory, small_recipe("int8-smoothquant"), small.text, output)
    with JobFolder(output, job.fingerprint) as folder:
        Driver(job, folder, three, kill).run()
    assert killed == set(range(NUM_LAYERS))
    assert contents(output) == contents(whole["int8-smoothquant"])


@pytest.mark.slow
def test_a_driver_killed_after_each_layer_in_turn_writes_the_same_bytes(
    small: SmallModel, whole: dict[str, Path], tmp_path: Path, root: Path
) -> None:
    output = tmp_path / "out"
    for layer in range(NUM_LAYERS):
        published = output / ".job" / f"part-{layer:05d}.json"
        kill_driver_when(published, small, "int8-smoothquant", output, tmp_path, root)
    command = driver_command(small, "int8-smoothquant", output, tmp_path, workers=2)
    subprocess.run(command, cwd=root, env=without_ray_address(), check=True, timeout=240)
    assert contents(output) == contents(whole["int8-smoothquant"])


def test_a_finished_output_is_returned_and_another_runs_is_refused(
    small: SmallModel, whole: dict[str, Path], ray_here: None, tmp_path: Path
) -> None:
    before = contents(whole["int8"])

    def again(recipe: Recipe, text: Path = small.text) -> str:
        # A run that is refused or finished starts neither Ray nor workers.
        return run_quantize(small.directory, recipe, text, whole["int8"], 1).digest

    assert again(small_recipe("int8")) == ArtifactReader(whole["int8"]).digest
    with pytest.raises(ArtifactError, match="holds a run of recipe int8, not int4-all; choose"):
        again(small_recipe("int4-all"))
    with pytest.raises(ArtifactError, match="whose rules or settings have changed since"):
        again(small_recipe("int8", kv_cache="int8"))
    text = tmp_path / "other.txt"
    text.write_text("w3 " * 600)
    with pytest.raises(ArtifactError, match="with another calibration text"):
        again(small_recipe("int8"), text)
    assert contents(whole["int8"]) == before


def test_killed_between_manifest_and_cleanup_the_rerun_cleans_up(
    small: SmallModel, three: WorkerPool, tmp_path: Path
) -> None:
    recipe, output = small_recipe("int8"), tmp_path / "out"
    job = plan_job(small.directory, recipe, small.text, output)
    with pytest.raises(Stopped):
        quantize(small, recipe, output, three, Event("carried", 1))
    leftover = {path.name: path.read_bytes() for path in (output / ".job").glob("*.json")}
    quantize(small, recipe, output, three)
    (output / ".job").mkdir()
    for name, content in leftover.items():
        (output / ".job" / name).write_bytes(content)
    assert finished(job) == ArtifactReader(output).manifest
    assert not (output / ".job").exists()


def test_a_flipped_byte_in_a_published_layer_is_refused_and_deleting_it_repairs_the_run(
    small: SmallModel, whole: dict[str, Path], three: WorkerPool, tmp_path: Path
) -> None:
    recipe, output = small_recipe("int8"), tmp_path / "out"
    with pytest.raises(Stopped):
        quantize(small, recipe, output, three, Event("published", 2))
    path = output / layer_file(0)
    content = bytearray(path.read_bytes())
    content[-5] ^= 16
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"{path.name} is damaged: tensor model.layers.0"):
        quantize(small, recipe, output, three)
    path.unlink()
    quantize(small, recipe, output, three)
    assert contents(output) == contents(whole["int8"])


def test_the_manifest_says_what_was_done(small: SmallModel, whole: dict[str, Path]) -> None:
    reader = ArtifactReader(whole["int8"])
    manifest, config = reader.manifest, small.config
    assert manifest.calibration is not None
    assert manifest.calibration.num_tokens == 4 * 48
    assert manifest.tools == tools()
    assert sorted(manifest.coverage) == [1, 2]
    for counts in manifest.coverage.values():
        assert len(counts) == config.n_routed_experts
        assert sum(counts) == 4 * 48 * config.num_experts_per_tok
    assert manifest.fallbacks == ()
    quantized = {name for name, scheme in reader.schemes.items() if scheme.is_quantized}
    recorded = {name for record in manifest.layers for name in record.errors}
    assert recorded == quantized
    for record in manifest.layers:
        assert all(0.001 < error < 0.05 for error in record.errors.values()), record.errors


def test_a_starved_expert_is_in_the_coverage_and_a_counted_fallback_of_smoothing(
    small: SmallModel, three: WorkerPool, tmp_path: Path
) -> None:
    starving = starve_expert(small, tmp_path, layer=2, expert=5)
    quantize(starving, small_recipe("int8-smoothquant"), tmp_path / "out", three)
    manifest = ArtifactReader(tmp_path / "out").manifest
    assert manifest.coverage[2][5] == 0
    assert min(manifest.coverage[1]) > 0
    noted = [(entry.kind, entry.layer, entry.module, entry.count) for entry in manifest.fallbacks]
    assert ("unseen_expert", 2, "model.layers.2.mlp.experts.5.down_proj", 1) in noted
    assert {kind for kind, *_ in noted} == {"unseen_expert"}


@pytest.mark.parametrize("module", ["self_attn.kv_a_layernorm", "mlp.experts.5.up_proj"])
def test_a_source_with_nan_is_refused_by_name_whichever_worker_reads_it(
    small: SmallModel,
    three: WorkerPool,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    module: str,
) -> None:
    name = f"model.layers.1.{module}.weight"

    def damage(stored: dict[str, torch.Tensor]) -> None:
        stored[name].view(-1)[3] = float("nan")

    damaged = changed_model(small, tmp_path / "damaged", damage)
    with pytest.raises(CheckpointError, match=rf"tensor {name} holds NaN at \[.*3\]"):
        quantize(damaged, small_recipe("int8"), tmp_path / "out", three)
    assert not (tmp_path / "out" / layer_file(1)).exists()
    assert "Traceback" not in capfd.readouterr().err, "one sentence, not one per worker"


def test_a_damaged_weight_that_nothing_computes_with_is_refused_by_name(
    small: SmallModel, in_process: InProcessWorker, tmp_path: Path
) -> None:
    last = small.config.num_hidden_layers - 1

    def damage(stored: dict[str, torch.Tensor]) -> None:
        weight = stored[f"model.layers.{last}.mlp.shared_experts.down_proj.weight"]
        weight.view(torch.uint8)[3, 3] = 0x7F  # e4m3's NaN

    damaged = changed_model(small, tmp_path / "damaged", damage)
    with pytest.raises(CheckpointError, match=r"shared_experts.down_proj.weight holds NaN at"):
        quantize(damaged, small_recipe("int4"), tmp_path / "out", in_process)


def test_a_bf16_source_keeps_what_the_recipe_does_not_name(
    small: SmallModel, in_process: InProcessWorker, tmp_path: Path
) -> None:
    directory = tmp_path / "bf16"
    write_checkpoint(directory, layers=2, fp8=False)
    shutil.copy(small.directory / "tokenizer.json", directory)
    quantize(SmallModel(directory, small.text), small_recipe("int4"), tmp_path / "out", in_process)
    source, reader = CheckpointReader(directory), ArtifactReader(tmp_path / "out")
    before, after = source.read_layer(1), reader.read_layer(1)
    for module in ("self_attn.q_b_proj", "mlp.shared_experts.down_proj"):
        name = f"model.layers.1.{module}.weight"
        assert torch.equal(after[name], before[name].data)
    assert "model.layers.1.mlp.experts.0.up_proj.weight_packed" in after
    errors = reader.manifest.record(1).errors
    assert {name.split(".")[4] for name in errors} == {"experts"}


def test_more_workers_than_the_cluster_has_cpus_end_with_a_sentence(ray_here: None) -> None:
    with WorkerPool(17, start_timeout_s=0.2) as pool:
        assert pool.describe() == "17 workers (waiting for nodes: the cluster has 16 CPUs)"
        with pytest.raises(IntServeError, match=r"none of 17 workers started .*16 CPUs.*add nodes"):
            pool.each(lambda worker, _: worker.usage.remote(), [3])


@pytest.mark.parametrize(("name", "attributes"), [("int8", {"num_bits": 8, "axis": 0})])
def test_the_published_weights_are_modelopts_fake_quantization(
    small: SmallModel, whole: dict[str, Path], name: str, attributes: dict[str, int]
) -> None:
    source, reader = CheckpointReader(small.directory), ArtifactReader(whole[name])
    stored = reader.read_layer(1)
    for module in ("self_attn.kv_b_proj", "mlp.experts.3.down_proj"):
        full = f"model.layers.1.{module}"
        weight = source.read_layer(1)[f"{full}.weight"].dequantize()
        tensors = {key: stored[f"{full}.{key}"] for key in ("weight", "weight_scale")}
        restored = decompress(tensors, reader.schemes[full], (weight.shape[0], weight.shape[1]))
        quantizer = modelopt_quantizer(**attributes)
        quantizer.amax = weight.abs().amax(dim=1, keepdim=True)
        step = quantizer.amax / 127
        steps = weight / step
        tie = (steps - steps.floor() - 0.5).abs() < 1e-4  # see test_linear.py
        expected = quantizer(weight)
        assert ((restored - expected).abs()[~tie] < 1e-6).all()
        assert ((restored - expected).abs() <= 1.001 * step).all()


def test_a_users_mistake_is_refused_before_anything_is_written(
    small: SmallModel, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    partly = small_recipe("int8-smoothquant").model_dump(mode="json")
    partly["rules"].append({"match": "*q_a_proj", "weights": "int8"})
    with pytest.raises(RecipeError, match="q_a_proj and .*kv_a_proj_with_mqa share one smoothing"):
        run_quantize(
            small.directory, Recipe.model_validate(partly), small.text, output, 1, lambda _: None
        )
    with pytest.raises(OutputError, match="is the source checkpoint itself"):
        run_quantize(small.directory, small_recipe("int8"), small.text, small.directory, 1)
    assert not output.exists()
