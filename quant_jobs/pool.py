"""The workers of a job as Ray actors: started, called together, replaced when they die.

Ray's own restarts are off (`max_restarts` 0): a new worker knows nothing, and only the driver knows
which blocks to give it and from which boundary. So a death is reported as `WorkersLost`, and the
driver has them replaced and repeats the layer.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from ray.util import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor

from cluster.connect import worker_placement
from deepseek.errors import IntServeError
from deepseek.manifest import Fallback
from quant_jobs.calibrate import Share, Statistics
from quant_jobs.messages import Solved, Usage, WorkerJob
from quant_jobs.smoothquant import Smoothing

#: How long a worker may wait for a place on the cluster and load its libraries.
START_TIMEOUT_S = 600.0


class WorkersLost(Exception):
    """Some workers died, or their nodes did; `indices` says which."""

    def __init__(self, indices: Collection[int]) -> None:
        super().__init__(f"lost workers {sorted(indices)}")
        self.indices = sorted(indices)


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
        from quant_jobs.worker import Worker

        self._worker = Worker()

    def begin(self, job: WorkerJob) -> None:
        self._worker.begin(job)

    def hold(self, layer: int, ids: Mapping[int, Tensor], boundary: Path) -> None:
        self._worker.hold(layer, ids, boundary)

    def calibrate(self, layer: int, prefetch: int | None) -> Share:
        return self._worker.calibrate(layer, prefetch)

    def smooth(self, layer: int, statistics: Statistics) -> tuple[Smoothing, tuple[Fallback, ...]]:
        return self._worker.smooth(layer, statistics)

    def solve(
        self, layer: int, modules: Sequence[str], statistics: Statistics, smoothing: Smoothing
    ) -> Solved:
        return self._worker.solve(layer, modules, statistics, smoothing)

    def keep(self, layer: int, smoothing: Smoothing) -> Solved:
        return self._worker.keep(layer, smoothing)

    def carry(self, layer: int, published: Path, boundary: Path) -> None:
        self._worker.carry(layer, published, boundary)

    def usage(self) -> Usage:
        return self._worker.usage()


class WorkerPool:
    """`size` workers of one CPU each, spread over the nodes. Ray must be connected.

    Starting returns at once; the first call waits for a worker's libraries to load.
    """

    def __init__(self, size: int, start_timeout_s: float = START_TIMEOUT_S) -> None:
        assert size > 0
        self._start_timeout_s = start_timeout_s
        placement = worker_placement(size)
        self._group = placement_group(list(placement.bundles), strategy=placement.strategy)
        self._actors = [self._start(index) for index in range(size)]
        self._unproven = set(range(size))

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._actors)

    def describe(self) -> str:
        """`3 workers`, and that they must wait where the cluster is too small for now."""
        text = f"{len(self)} worker{'s' if len(self) > 1 else ''}"
        if (found := _num_cpus()) < len(self):
            text += f" (waiting for nodes: the cluster has {found:.0f} CPUs)"
        return text

    def each(self, call: Callable[[Any, int], Any], indices: Sequence[int] | None = None) -> Any:
        """`call(actor, index)` makes one remote call on each worker (or on those of `indices`);
        returns their results in that order.

        Raises:
            WorkersLost: after all others have answered, so that nobody is still at work.
            IntServeError: what a worker raised as the user's mistake; or no place on the cluster.
        """
        indices = range(len(self._actors)) if indices is None else indices
        pending = {index: call(self._actors[index], index) for index in indices}
        results, lost, failed = {}, [], None
        for index, reference in pending.items():
            try:
                self._await_start(index, reference)
                results[index] = ray.get(reference)
            except (RayActorError, ObjectLostError):
                lost.append(index)
            except RayTaskError as error:
                failed = error
        if failed is not None:
            raise failed.cause if isinstance(failed.cause, IntServeError) else failed
        if lost:
            raise WorkersLost(lost)
        return [results[index] for index in indices]

    def share(self, value: Any) -> Any:
        """A reference to pass to several workers in place of a large argument: each node gets it
        once."""
        return ray.put(value)

    def replace(self, indices: Collection[int]) -> None:
        """Start new workers in the place of dead ones."""
        for index in indices:
            ray.kill(self._actors[index])
            self._actors[index] = self._start(index)
            self._unproven.add(index)

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        remove_placement_group(self._group)
        self._actors = []

    def _start(self, index: int) -> Any:
        place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
        options = {"num_cpus": 1, "max_restarts": 0, "scheduling_strategy": place}
        return ray.remote(**options)(QuantizeWorker).remote()

    def _await_start(self, index: int, reference: Any) -> None:
        if index not in self._unproven:
            return
        done, _ = ray.wait([reference], timeout=self._start_timeout_s)
        if not done:
            raise IntServeError(
                f"worker {index} of {len(self._actors)} did not start within "
                f"{self._start_timeout_s:.0f} s (the cluster has {_num_cpus():.0f} CPUs in all); "
                "lower --workers or add nodes, and run again"
            )
        self._unproven.discard(index)


def _num_cpus() -> float:
    return float(ray.cluster_resources().get("CPU", 0))
