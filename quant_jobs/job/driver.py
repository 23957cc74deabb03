"""The driver of a quantize job. One layer at a time; workers compute, this file decides.

The steps of one layer are `layer_run.py`; here is what goes around them: what is done already,
which worker holds which calibration blocks, when a layer counts as published, and what to do when
workers die.

While layer N is being written (weights and boundary), layer N+1 is read and its attention runs.
Layer N is durable before N+1 is solved. Kill the job anywhere and run the same command again: it
goes on after the last published layer, and the output has the same bytes, whatever the number of
workers then or now (`folder.py`). Workers that die are replaced, or the job goes on without them;
their blocks are loaded from the last boundary, and at most one layer is redone.

A driver killed with SIGKILL takes a local Ray of its own with it: the kernel ends Ray's processes
with their parent, workers end with their raylet; two idle agents of Ray's take a minute longer. On
a cluster, Ray ends its workers. What such a worker may still write in its last moments are boundary
files, which the next run would write with the same bytes.

The bytes depend on the source, the recipe, the calibration tokens, the device
(`workers/devices.py`) and the versions of the tools, all pinned in the manifest. Only the recorded
output errors may differ in their last digit between kinds of CPU.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from deepseek.artifact.manifest import LayerKey, Manifest
from deepseek.artifact.tensors import layer_file, layer_keys, store_tensor
from deepseek.artifact.writer import ArtifactWriter
from deepseek.errors import IntServeError
from deepseek.inventory import linears
from deepseek.source.checkpoint import content_digest
from quant_jobs.algorithms.ledger import Ledger
from quant_jobs.job.folder import JobFolder, PublishedPart
from quant_jobs.job.job import Job, tools
from quant_jobs.job.layer_run import LayerRun, Solution
from quant_jobs.job.progress import Event, Progress, Step
from quant_jobs.reports.job_record import (
    CalibrationAccount,
    JobRecord,
    LayerAccount,
    SourceAccount,
    WorkerAccount,
)
from quant_jobs.reports.job_report import write_job_report
from quant_jobs.workers.messages import Account, WorkerJob
from quant_jobs.workers.protocol import Workers, WorkersLost

#: Times that workers may die within one layer before the job gives up.
MAX_LOSSES_PER_LAYER = 3


@dataclass(slots=True)
class Timings:
    """The driver's own account of a run, for the job report."""

    layers: dict[LayerKey, dict[str, float]] = field(default_factory=dict)
    workers_lost: int = 0
    started: float = field(default_factory=time.monotonic)
    bytes_read: int = 0
    bytes_written: int = 0

    @contextmanager
    def step(self, layer: LayerKey, name: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        steps = self.layers.setdefault(layer, {})
        steps[name] = steps.get(name, 0.0) + time.monotonic() - begun


@dataclass(slots=True)
class _Writing:
    """A layer that a worker is writing: the reference to its record, and what goes beside it."""

    layer: int
    record: Any
    account: Account


@dataclass(slots=True)
class _Storing:
    """What goes into a layer, while workers store it: references to who is done."""

    layer: int
    files: list[Any]


class Run:
    """One run of a job on a pool of workers. The job's folder is locked by the caller.

    `wave_blocks` is how many calibration blocks are between workers at a time, None for as many as
    suit the cluster. The bytes do not depend on it.
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
        self._layers = LayerRun(self._config, job.recipe, self._writer.schemes, pool, wave_blocks)
        self._blocks = job.blocks
        self._held: dict[int, tuple[int, ...]] = {}  # place -> the blocks that it holds
        self._writing: _Writing | None = None
        self._storing: _Storing | None = None
        self._timings = Timings()
        self._parts = folder.load_parts()
        for part in self._parts.values():
            self._writer.register(part.record, verify=False)  # load_parts has verified it

    def run(self) -> Manifest:
        """Everything that is still to do, up to the manifest."""
        todo = [n for n in range(self._config.num_hidden_layers) if n not in self._parts]
        start = self._folder.last_boundary(len(self._blocks.ids), todo[0]) if todo else 0
        self._announce(todo, start)
        self._publish_untouched()  # in the driver, while the workers load their libraries
        if todo:
            self._run_layers(start, todo[-1])
        return self._finish(start)

    def _announce(self, todo: list[int], start: int) -> None:
        if len(todo) == self._config.num_hidden_layers:
            state = "from the start"
        else:
            state = f"resuming, {len(todo)} layers are left"
        detail = f"{self._job.recipe.name} on {self._pool.describe()}: {state}"
        self._progress(Event("started", start, detail=detail))

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
            self._await_files()  # all begin anew, and forget what they write
            self._held.clear()
            self._progress(Event("joined", layer, detail=f"now on {self._pool.describe()}"))
        self._supply(layer)
        if layer in self._parts:
            self._await_files()
            if not is_last:
                with self._timings.step(layer, "carry"):
                    published = (self._job.output / layer_file(layer)).resolve()
                    self._layers.use_published(layer, published)
                    self._carry(layer)
            return
        solution = self._solve(layer)
        if not is_last:
            with self._timings.step(layer, "carry"):
                self._layers.use_solved(layer, solution)
                self._carry(layer)

    def _recover(self, layer: int, losses: int) -> int:
        """Replace the dead; the layer to go on with, which is the one before where that, or what
        came out of it, was still being written by one of them."""
        lost = self._pool.recover()
        self._timings.workers_lost += len(lost)
        if losses > MAX_LOSSES_PER_LAYER:
            raise IntServeError(
                f"workers {lost} died; that makes {losses} times within layer {layer}, "
                "probably for lack of memory: run again with fewer --workers per node or more "
                "memory; the job goes on at this layer"
            )
        self._held.clear()
        # What of the layers before is not safe after all?
        if self._writing is not None and not self._is_safe(self._await_writing):
            layer = min(layer, self._writing.layer)
        if self._storing is not None and not self._is_safe(self._await_storing):
            layer = min(layer, self._storing.layer - 1)
        self._writing = self._storing = None
        self._progress(
            Event("lost", layer, detail=f"lost workers {lost}; doing layer {layer} again on "
                  f"{self._pool.describe()}")
        )  # fmt: skip
        return layer

    @staticmethod
    def _is_safe(wait: Callable[[], None]) -> bool:
        try:
            wait()
        except WorkersLost:
            return False
        return True

    def _supply(self, layer: int) -> None:
        """See to it that every worker holds what goes into this layer for its blocks."""
        places = self._pool.places
        wanted = {place: tuple(self._layers.blocks_of(i)) for i, place in enumerate(places)}
        new = [i for i, place in enumerate(places) if self._held.get(place) != wanted[place]]
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
            return {block: self._blocks.ids[block] for block in self._layers.blocks_of(index)}

        with self._timings.step(layer, "supply"):
            self._pool.each(lambda worker, _: worker.begin.remote(job), new)
            self._pool.each(
                lambda worker, i: worker.load_boundary.remote(layer, ids(i), boundary), new
            )
        self._held = wanted

    # --- the steps of one layer ---

    def _solve(self, layer: int) -> Solution:
        later = range(layer + 1, self._config.num_hidden_layers)
        following = next((n for n in later if n not in self._parts), None)
        ledger = Ledger()
        with self._timings.step(layer, "attend"):
            received = self._layers.attend(layer, following)
        self._say("calibrated", layer)
        # The layer before is safe before this one costs much: a death costs one layer, not two.
        self._await_files()
        with self._timings.step(layer, "solve"):
            shared = self._layers.shared_smoothing(layer, received, ledger)
            solution = self._layers.solve(layer, shared, received, ledger)
        self._say("solved", layer)
        record = self._layers.write(layer, solution)
        self._writing = _Writing(layer, record, solution.account)
        return solution

    def _carry(self, layer: int) -> None:
        """Activations through the quantized layer; boundaries that nothing needs any more go."""
        boundary = self._folder.boundary(layer + 1)
        boundary.mkdir(exist_ok=True)
        self._storing = _Storing(layer + 1, [])
        self._layers.carry(layer, boundary.resolve(), self._storing.files)
        self._say("carried", layer)

    def _await_files(self) -> None:
        self._await_writing()
        self._await_storing()

    def _await_storing(self) -> None:
        """Wait until what comes out of the layer before is stored."""
        storing = self._storing
        if storing is None:
            return
        with self._timings.step(storing.layer - 1, "write"):
            self._pool.gather(storing.files)
        self._storing = None

    def _await_writing(self) -> None:
        """Wait until the layer that is being written is published."""
        writing = self._writing
        if writing is None:
            return
        with self._timings.step(writing.layer, "write"):
            (record,) = self._pool.gather([writing.record])
        self._writer.register(record, verify=False)
        account = writing.account
        self._register(
            PublishedPart(
                record=record,
                coverage=self._coverage(writing.layer, account),
                fallbacks=account.fallbacks,
                kv_latent_amax=account.kv_latent_amax,
            )
        )
        self._writing = None

    def _coverage(self, layer: int, account: Account) -> tuple[int, ...]:
        """Tokens that the router sent to each expert; empty in a dense layer."""
        gates = [
            spec.module
            for spec in linears(self._config, layer)
            if spec.expert is not None and spec.role == "gate_proj"
        ]
        return tuple(account.tokens[module] for module in gates)

    # --- publishing ---

    def _publish_untouched(self) -> None:
        """Globals and MTP layers go through by name, as the source stores them."""
        for key in layer_keys(self._config):
            untouched = key == "globals" or key >= self._config.num_hidden_layers
            if not untouched or key in self._parts:
                continue
            source = self._job.source
            with self._timings.step(key, "write"):
                found = source.read_globals() if key == "globals" else source.read_layer(key)
                tensors: dict[str, Tensor] = {}
                for tensor in found.values():
                    tensors |= store_tensor(tensor, self._writer.schemes.get(tensor.spec.module))
                digest = content_digest(found)
                record = self._writer.publish_layer(key, tensors, source_sha256=digest)
            self._timings.bytes_read += sum(
                one.data.nbytes + (0 if one.scale_inv is None else one.scale_inv.nbytes)
                for one in found.values()
            )
            self._timings.bytes_written += record.num_bytes
            self._register(PublishedPart(record=record))

    def _register(self, part: PublishedPart) -> None:
        """The part counts as published from here on; so its inputs may go."""
        self._folder.save_part(part)
        key = part.record.layer
        self._parts[key] = part
        if key != "globals" and key < self._config.num_hidden_layers:
            self._folder.drop_boundaries(before=key)
        self._say("published", key, part)

    def _finish(self, start: int) -> Manifest:
        ledger = Ledger()
        for part in self._parts.values():
            ledger.extend(part.fallbacks)
        self._write_report(start, ledger)
        layers = {key: part for key, part in self._parts.items() if key != "globals"}
        manifest = self._writer.finish(
            calibration=self._job.calibration,
            coverage={k: list(part.coverage) for k, part in layers.items() if part.coverage},
            fallbacks=list(ledger.entries()),
            tools=tools() | ({} if self._job.device == "cpu" else {"device": self._job.device}),
            kv_latent_amax={
                k: part.kv_latent_amax
                for k, part in layers.items()
                if part.kv_latent_amax is not None
            },
        )
        self._folder.remove()
        self._say("finished", "globals")
        return manifest

    def _write_report(self, start: int, ledger: Ledger) -> None:
        """Times and memory of this run only: no part of the artifact, for it never repeats."""
        try:
            known = [i for i, place in enumerate(self._pool.places) if place in self._held]
            usage = self._pool.each(lambda worker, _: worker.usage.remote(), known)
        except WorkersLost:  # after their work was done: nothing but this account is lost
            usage = []
        timings, blocks, settings = self._timings, self._blocks, self._job.recipe.calibration
        record = JobRecord(
            recipe=self._job.recipe.name,
            model=str(self._job.source.directory),
            num_workers=self._pool.size,
            num_nodes=max(len({one.node for one in usage}), 1),
            started_at_layer=start,
            workers_lost=timings.workers_lost,
            wall_s=round(time.monotonic() - timings.started, 3),
            floor_tokens=self._job.recipe.expert_coverage.floor_tokens,
            calibration=CalibrationAccount(
                num_tokens=blocks.num_tokens,
                num_blocks=settings.num_blocks,
                block_tokens=settings.block_tokens,
                digest=blocks.digest,
                sources=tuple(
                    SourceAccount(
                        name=str(source.path),
                        weight=source.weight,
                        blocks=source.blocks,
                        tokens=source.tokens,
                        sha256=source.sha256,
                    )
                    for source in blocks.sources
                ),
            ),
            layers=tuple(
                LayerAccount(
                    layer=key,
                    seconds=_rounded(timings.layers.get(key, {})),
                    errors=self._parts[key].record.errors,
                    coverage=self._parts[key].coverage,
                    num_bytes=self._parts[key].record.num_bytes,
                    source_bytes=self._job.source.num_bytes(key),
                )
                for key in layer_keys(self._config)
            ),
            workers=tuple(
                WorkerAccount(
                    index=index,
                    node=one.node,
                    pid=one.pid,
                    seconds=_rounded(one.seconds),
                    peak_rss_bytes=one.peak_rss_bytes,
                    bytes_read=one.bytes_read,
                    bytes_written=one.bytes_written,
                )
                for index, one in enumerate(usage)
            ),
            driver_peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            driver_bytes_read=timings.bytes_read,
            driver_bytes_written=timings.bytes_written,
            fallbacks=ledger.entries(),
        )
        write_job_report(self._job.output, record)

    def _say(self, step: Step, layer: LayerKey, part: PublishedPart | None = None) -> None:
        self._progress(Event(step, layer, part))


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {step: round(value, 3) for step, value in seconds.items()}
