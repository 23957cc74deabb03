"""A worker of a quantize job as a Ray actor: passes each remote call through to `worker.Worker`.

Started, called and replaced by `pool.py`. Contracts are documented in `worker.py`.
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
from quant_jobs.algorithms.scaling import WeightStatistics
from quant_jobs.calibration.forward import ExpertOutputsByBlock, RoutedBlocks
from quant_jobs.calibration.statistics import InputShare, InputStatistics
from quant_jobs.calibration.units import Unit
from quant_jobs.workers.messages import (
    AttentionShare,
    MeasureJob,
    SolveSummary,
    Tensors,
    WorkerJob,
    WorkerUsage,
    register_tensor_serializer,
)


def _end_with_raylet() -> None:
    """Exit as soon as the raylet, this process's parent, is dead. Without this, Ray lets a worker
    live for another minute, waiting for a head node that was killed with its driver."""
    raylet = os.getppid()

    def watch() -> None:
        while os.getppid() == raylet:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, name="raylet-watch", daemon=True).start()


class QuantizeWorker:
    """`worker.Worker` behind Ray. Imports it in the actor's process, so that the driver never loads
    the libraries that workers compute with."""

    def __init__(self) -> None:
        _end_with_raylet()
        register_tensor_serializer()
        from quant_jobs.workers.worker import Worker

        self._worker = Worker()

    def ready(self) -> str:
        """Returns Ray's id of this worker's node, once the libraries are loaded."""
        return str(ray.get_runtime_context().get_node_id())

    def begin(self, job: WorkerJob) -> None:
        self._worker.begin(job)

    def begin_measuring(self, job: MeasureJob) -> None:
        self._worker.begin_measuring(job)

    def embed(self, ids: Mapping[int, Tensor]) -> None:
        self._worker.embed(ids)

    def load_boundary(self, layer: int, ids: Mapping[int, Tensor], boundary: Path) -> None:
        self._worker.load_boundary(layer, ids, boundary)

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

    def receive(self, layer: int, *routed: RoutedBlocks) -> None:
        self._worker.receive(layer, *routed)

    def scale_statistics(
        self, layer: int, received: None
    ) -> tuple[dict[str, WeightStatistics], InputStatistics | None, Tensor]:
        return self._worker.scale_statistics(layer, received)

    def scale_losses(self, layer: int, candidates: Tensor) -> dict[str, Tensor]:
        return self._worker.scale_losses(layer, candidates)

    @ray.method(num_returns=3)
    def solve(
        self, layer: int, smoothing: Smoothing, received: None
    ) -> tuple[Tensors, Tensors, SolveSummary]:
        return self._worker.solve(layer, smoothing, received)

    def folded_norms(self, layer: int, smoothing: Smoothing) -> Tensors:
        return self._worker.folded_norms(layer, smoothing)

    @ray.method(concurrency_group="write")
    def write(
        self, layer: int, source_sha256: str, errors: Mapping[str, float], *pieces: Tensors
    ) -> LayerRecord:
        return self._worker.write(layer, source_sha256, errors, *pieces)

    def use_solved(
        self, layer: int, input_scales: Mapping[str, float], norms: Tensors, *trunk: Tensors
    ) -> None:
        self._worker.use_solved(layer, input_scales, norms, *trunk)

    def use_published(self, layer: int, published: Path, share: Sequence[Unit]) -> None:
        self._worker.use_published(layer, published, share)

    def use_artifact(self, layer: int, share: Sequence[Unit]) -> None:
        self._worker.use_artifact(layer, share)

    def expert_maxima(self, layer: int) -> dict[int, tuple[float, float]]:
        return self._worker.expert_maxima(layer)

    def attend_quantized(self, layer: int, blocks: Sequence[int]) -> RoutedBlocks:
        return self._worker.attend_quantized(layer, blocks)

    def run_experts(
        self, layer: int, blocks_by_node: Sequence[Sequence[int]], *routed: RoutedBlocks
    ) -> ExpertOutputsByBlock | list[ExpertOutputsByBlock]:
        outputs = self._worker.run_experts(layer, blocks_by_node, *routed)
        return outputs if len(outputs) > 1 else outputs[0]  # Ray does not unpack a single value

    def combine(self, layer: int, blocks: Sequence[int], *outputs: ExpertOutputsByBlock) -> None:
        self._worker.combine(layer, blocks, *outputs)

    @ray.method(concurrency_group="write")
    def store(self, layer: int, blocks: Sequence[int], file: Path, combined: None) -> None:
        self._worker.store(layer, blocks, file, combined)

    def advance(self, layer: int) -> None:
        self._worker.advance(layer)

    def begin_head(self) -> None:
        self._worker.begin_head()

    def head_shares(self, blocks: Sequence[int]) -> dict[int, InputShare]:
        return self._worker.head_shares(blocks)

    def observe_head(self, *shares: Mapping[int, InputShare]) -> None:
        self._worker.observe_head(*shares)

    def write_head(self) -> tuple[LayerRecord, SolveSummary]:
        return self._worker.write_head()

    def usage(self) -> WorkerUsage:
        return self._worker.usage()
