"""The resources of one run: the driver's timings, and the record behind the job report.

Times and memory differ from run to run, so nothing here enters the artifact. Called by `driver.py`.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from deepseek.artifact.manifest import Fallback, LayerKey
from deepseek.artifact.tensors import layer_keys
from quant_jobs.job.folder import PublishedFile
from quant_jobs.job.job import Job
from quant_jobs.reports.job_record import (
    CalibrationAccount,
    JobRecord,
    LayerAccount,
    SourceAccount,
    WorkerAccount,
)
from quant_jobs.workers.messages import WorkerUsage


@dataclass(slots=True)
class Timings:
    """Wall seconds of the driver by layer and step, and the bytes that it read and wrote itself."""

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


def make_record(
    job: Job,
    timings: Timings,
    published: Mapping[LayerKey, PublishedFile],
    usage: Sequence[WorkerUsage],
    *,
    num_workers: int,
    started_at_layer: int,
    fallbacks: tuple[Fallback, ...],
) -> JobRecord:
    """Build the record of a run whose files are all published. `usage` has one entry per worker
    still alive; `num_workers` is the number requested."""
    blocks, settings = job.blocks, job.recipe.calibration
    return JobRecord(
        recipe=job.recipe.name,
        model=str(job.source.directory),
        num_workers=num_workers,
        num_nodes=max(len({worker.node for worker in usage}), 1),
        started_at_layer=started_at_layer,
        workers_lost=timings.workers_lost,
        wall_s=round(time.monotonic() - timings.started, 3),
        floor_tokens=job.recipe.expert_coverage.floor_tokens,
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
                errors=published[key].record.errors,
                coverage=published[key].coverage,
                input_maxima=published[key].input_maxima,
                num_bytes=published[key].record.num_bytes,
                source_bytes=job.source.num_bytes(key),
            )
            for key in layer_keys(job.source.config)
        ),
        workers=tuple(
            WorkerAccount(
                index=index,
                node=worker.node,
                pid=worker.pid,
                seconds=_rounded(worker.seconds),
                peak_rss_bytes=worker.peak_rss_bytes,
                bytes_read=worker.bytes_read,
                bytes_written=worker.bytes_written,
            )
            for index, worker in enumerate(usage)
        ),
        driver_peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        driver_bytes_read=timings.bytes_read,
        driver_bytes_written=timings.bytes_written,
        fallbacks=fallbacks,
    )


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {step: round(value, 3) for step, value in seconds.items()}
