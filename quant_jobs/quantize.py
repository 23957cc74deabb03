"""Step 4, quantize: the driver of the job. One layer at a time; workers compute, this file decides.

    read and dequantize (the next layer meanwhile)    worker.calibrate
    forward the calibration blocks, gather statistics worker.calibrate
    merge them in block order                         here
    solve every linear, sharded over the workers      worker.smooth, worker.solve, worker.keep
    publish the packed layer, atomically              here
    carry the activations through what was published  worker.carry

Kill it anywhere and run the same command again: it goes on after the last published layer and the
output has the same bytes, whatever the number of workers then or now (`resume.py`). A worker that
dies is replaced, its blocks come back from the last boundary; only the current layer is redone.
A driver killed with SIGKILL takes a local Ray of its own with it (the kernel ends Ray's processes
with their parent, workers end with their raylet; two idle agents of Ray's take a minute longer); on
a cluster, Ray ends its workers. What such a worker may still write in its last moments are boundary
files that the next run would write with the same bytes.

The bytes depend on the source, the recipe, the calibration tokens and the versions of the tools,
all pinned in the manifest. Only the recorded output errors may differ in their last digit between
kinds of CPU.
"""

from __future__ import annotations

import importlib.metadata
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from cluster.connect import connect
from deepseek.artifact import (
    ArtifactWriter,
    CalibrationRecord,
    Manifest,
    layer_file,
    layer_keys,
    read_manifest,
    store_tensor,
)
from deepseek.checkpoint import CheckpointReader, content_digest
from deepseek.errors import IntServeError
from deepseek.files import write_json
from deepseek.inventory import layer_tensors, linears
from deepseek.manifest import MANIFEST_FILE, LayerKey
from deepseek.recipe import Recipe, load_recipe
from quant_jobs.calibrate import Statistics, coverage, merge
from quant_jobs.calibration_data import TokenBlocks, load_token_blocks
from quant_jobs.ledger import Ledger
from quant_jobs.messages import Solved, WorkerJob
from quant_jobs.pool import WorkerPool, WorkersLost
from quant_jobs.progress import Event, Progress, Step, TerminalProgress
from quant_jobs.resume import (
    FOLDER,
    REPORT_FILE,
    JobFolder,
    PublishedPart,
    boundary_files,
    check_same_run,
)
from quant_jobs.smoothquant import Smoothing, wanted_sets

#: Times that workers may die within one layer before the job gives up.
MAX_LOSSES_PER_LAYER = 3

#: Libraries whose version can change the bytes.
_TOOLS = ("intserve", "nvidia-modelopt", "torch", "transformers", "tokenizers")


@dataclass(frozen=True, slots=True)
class Job:
    """A checked job: everything that its output is made of."""

    source: CheckpointReader
    recipe: Recipe
    blocks: TokenBlocks
    output: Path

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for a rerun to continue; keys are words for the error sentence."""
        return {
            "source checkpoint": self.source.fingerprint,
            "recipe": self.recipe.model_dump(mode="json"),
            "calibration text": self.blocks.digest,
            "tools": tools(),
        }


def run_quantize(
    model: Path,
    recipe: Recipe | str,
    calibration: Path,
    output: Path,
    workers: int,
    progress: Progress | None = None,
) -> Manifest:
    """Quantize the checkpoint in `model` into `output`, or go on where a killed run stopped.

    Connects to Ray (or starts a local one) for as long as it takes. A finished output of the same
    inputs is returned as it is. `progress` None shows a progress line on stderr.

    Raises:
        IntServeError: its subclasses, for what is wrong with each input, before any work is done;
            itself when workers keep dying.
    """
    job = plan_job(model, recipe, calibration, output)
    if (done := finished(job)) is not None:
        return done
    with JobFolder(output, job.fingerprint) as folder:
        num_parts = len(layer_keys(job.source.config))
        with connect(num_cpus=workers), WorkerPool(workers) as pool:
            if progress is not None:
                return Run(job, folder, pool, progress).run()
            with TerminalProgress(num_parts) as terminal:
                return Run(job, folder, pool, terminal).run()


def plan_job(model: Path, recipe: Recipe | str, calibration: Path, output: Path) -> Job:
    """Check all inputs; reads headers and the text, no weights, and writes nothing."""
    if isinstance(recipe, str):
        recipe = load_recipe(recipe)
    source = CheckpointReader(model)
    schemes = recipe.resolve(source.config)
    for layer in range(source.config.num_hidden_layers):
        wanted_sets(source.config, schemes, layer)
    settings = recipe.calibration
    blocks = load_token_blocks(calibration, model, settings.num_blocks, settings.block_tokens)
    return Job(source, recipe, blocks, output)


def finished(job: Job) -> Manifest | None:
    """The manifest of a finished output of this very job; None where there is work to do.

    Raises:
        ArtifactError: the output is finished, but another run's.
    """
    if not (job.output / MANIFEST_FILE).exists():
        return None
    manifest = read_manifest(job.output)
    found = {
        "source checkpoint": manifest.source.fingerprint,
        "recipe": manifest.recipe.model_dump(mode="json"),
        "calibration text": manifest.calibration.digest if manifest.calibration else None,
        "tools": manifest.tools,
    }
    check_same_run(job.output, found, job.fingerprint)
    if (job.output / FOLDER).exists():  # killed between the manifest and the end
        JobFolder(job.output, job.fingerprint).remove()
    return manifest


def tools() -> dict[str, str]:
    """Versions that the output's bytes may depend on."""
    return {name: importlib.metadata.version(name) for name in _TOOLS}


@dataclass(slots=True)
class Timings:
    """The driver's own account of a run, for job_report.json."""

    seconds: dict[str, float] = field(default_factory=dict)
    layers: dict[str, float] = field(default_factory=dict)
    workers_lost: int = 0
    started: float = field(default_factory=time.monotonic)

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begun


class Run:
    """One run of a job on a pool of workers. The job's folder is locked by the caller."""

    def __init__(self, job: Job, folder: JobFolder, pool: WorkerPool, progress: Progress) -> None:
        self._job, self._folder, self._pool, self._progress = job, folder, pool, progress
        self._config = job.source.config
        self._writer = ArtifactWriter(job.output, source=job.source, recipe=job.recipe)
        self._blocks = job.blocks
        self._ready: set[int] = set()  # workers that hold what goes into the layer in hand
        self._timings = Timings()
        self._parts = folder.load_parts()
        for part in self._parts.values():
            self._writer.adopt(part.record)

    def run(self) -> Manifest:
        """Everything that is still to do, up to the manifest."""
        todo = [n for n in range(self._config.num_hidden_layers) if n not in self._parts]
        start = self._folder.last_boundary(len(self._blocks.ids), todo[0]) if todo else 0
        self._announce(todo, start)
        self._publish_untouched()  # in the driver, while the workers load their libraries
        for layer in range(start, todo[-1] + 1) if todo else ():
            self._run_layer(layer, is_last=layer == todo[-1])
        return self._finish(start)

    def _announce(self, todo: list[int], start: int) -> None:
        if len(todo) == self._config.num_hidden_layers:
            state = "from the start"
        else:
            state = f"resuming, {len(todo)} layers are left"
        detail = f"{self._job.recipe.name} on {self._pool.describe()}: {state}"
        self._progress(Event("started", start, detail=detail))

    # --- one layer, and what to do when workers die in it ---

    def _run_layer(self, layer: int, is_last: bool) -> None:
        begun, losses = time.monotonic(), 0
        while True:
            try:
                self._supply(layer)
                if layer not in self._parts:
                    self._publish_layer(layer)
                if not is_last:
                    self._carry(layer)
                break
            except WorkersLost as lost:
                losses += 1
                self._recover(layer, lost, losses)
        self._timings.layers[str(layer)] = time.monotonic() - begun

    def _recover(self, layer: int, lost: WorkersLost, losses: int) -> None:
        self._timings.workers_lost += len(lost.indices)
        if losses > MAX_LOSSES_PER_LAYER:
            raise IntServeError(
                f"workers {lost.indices} died; that makes {losses} times within layer {layer}, "
                "probably for lack of memory: run again with fewer --workers per node or more "
                "memory; the job goes on at this layer"
            )
        self._progress(Event("lost", layer, detail=f"{lost}; doing layer {layer} again"))
        self._pool.replace(lost.indices)
        self._ready -= set(lost.indices)

    def _supply(self, layer: int) -> None:
        """See to it that every worker holds what goes into this layer for its blocks."""
        new = [index for index in range(len(self._pool)) if index not in self._ready]
        if not new:
            return
        num_blocks = len(self._blocks.ids)
        job = WorkerJob(self._job.source.directory.resolve(), self._job.recipe, num_blocks)
        boundary = self._folder.boundary(layer).resolve()
        with self._timings.step("supply"):
            self._pool.each(lambda worker, _: worker.begin.remote(job), new)
            self._pool.each(
                lambda worker, i: worker.hold.remote(layer, self._ids_of(i), boundary), new
            )
        self._ready |= set(new)

    def _ids_of(self, index: int) -> dict[int, Tensor]:
        """Token ids by block, of the blocks that this worker holds: dealt out in turn."""
        blocks = range(index, len(self._blocks.ids), len(self._pool))
        return {block: self._blocks.ids[block] for block in blocks}

    # --- the steps of one layer ---

    def _publish_layer(self, layer: int) -> None:
        statistics = self._calibrate(layer)
        self._say("calibrated", layer)
        solved = self._solve(layer, statistics)
        self._say("solved", layer)
        specs = list(layer_tensors(self._config, layer))
        self._publish(layer, solved, coverage(statistics, specs))

    def _calibrate(self, layer: int) -> Statistics:
        later = range(layer + 1, self._config.num_hidden_layers)
        following = next((n for n in later if n not in self._parts), None)
        with self._timings.step("calibrate"):
            shares = self._pool.each(lambda worker, _: worker.calibrate.remote(layer, following))
            return merge(shares)

    def _solve(self, layer: int, statistics: Statistics) -> Solved:
        modules = [spec.module for spec in linears(self._config, layer)]
        with self._timings.step("solve"):
            shared = self._pool.share(statistics)
            smoothing, noted = Smoothing(), ()
            if wanted_sets(self._config, self._writer.schemes, layer):
                ((smoothing, noted),) = self._pool.each(
                    lambda worker, _: worker.smooth.remote(layer, shared), [0]
                )
            shares = self._pool.each(
                lambda worker, i: worker.solve.remote(
                    layer, modules[i :: len(self._pool)], shared, smoothing
                )
            )
            shares += self._pool.each(lambda worker, _: worker.keep.remote(layer, smoothing), [0])
        ledger, whole = Ledger(), Solved()
        ledger.extend(noted)
        for share in shares:
            whole.tensors |= share.tensors
            whole.errors |= share.errors
            ledger.extend(share.fallbacks)
            whole.source_sha256 = share.source_sha256
        whole.fallbacks = ledger.entries()
        return whole

    def _carry(self, layer: int) -> None:
        """Activations through the quantized layer; the old boundary goes once the new is safe."""
        boundary = self._folder.boundary(layer + 1)
        boundary.mkdir(exist_ok=True)
        published = (self._job.output / layer_file(layer)).resolve()
        with self._timings.step("carry"):
            files = [path.resolve() for path in boundary_files(boundary, len(self._pool))]
            self._pool.each(lambda worker, i: worker.carry.remote(layer, published, files[i]))
            self._folder.drop_boundaries(except_for=layer + 1)
        self._say("carried", layer)

    # --- publishing ---

    def _publish_untouched(self) -> None:
        """Globals and MTP layers go through by name, as the source stores them."""
        for key in layer_keys(self._config):
            untouched = key == "globals" or key >= self._config.num_hidden_layers
            if not untouched or key in self._parts:
                continue
            source = self._job.source
            found = source.read_globals() if key == "globals" else source.read_layer(key)
            tensors: dict[str, Tensor] = {}
            for tensor in found.values():
                tensors |= store_tensor(tensor, self._writer.schemes.get(tensor.spec.module))
            self._publish(key, Solved(tensors=tensors, source_sha256=content_digest(found)), ())

    def _publish(self, key: LayerKey, solved: Solved, covered: tuple[int, ...]) -> None:
        assert solved.source_sha256 is not None
        with self._timings.step("write"):
            record = self._writer.publish_layer(
                key,
                solved.tensors,
                source_sha256=solved.source_sha256,
                errors=solved.errors,
            )
            part = PublishedPart(record=record, coverage=covered, fallbacks=solved.fallbacks)
            self._folder.save_part(part)
        self._parts[key] = part
        self._say("published", key, part)

    def _finish(self, start: int) -> Manifest:
        blocks, settings = self._blocks, self._job.recipe.calibration
        ledger = Ledger()
        for part in self._parts.values():
            ledger.extend(part.fallbacks)
        self._write_report(start)
        manifest = self._writer.finish(
            calibration=CalibrationRecord(
                digest=blocks.digest,
                num_tokens=blocks.num_tokens,
                num_blocks=settings.num_blocks,
                block_tokens=settings.block_tokens,
            ),
            coverage={
                layer: list(part.coverage)
                for layer, part in self._parts.items()
                if layer != "globals" and part.coverage
            },
            fallbacks=list(ledger.entries()),
            tools=tools(),
        )
        self._folder.remove()
        self._say("finished", "globals")
        return manifest

    def _write_report(self, start: int) -> None:
        """Times and memory of this run only: no part of the artifact, for it never repeats."""
        try:
            usage = self._pool.each(lambda worker, _: worker.usage.remote(), sorted(self._ready))
        except WorkersLost:  # after their work was done: nothing but this account is lost
            usage = []
        driver_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        timings = self._timings
        write_json(
            self._job.output / REPORT_FILE,
            {
                "workers": len(self._pool),
                "started_at_layer": start,
                "workers_lost": timings.workers_lost,
                "wall_s": round(time.monotonic() - timings.started, 3),
                "driver_seconds": {k: round(v, 3) for k, v in timings.seconds.items()},
                "layer_seconds": {k: round(v, 3) for k, v in timings.layers.items()},
                "worker_seconds": [{k: round(v, 3) for k, v in u.seconds.items()} for u in usage],
                "peak_rss_bytes": {
                    "driver": driver_peak,
                    "workers": [u.peak_rss_bytes for u in usage],
                },
            },
        )

    def _say(self, step: Step, layer: LayerKey, part: PublishedPart | None = None) -> None:
        self._progress(Event(step, layer, part))
