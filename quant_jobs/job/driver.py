"""The driver of a quantize job: schedules one layer after the other. Workers compute; it does not.

`layer_steps.py` has the steps of one layer. This file decides what is left to do, which worker
holds which calibration blocks, when a layer counts as published, and what happens when workers die.
Called by `quantize.py`.

While layer N is being written (weights and boundary), layer N+1 is read and its attention runs.
Layer N is durable before N+1 is solved. A killed job resumes with the same command after the last
published layer and writes the same bytes, whatever the number of workers before and after
(`folder.py`); of a finished output it makes again what is lost (`restore.py`). Dead workers are
replaced, or the job continues without them; their blocks are loaded from the last boundary, and at
most one layer is redone.

When a driver with a local Ray is killed with SIGKILL, the kernel kills Ray's processes with their
parent, and workers exit with their raylet; two idle Ray agents exit a minute later. On a cluster,
Ray kills the workers. Until then such a worker may write boundary files; the next run would write
the same bytes.

The bytes depend on the source, the recipe, the calibration tokens, the device
(`workers/devices.py`) and the tool versions, all pinned in the manifest. Only the recorded output
errors may differ in their last digit between CPU models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deepseek.artifact.input_maxima import InputMaxima, quantizes_experts
from deepseek.artifact.manifest import MANIFEST_FILE, LayerKey, Manifest, read_manifest
from deepseek.artifact.tensors import layer_file, layer_keys, store_tensor
from deepseek.artifact.writer import ArtifactWriter
from deepseek.errors import IntServeError
from deepseek.inventory import HEAD
from deepseek.source.checkpoint import content_digest
from quant_jobs.algorithms.ledger import Ledger
from quant_jobs.job.account import Timings, make_record
from quant_jobs.job.experts import join_maxima, layer_coverage, layer_maxima
from quant_jobs.job.folder import JobFolder, PublishedFile
from quant_jobs.job.job import Job, tools
from quant_jobs.job.layer_steps import LayerSteps, Solution
from quant_jobs.job.progress import Event, Progress, Step
from quant_jobs.job.restore import check_remade, lost_maxima, published_files
from quant_jobs.job.source_watch import SourceWatch
from quant_jobs.job.space import check_room
from quant_jobs.reports.job_report import write_job_report
from quant_jobs.workers.messages import SolveSummary, WorkerJob
from quant_jobs.workers.protocol import Workers, WorkersLost

#: Number of times that workers may die within one layer before the job fails.
MAX_LOSSES_PER_LAYER = 3


@dataclass(slots=True)
class _WritingLayer:
    """A layer whose file a worker is writing. `record` is a reference to its LayerRecord."""

    layer: int
    record: Any
    summary: SolveSummary


@dataclass(slots=True)
class _StoringBoundary:
    """The boundary of `layer` that workers are storing. `files` has one reference per file."""

    layer: int
    files: list[Any]


class Driver:
    """One run of a job on a pool of workers. The caller holds the lock of the job's folder.

    `wave_blocks` is the number of calibration blocks per wave; None chooses it by the number of
    workers. The bytes do not depend on it.
    """

    def __init__(
        self,
        job: Job,
        folder: JobFolder,
        pool: Workers,
        progress: Progress,
        wave_blocks: int | None = None,
    ) -> None:
        self._job, self._folder, self._pool, self._progress = job, folder, pool, progress
        self._config = job.source.config
        self._writer = ArtifactWriter(job.output, source=job.source, recipe=job.recipe)
        self._steps = LayerSteps(self._config, job.recipe, self._writer.schemes, pool, wave_blocks)
        self._blocks = job.blocks
        self._blocks_by_slot: dict[int, tuple[int, ...]] = {}  # calibration blocks of each worker
        self._writing: _WritingLayer | None = None
        self._storing: _StoringBoundary | None = None
        self._timings = Timings()
        #: The manifest of a finished output that has lost files, which this run makes again.
        self._finished: Manifest | None = None
        self._recorded: dict[LayerKey, PublishedFile] = {}
        self._lost_maxima: bytes | None = None  # of that output
        if (job.output / MANIFEST_FILE).exists():
            self._finished = read_manifest(job.output)
            self._lost_maxima = lost_maxima(job.output, self._finished)
            self._recorded = published_files(self._finished)
            for file in self._recorded.values():
                folder.save_published(file)
        #: Whether the recipe quantizes the head, so that the globals are published last.
        self._has_head = HEAD in self._writer.schemes
        self._keeps_maxima = quantizes_experts(self._config, self._writer.schemes)
        self._watch = SourceWatch(job, folder, self._recorded)
        self._published = folder.load_published(forget_damaged=self._finished is not None)
        for file in self._published.values():
            self._writer.register(file.record, verify=False)  # load_published has verified it

    def run(self) -> Manifest:
        """Run all remaining layers and write the manifest. Of a finished output only what it has
        lost is made again.

        Raises:
            ArtifactError: a boundary file is damaged, or a lost layer cannot be made again.
            CheckpointError: a weight cannot be represented, an activation is not finite, or the
                source has changed since this job first read it.
            OutputError: a file cannot be written, or there is no room for what is left.
            IntServeError: workers die too often, or none is left.
        """
        todo = [n for n in range(self._config.num_hidden_layers) if n not in self._published]
        layers_left = len(todo)
        if self._has_head and "globals" not in self._published:
            todo.append(self._config.num_hidden_layers)  # where the head's inputs are
        start = self._folder.last_boundary(len(self._blocks.ids), todo[0]) if todo else 0
        missing = [key for key in layer_keys(self._config) if key not in self._published]
        layers = range(start, todo[-1] + 1) if todo else range(0)
        check_room(self._job, self._folder, self._writer.schemes, missing, layers)
        self._announce(layers_left, start)
        self._publish_unquantized()  # in the driver, while the workers load their libraries
        if todo:
            self._run_layers(start, todo[-1])
        return self._finish(start)

    def _announce(self, left: int, start: int) -> None:
        """`left` layers are to be quantized."""
        if self._finished is not None:
            state = f"making lost files of a finished output again, {left} layers among them"
        elif left == self._config.num_hidden_layers:
            state = "from the start"
        else:
            state = f"resuming, {left} layers are left"
        detail = f"{self._job.recipe.name} on {self._pool.describe()}: {state}"
        done = len(self._published)
        self._progress(Event("started", start, detail=detail, done=done, left=left))

    # --- layer after layer, and what to do when workers die ---

    def _run_layers(self, start: int, last: int) -> None:
        layer, losses = start, 0
        while layer <= last:
            try:
                self._run_layer(layer, is_last=layer == last)
                if layer == last:
                    self._await_files()
                layer, losses = layer + 1, 0
            except WorkersLost:
                losses += 1
                layer = self._recover(layer, losses)

    def _run_layer(self, layer: int, is_last: bool) -> None:
        if self._pool.admit():
            self._await_files()  # `begin` discards what a worker has not stored
            self._blocks_by_slot.clear()
            self._progress(Event("joined", layer, detail=f"now on {self._pool.describe()}"))
        self._load_boundary(layer)
        if layer == self._config.num_hidden_layers:
            self._solve_head()
            return
        if layer in self._published:
            self._await_files()
            self._folder.delete_boundaries(before=layer)
            if not is_last:
                with self._timings.step(layer, "carry"):
                    published = (self._job.output / layer_file(layer)).resolve()
                    self._steps.use_published(layer, published)
                    self._carry(layer)
            return
        solution = self._solve(layer)
        if not is_last:
            with self._timings.step(layer, "carry"):
                self._steps.use_solved(layer, solution)
                self._carry(layer)

    def _recover(self, layer: int, losses: int) -> int:
        """Replace dead workers and return the layer to continue with: this one, or the one before
        where its file or its output boundary is not durable."""
        lost = self._pool.recover()
        self._timings.workers_lost += len(lost)
        if losses > MAX_LOSSES_PER_LAYER:
            raise IntServeError(
                f"workers {lost} died; that makes {losses} times within layer {layer}, "
                "probably for lack of memory: run again with fewer --workers per node or more "
                "memory; the job goes on at this layer"
            )
        self._blocks_by_slot.clear()
        if self._writing is not None and not self._is_durable(self._await_writing):
            layer = min(layer, self._writing.layer)
        if self._storing is not None and not self._is_durable(self._await_storing):
            layer = min(layer, self._storing.layer - 1)
        self._writing = self._storing = None
        self._progress(
            Event("lost", layer, detail=f"lost workers {lost}; doing layer {layer} again on "
                  f"{self._pool.describe()}")
        )  # fmt: skip
        return layer

    @staticmethod
    def _is_durable(wait: Callable[[], None]) -> bool:
        try:
            wait()
        except WorkersLost:
            return False
        return True

    def _load_boundary(self, layer: int) -> None:
        """Give every worker the inputs of this layer for its blocks, where it lacks them."""
        slots = self._pool.slots
        due = {slot: tuple(self._steps.blocks_of(i)) for i, slot in enumerate(slots)}
        new = [i for i, slot in enumerate(slots) if self._blocks_by_slot.get(slot) != due[slot]]
        if not new:
            return
        job = WorkerJob(
            self._job.source.directory.resolve(),
            self._job.output.resolve(),
            self._job.recipe,
            len(self._blocks.ids),
            self._job.device,
        )
        boundary = self._folder.boundary(layer).resolve()

        def ids(index: int) -> dict[int, Tensor]:
            return {block: self._blocks.ids[block] for block in self._steps.blocks_of(index)}

        with self._timings.step(layer, "supply"):
            if layer == 0:
                self._watch.check_embedding(self._published.get("globals"))
            self._pool.each(lambda worker, _: worker.begin.remote(job), new)
            self._pool.each(
                lambda worker, i: worker.load_boundary.remote(layer, ids(i), boundary), new
            )
        self._blocks_by_slot = due

    # --- the steps of one layer ---

    def _solve(self, layer: int) -> Solution:
        later = range(layer + 1, self._config.num_hidden_layers)
        following = next((n for n in later if n not in self._published), None)
        ledger = Ledger()
        with self._timings.step(layer, "attend"):
            received = self._steps.attend(layer, following)
        self._report("calibrated", layer)
        # Layer N-1 becomes durable before N is solved, so that a death costs one layer, not two.
        self._await_files()
        with self._timings.step(layer, "solve"):
            shared = self._steps.shared_smoothing(layer, received, ledger)
            solution = self._steps.solve(layer, shared, received, ledger)
        self._watch.check_layer(layer, solution.summary.source_digests, solution.source_sha256)
        self._report("solved", layer)
        record = self._steps.write(layer, solution)
        self._writing = _WritingLayer(layer, record, solution.summary)
        return solution

    def _solve_head(self) -> None:
        """Quantize the head by the outputs of the last layer, and publish the globals."""
        self._await_files()
        with self._timings.step("globals", "solve"):
            record, summary = self._steps.solve_head()
        self._watch.check_globals(summary.source_digests, record.source_sha256)
        self._writer.register(record, verify=False)
        self._register(PublishedFile(record=record, fallbacks=summary.fallbacks))

    def _carry(self, layer: int) -> None:
        """Run the blocks through the quantized layer and start storing the next boundary."""
        boundary = self._folder.make_boundary(layer + 1)
        self._storing = _StoringBoundary(layer + 1, [])
        self._steps.carry(layer, boundary.resolve(), self._storing.files)
        self._report("carried", layer)

    def _await_files(self) -> None:
        self._await_writing()
        self._await_storing()

    def _await_storing(self) -> None:
        """Wait until the boundary in progress is stored."""
        storing = self._storing
        if storing is None:
            return
        with self._timings.step(storing.layer - 1, "write"):
            self._pool.gather(storing.files)
        self._storing = None

    def _await_writing(self) -> None:
        """Wait until the layer in progress is written, and publish it."""
        writing = self._writing
        if writing is None:
            return
        with self._timings.step(writing.layer, "write"):
            (record,) = self._pool.gather([writing.record])
        self._writer.register(record, verify=False)
        summary = writing.summary
        self._register(
            PublishedFile(
                record=record,
                coverage=layer_coverage(self._config, writing.layer, summary),
                fallbacks=summary.fallbacks,
                kv_latent_amax=summary.kv_latent_amax,
                input_maxima=(
                    layer_maxima(self._config, writing.layer, summary)
                    if self._keeps_maxima
                    else None
                ),
            )
        )
        self._writing = None

    # --- publishing ---

    def _publish_unquantized(self) -> None:
        """Publish MTP layers, and globals without a head to quantize, as the source stores them.
        Runs in the driver."""
        for key in layer_keys(self._config):
            is_quantized = (
                self._has_head if key == "globals" else key < self._config.num_hidden_layers
            )
            if is_quantized or key in self._published:
                continue
            source = self._job.source
            with self._timings.step(key, "write"):
                stored = source.read_globals() if key == "globals" else source.read_layer(key)
                tensors: dict[str, Tensor] = {}
                for tensor in stored.values():
                    tensors |= store_tensor(tensor, self._writer.schemes.get(tensor.spec.module))
                digest = content_digest(stored)
                self._watch.check_recorded(key, digest)
                record = self._writer.publish_layer(key, tensors, source_sha256=digest)
            self._timings.bytes_read += sum(tensor.num_bytes for tensor in stored.values())
            self._timings.bytes_written += record.num_bytes
            self._register(PublishedFile(record=record))

    def _register(self, file: PublishedFile) -> None:
        """Record the file as published, and delete the boundaries of the layers before it."""
        key = file.record.layer
        if (recorded := self._recorded.get(key)) is not None:
            check_remade(self._job.output, file, recorded)
            file = recorded
            self._writer.register(file.record, verify=False)
        self._folder.save_published(file)
        self._published[key] = file
        if key != "globals" and key < self._config.num_hidden_layers:
            self._folder.delete_boundaries(before=key)
        self._report("published", key, file)

    def _finish(self, start: int) -> Manifest:
        if self._finished is not None:
            self._writer.restore_files(self._finished, self._lost_maxima)
            self._folder.remove()
            self._report("finished", "globals")
            return self._finished
        ledger = Ledger()
        for file in self._published.values():
            ledger.extend(file.fallbacks)
        self._write_report(start, ledger)
        layers = {key: file for key, file in self._published.items() if key != "globals"}
        manifest = self._writer.finish(
            calibration=self._job.calibration,
            coverage={key: list(file.coverage) for key, file in layers.items() if file.coverage},
            fallbacks=list(ledger.entries()),
            tools=tools() | ({} if self._job.device == "cpu" else {"device": self._job.device}),
            kv_latent_amax={
                key: file.kv_latent_amax
                for key, file in layers.items()
                if file.kv_latent_amax is not None
            },
            input_maxima=self._maxima(),
        )
        self._folder.remove()
        self._report("finished", "globals")
        return manifest

    def _maxima(self) -> InputMaxima | None:
        """The maxima of all experts; None where none are kept, or an earlier version has published
        a layer without them, which is said."""
        if not self._keeps_maxima:
            return None
        maxima, lacking = join_maxima(self._config, self._published)
        if lacking is not None:
            detail = (
                f"layer {lacking} was published by an earlier version, which did not keep the "
                "largest inputs of the experts, so the artifact has none; `python -m quant_jobs "
                "measure` adds them"
            )
            self._progress(Event("noted", lacking, detail=detail))
        return maxima

    def _write_report(self, start: int, ledger: Ledger) -> None:
        try:
            known = [i for i, slot in enumerate(self._pool.slots) if slot in self._blocks_by_slot]
            usage = self._pool.each(lambda worker, _: worker.usage.remote(), known)
        except WorkersLost:  # their work is complete: only their usage is missing
            usage = []
        record = make_record(
            self._job,
            self._timings,
            self._published,
            usage,
            num_workers=self._pool.size,
            started_at_layer=start,
            fallbacks=ledger.entries(),
        )
        write_job_report(self._job.output, record)

    def _report(self, step: Step, layer: LayerKey, published: PublishedFile | None = None) -> None:
        self._progress(Event(step, layer, published))
