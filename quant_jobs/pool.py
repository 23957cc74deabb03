"""The workers of a job as Ray actors: started, called together, replaced when they die.

Ray's own restarts are off (`max_restarts` 0): a new worker knows nothing, and only the driver knows
which blocks to give it and from which boundary. So a death is reported as `WorkersLost`; the driver
calls `recover`, which goes on with who is left where a replacement finds no place on the cluster,
and repeats the layer.
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
from deepseek.artifact import LayerRecord
from deepseek.checkpoint import SourceTensor
from deepseek.errors import IntServeError
from quant_jobs.calibrate import InputStatistics
from quant_jobs.folding import Smoothing
from quant_jobs.messages import (
    Account,
    AttentionShare,
    Parts,
    RoutedBlocks,
    Tensors,
    Usage,
    WorkerJob,
    travel_light,
)
from quant_jobs.units import Unit

#: How long the first workers may wait for a place on the cluster and load their libraries.
START_TIMEOUT_S = 600.0
#: How long a job waits for the replacement of a dead worker before it goes on with fewer.
REPLACEMENT_TIMEOUT_S = 60.0


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
        travel_light()
        from quant_jobs.worker import Worker

        self._worker = Worker()

    def ready(self) -> None:
        """Answered once the libraries are loaded."""

    def begin(self, job: WorkerJob) -> None:
        self._worker.begin(job)

    def hold(self, layer: int, ids: Mapping[int, Tensor], boundary: Path) -> None:
        self._worker.hold(layer, ids, boundary)

    def prefetch(self, layer: int, share: Sequence[Unit], with_trunk: bool) -> None:
        self._worker.prefetch(layer, share, with_trunk)

    def trunk(self, layer: int) -> dict[str, SourceTensor]:
        return self._worker.trunk(layer)

    @ray.method(num_returns=2)
    def attend(
        self, layer: int, trunk: Mapping[str, SourceTensor], blocks: Sequence[int]
    ) -> tuple[RoutedBlocks, AttentionShare]:
        return self._worker.attend(layer, trunk, blocks)

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

    def run_experts(self, layer: int, *routed: RoutedBlocks) -> Parts:
        return self._worker.run_experts(layer, *routed)

    def combine(self, layer: int, blocks: Sequence[int], *parts: Parts) -> None:
        self._worker.combine(layer, blocks, *parts)

    def store(self, layer: int, boundary: Path) -> None:
        self._worker.store(layer, boundary)

    def usage(self) -> Usage:
        return self._worker.usage()


class WorkerPool:
    """Up to `size` workers of one CPU (and `gpus` GPUs) each, spread over the nodes. Ray must be
    connected.

    Starting returns at once; the first call waits for a worker's libraries to load. `len` and every
    index count the workers that are at work now.
    """

    def __init__(
        self, size: int, *, gpus: float = 0, start_timeout_s: float = START_TIMEOUT_S
    ) -> None:
        assert size > 0
        travel_light()
        self.size, self._gpus = size, gpus
        self._start_timeout_s = start_timeout_s
        placement = worker_placement(size, gpus=gpus)
        self._group = placement_group(list(placement.bundles), strategy=placement.strategy)
        self._actors = {place: self._start(place) for place in range(size)}
        self._awaited = {place: actor.ready.remote() for place, actor in self._actors.items()}
        self._at_work = list(range(size))

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._at_work)

    @property
    def places(self) -> list[int]:
        """Who is at work: by index, the worker's place in the placement group."""
        return list(self._at_work)

    def describe(self) -> str:
        """`3 workers`, and that they must wait where the cluster is too small for now."""
        text = f"{len(self)} worker{'s' if len(self) > 1 else ''}"
        if (found := _num_cpus()) < len(self):
            text += f" (waiting for nodes: the cluster has {found:.0f} CPUs)"
        return text

    def submit(
        self, call: Callable[[Any, int], Any], indices: Sequence[int] | None = None
    ) -> list[Any]:
        """`call(actor, index)` makes one remote call on each worker (or on those of `indices`);
        returns what it returned, references to results that may be passed on, in that order."""
        indices = range(len(self)) if indices is None else indices
        return [call(self._actors[self._at_work[index]], index) for index in indices]

    def each(self, call: Callable[[Any, int], Any], indices: Sequence[int] | None = None) -> Any:
        """`submit`, and the results themselves.

        Raises:
            WorkersLost: after all others have answered, so that nobody is still at work.
            IntServeError: what a worker raised as the user's mistake; or no place on the cluster.
        """
        indices = list(range(len(self)) if indices is None else indices)
        self._await_start(indices)
        pending = dict(zip(indices, self.submit(call, indices), strict=True))
        results: dict[int, Any] = {}
        lost: list[int] = []
        failed: RayTaskError | None = None
        for index, reference in pending.items():
            try:
                results[index] = ray.get(reference)
            except (RayActorError, ObjectLostError):
                lost.append(index)
            except RayTaskError as error:
                failed = error
        if lost:
            raise WorkersLost(lost)
        if failed is not None:
            raise failed.cause if isinstance(failed.cause, IntServeError) else failed
        return [results[index] for index in indices]

    def get(self, reference: Any) -> Any:
        """One result of `submit`; raises as `each`."""
        try:
            return ray.get(reference)
        except (RayActorError, ObjectLostError) as error:
            raise WorkersLost([]) from error
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, IntServeError) else error from None

    def share(self, value: Any) -> Any:
        """A reference to pass to several workers in place of a large argument: each node gets it
        once."""
        return ray.put(value)

    def recover(self) -> list[int]:
        """Find out who is dead, start others in their places, and go on with who is there: all
        of them, or after a while fewer. Returns the places of the dead.

        Raises:
            IntServeError: nobody is left, and nobody can be started.
        """
        dead = [place for place in self._at_work if not _answers(self._actors[place])]
        for place in dead:
            ray.kill(self._actors[place])
            self._actors[place] = self._start(place)
            self._awaited[place] = self._actors[place].ready.remote()
        self._at_work = [place for place in self._at_work if place not in dead]
        self._gather(REPLACEMENT_TIMEOUT_S if self._at_work else self._start_timeout_s)
        if not self._at_work:
            raise IntServeError(
                f"no worker is left, and none could be started within {self._start_timeout_s:.0f} "
                f"s (the cluster has {_num_cpus():.0f} CPUs in all); add nodes and run again, "
                "which goes on at this layer"
            )
        return dead

    def admit(self) -> bool:
        """Take in replacements that have become ready since; whether there were any."""
        before = list(self._at_work)
        self._gather(0.0)
        return before != self._at_work

    def close(self) -> None:
        for actor in self._actors.values():
            ray.kill(actor)
        remove_placement_group(self._group)
        self._actors, self._at_work = {}, []

    def _gather(self, timeout_s: float) -> None:
        """Wait for replacements; whoever is ready is at work from now on."""
        waiting = {
            reference: place
            for place, reference in self._awaited.items()
            if place not in self._at_work
        }
        if waiting:
            done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=timeout_s)
            for reference in done:
                place = waiting[reference]
                del self._awaited[place]
                try:
                    ray.get(reference)
                except RayActorError:  # died while it started: try again
                    ray.kill(self._actors[place])
                    self._actors[place] = self._start(place)
                    self._awaited[place] = self._actors[place].ready.remote()
        ready = [place for place in range(self.size) if place not in self._awaited]
        self._at_work = sorted({*self._at_work, *ready})

    def _await_start(self, indices: Sequence[int]) -> None:
        """The first time that a worker is called, it may still be loading its libraries."""
        places = {self._at_work[index] for index in indices} & self._awaited.keys()
        if not places:
            return
        waiting = [self._awaited[place] for place in sorted(places)]
        done, left = ray.wait(waiting, num_returns=len(waiting), timeout=self._start_timeout_s)
        if left:
            raise IntServeError(
                f"{len(left)} of {self.size} workers did not start within "
                f"{self._start_timeout_s:.0f} s (the cluster has {_num_cpus():.0f} CPUs in all); "
                "lower --workers or add nodes, and run again"
            )
        for place in places:
            del self._awaited[place]

    def _start(self, place: int) -> Any:
        where = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=place)
        options = {
            "num_cpus": 1,
            "num_gpus": self._gpus,
            "max_restarts": 0,
            "scheduling_strategy": where,
            "concurrency_groups": {"write": 1},
        }
        return ray.remote(**options)(QuantizeWorker).remote()


def _answers(actor: Any) -> bool:
    try:
        ray.get(actor.ready.remote())
    except RayActorError:
        return False
    return True


def _num_cpus() -> float:
    return float(ray.cluster_resources().get("CPU", 0))
