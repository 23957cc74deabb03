"""A worker of a quantize job as a Ray actor: `worker.Worker`, one remote method per call.

Apart from `pool.py`, which starts these, calls them and replaces the dead.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import ray
from torch import Tensor

from deepseek.artifact.manifest import LayerRecord
from deepseek.source.checkpoint import SourceTensor
from quant_jobs.algorithms.folding import Smoothing
from quant_jobs.calibration.forward import Parts, RoutedBlocks
from quant_jobs.calibration.statistics import InputStatistics
from quant_jobs.calibration.units import Unit
from quant_jobs.workers.messages import (
    Account,
    AttentionShare,
    Tensors,
    Usage,
    WorkerJob,
    travel_light,
)


def _end_with_raylet() -> None:
    """Leave at once when the raylet, this process's parent, is gone: left to itself, Ray lets a
    worker live on for a minute, waiting for a head node that was killed with its driver."""
    raylet = os.getppid()

    def watch() -> None:
        while os.getppid() == raylet:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, name="raylet-watch", daemon=True).start()


class QuantizeWorker:
    """`worker.Worker` behind Ray. Loads it in the actor's own process: the driver never needs the
    libraries that it computes with."""

    def __init__(self) -> None:
        _end_with_raylet()
        travel_light()
        from quant_jobs.workers.worker import Worker

        self._worker = Worker()

    def ready(self) -> str:
        """Answered once the libraries are loaded: Ray's name for this worker's node."""
        return str(ray.get_runtime_context().get_node_id())

    def begin(self, job: WorkerJob) -> None:
        self._worker.begin(job)

    def hold(self, layer: int, ids: Mapping[int, Tensor], boundary: Path) -> None:
        self._worker.hold(layer, ids, boundary)

    def prefetch(self, layer: int, share: Sequence[Unit], with_trunk: bool) -> None:
        self._worker.prefetch(layer, share, with_trunk)

    def trunk(self, layer: int) -> dict[str, SourceTensor]:
        return self._worker.trunk(layer)

    def attend(
        self,
        layer: int,
        trunk: Mapping[str, SourceTensor],
        blocks: Sequence[int],
        inputs: Sequence[Sequence[str]],
    ) -> tuple[RoutedBlocks | AttentionShare, ...]:
        return self._worker.attend(layer, trunk, blocks, inputs)

    def observe(self, layer: int, *shares: AttentionShare) -> None:
        self._worker.observe(layer, *shares)

    def weigh(
        self, layer: int, *routed: RoutedBlocks
    ) -> tuple[dict[str, tuple[Tensor, int]], InputStatistics | None]:
        return self._worker.weigh(layer, *routed)

    def lose(self, layer: int, candidates: Tensor, *routed: RoutedBlocks) -> dict[str, Tensor]:
        return self._worker.lose(layer, candidates, *routed)

    @ray.method(num_returns=3)
    def solve(
        self, layer: int, smoothing: Smoothing, *routed: RoutedBlocks
    ) -> tuple[Tensors, Tensors, Account]:
        return self._worker.solve(layer, smoothing, *routed)

    def keep(self, layer: int, smoothing: Smoothing) -> Tensors:
        return self._worker.keep(layer, smoothing)

    @ray.method(concurrency_group="write")
    def write(
        self, layer: int, source_sha256: str, errors: Mapping[str, float], *parts: Tensors
    ) -> LayerRecord:
        return self._worker.write(layer, source_sha256, errors, *parts)

    def adopt(
        self, layer: int, input_scales: Mapping[str, float], kept: Tensors, *trunk: Tensors
    ) -> None:
        self._worker.adopt(layer, input_scales, kept, *trunk)

    def restore(self, layer: int, published: Path, share: Sequence[Unit]) -> None:
        self._worker.restore(layer, published, share)

    def reattend(self, layer: int, blocks: Sequence[int]) -> RoutedBlocks:
        return self._worker.reattend(layer, blocks)

    def run_experts(
        self, layer: int, homes: Sequence[Sequence[int]], *routed: RoutedBlocks
    ) -> Parts | list[Parts]:
        found = self._worker.run_experts(layer, homes, *routed)
        return found if len(found) > 1 else found[0]  # Ray takes one returned value as it is

    def combine(self, layer: int, blocks: Sequence[int], *parts: Parts) -> None:
        self._worker.combine(layer, blocks, *parts)

    @ray.method(concurrency_group="write")
    def store(self, layer: int, blocks: Sequence[int], file: Path, combined: None) -> None:
        self._worker.store(layer, blocks, file, combined)

    def advance(self, layer: int) -> None:
        self._worker.advance(layer)

    def usage(self) -> Usage:
        return self._worker.usage()
