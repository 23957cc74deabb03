"""Measure the largest inputs of an artifact's routed experts, where it was made without them.

One calibration pass (`job/measure_pass.py`), then input_maxima.json and, last, intserve.json in its
present form, which lists it; each whole or as it was. The calibration settings are the recipe's.
Called by the command.

The values are not those that `quantize` would have kept: there the layer in hand is the original
one, here all layers are quantized; and a recipe that measures experts on more tokens than the
router sends them (`expert_coverage`) has no effect here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek.artifact.input_maxima import (
    INPUT_MAXIMA_FILE,
    InputMaxima,
    find_outliers,
    moe_layers,
    quantizes_experts,
)
from deepseek.artifact.manifest import (
    MANIFEST_FILE,
    Manifest,
    read_manifest,
    write_manifest,
)
from deepseek.artifact.reader import ArtifactReader
from deepseek.cli import make_progress, print_line
from deepseek.errors import ArtifactError, DeployError
from deepseek.files import write_atomic
from deepseek.outputs import check_writable
from quant_jobs.calibration.token_blocks import load_token_blocks
from quant_jobs.job.job import Calibration
from quant_jobs.job.restore import lost_maxima
from quant_jobs.quantize import connect_ray, start_workers
from quant_jobs.workers.devices import Device, check_gpus

#: Called with the number of layers done, and a sentence or nothing.
Report = Callable[[int, str], None]


@dataclass(frozen=True, slots=True)
class Measurement:
    """What a run has done. `kept`: the artifact had its maxima already; `before` is its digest
    before the run."""

    manifest: Manifest
    maxima: InputMaxima
    before: str
    kept: bool

    def summary(self) -> dict[str, Any]:
        """What `measure --json` prints."""
        return {
            "artifact_digest": self.manifest.digest,
            "previous_digest": self.before,
            "kept": self.kept,
            "layers": len(self.maxima.layers),
            "input_outliers": [
                outlier.model_dump(mode="json") for outlier in self.manifest.input_outliers
            ],
        }

    def describe(self, checkpoint: Path) -> list[str]:
        """A line on what was done, and one per outlier."""
        layers, outliers = len(self.maxima.layers), self.manifest.input_outliers
        digest = self.manifest.digest[:16]
        line = f"{checkpoint}: {layers} layers, {len(outliers)} outliers, artifact {digest}"
        if self.kept:
            line += "; it had its maxima already, which were verified and kept"
        else:
            line += f" (was {self.before[:16]}); engines built from it before must be built again"
        return [line, *(f"  {outlier.describe()}" for outlier in outliers)]


def run_measure(
    checkpoint: Path,
    calibration: Calibration,
    workers: int,
    report: Report | None = None,
    *,
    device: Device = "cpu",
    cpus_per_worker: int = 1,
) -> Measurement:
    """Measure the maxima of the artifact in `checkpoint` and add them to it. Maxima that it has are
    verified and kept; of lost ones the copy in the job's report is taken, where it is the same.

    `workers`, `device` and `cpus_per_worker` as in `run_quantize`; the number of workers changes no
    byte. A killed run leaves the artifact as it was, or with a file that the next run replaces, and
    begins anew. `report` None shows a progress line on stderr.

    Raises:
        ArtifactError: the artifact is damaged, or none of its routed experts is quantized.
        CalibrationError: see `load_token_blocks`.
        OutputError: its directory cannot be written.
        IntServeError: workers keep dying.
    """
    if not workers and cpus_per_worker != 1:
        raise DeployError(
            "--cpus-per-worker reserves CPUs of Ray, and --workers 0 uses none; leave one of the "
            "two out"
        )
    artifact = ArtifactReader(checkpoint, ignore_input_maxima=True)
    if not quantizes_experts(artifact.config, artifact.schemes):
        raise ArtifactError(
            f"{checkpoint} (recipe {artifact.recipe.name}) has no quantized routed experts, so no "
            "engine needs the maxima of their inputs; there is nothing to measure"
        )
    if (kept := _kept(artifact)) is not None:
        return Measurement(artifact.manifest, kept, artifact.digest, kept=True)
    settings = artifact.recipe.calibration
    blocks = load_token_blocks(calibration, checkpoint, settings.num_blocks, settings.block_tokens)
    check_writable(checkpoint)
    from quant_jobs.job.measure_pass import measure_experts

    with ExitStack() as stack:
        if device == "cuda":
            if workers:
                stack.enter_context(connect_ray(workers * cpus_per_worker))
            check_gpus(on_ray=workers > 0)
        pool = stack.enter_context(start_workers(workers, device, cpus_per_worker))
        if report is None:
            report = stack.enter_context(_terminal(moe_layers(artifact.config)[-1] + 1))
        report(0, f"{artifact.recipe.name} on {pool.describe()}: largest inputs of the experts")
        maxima = measure_experts(artifact, blocks.ids, pool, report, device=device)
    return Measurement(_publish(artifact, maxima), maxima, artifact.digest, kept=False)


def _kept(artifact: ArtifactReader) -> InputMaxima | None:
    """The maxima that the artifact has, or had and gets back; None where they must be measured."""
    if not artifact.manifest.has_input_maxima:
        return None
    try:
        content = lost_maxima(artifact.directory, artifact.manifest)
    except ArtifactError:
        return None
    if content is not None:
        write_atomic(artifact.directory / INPUT_MAXIMA_FILE, content)
    return ArtifactReader(artifact.directory).input_maxima


def _publish(artifact: ArtifactReader, maxima: InputMaxima) -> Manifest:
    """Write input_maxima.json, then intserve.json, which names it."""
    directory = artifact.directory
    if read_manifest(directory).digest != artifact.digest:
        raise ArtifactError(
            f"{directory / MANIFEST_FILE} was replaced while the artifact was measured; run again"
        )
    content = maxima.to_bytes()
    files = artifact.manifest.files | {INPUT_MAXIMA_FILE: hashlib.sha256(content).hexdigest()}
    manifest = artifact.manifest.model_copy(
        update={
            # Form 3 says something of config.json, which stays as it is.
            "format_version": max(artifact.manifest.format_version, 2),
            "files": dict(sorted(files.items())),
            "input_outliers": find_outliers(maxima),
        }
    )
    write_atomic(directory / INPUT_MAXIMA_FILE, content)
    write_manifest(directory, manifest)
    return manifest


@contextmanager
def _terminal(num_layers: int) -> Iterator[Report]:
    """A progress bar over the layers on stderr, with an ETA."""
    with make_progress() as bar:
        task = bar.add_task("measure", total=num_layers)

        def report(done: int, detail: str) -> None:
            if detail:
                print_line(bar.console, detail)
            bar.update(task, completed=done)

        yield report
