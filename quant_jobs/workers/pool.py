"""The workers of a job as Ray actors: starts them, calls them, and replaces dead ones.

Ray's own restarts are off (`max_restarts` 0): a new worker has no state, and only the driver knows
which blocks it needs from which boundary. A death is therefore reported as `WorkersLost`; the
driver calls `recover`, which continues with fewer workers where the cluster has no room for a
replacement, and repeats the layer.

Each worker has a *slot* in the pool with a placement group of one bundle; Ray spreads the groups
evenly over the nodes. A single group for all would be placed all or nothing: on a cluster that has
lost a node the next run would wait forever, and if one of two lost nodes returned, it would stay
idle. A group that has lost its node is replaced by a new one: Ray retries to place the old group
without a pause, which occupies a core of the head until there is room (measured with Ray 2.60),
while a new group waits until a node joins.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.bundles import worker_placement
from deepseek.errors import IntServeError
from quant_jobs.ray_losses import LOSS_ERRORS, cause_of, cluster_total, is_loss
from quant_jobs.workers.actor import QuantizeWorker
from quant_jobs.workers.messages import register_tensor_serializer
from quant_jobs.workers.protocol import WorkersLost

#: Longest time for the first workers to find room on the cluster and load their libraries.
START_TIMEOUT_S = 600.0
#: Longest wait for room for all workers, once one is ready, before the job starts with fewer.
START_PATIENCE_S = 30.0
#: Longest wait for the replacement of a dead worker before the job continues with fewer: while it
#: starts, and while the cluster has no room for it.
REPLACEMENT_TIMEOUT_S = 60.0
REPLACEMENT_PATIENCE_S = 5.0
#: Consecutive failed starts of one worker before the job fails.
MAX_STARTS = 4


class WorkerPool:
    """Up to `size` workers, spread over the nodes; each reserves `cpus` and `gpus`. Ray must be
    connected. `close` kills the workers and frees their placement groups.

    The constructor returns at once; the first `admit` or `each` waits until workers have loaded
    their libraries. `len` and all indices count the workers active now.
    """

    def __init__(
        self,
        size: int,
        *,
        cpus: int = 1,
        gpus: float = 0,
        start_timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        assert size > 0
        register_tensor_serializer()
        # Ray logs a traceback for each failed call that nobody waited for, such as those whose
        # arguments come from a failed one; `gather` reports the failure itself.
        os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
        self.size, self._cpus, self._gpus = size, cpus, gpus
        self._start_timeout_s = start_timeout_s
        placement = worker_placement(size, cpus=cpus, gpus=gpus)
        self._bundles, self._strategy = placement.bundles, placement.strategy
        self._groups = [self._reserve(slot) for slot in range(size)]
        self._actors: dict[int, Any] = {}  # by slot
        self._starting: dict[int, Any] = {}  # slot -> reference to its worker's `ready`
        self._failed_starts = [0] * size  # by slot, since a worker was last ready there
        self._node_ids: dict[int, str] = {}  # slot -> Ray's id of the worker's node
        for slot in range(size):
            self._start(slot)
        self._active = list(range(size))
        self._is_new = True

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._active)

    @property
    def slots(self) -> list[int]:
        """The slots of the active workers, by index."""
        return list(self._active)

    @property
    def nodes(self) -> list[int]:
        """The node of each active worker, by index; nodes are numbered in order of appearance."""
        ids = [self._node_ids[slot] for slot in self._active]
        numbers = {node: number for number, node in enumerate(dict.fromkeys(ids))}
        return [numbers[node] for node in ids]

    def describe(self) -> str:
        """`3 workers`; their resources unless one CPU each; whether they wait for nodes."""
        text, suffix = f"{len(self)} worker", ""
        if len(self) > 1:
            text, suffix = f"{text}s", " each"
        if (self._cpus, self._gpus) != (1, 0):
            text += f" of {self._describe_resources(self._cpus, self._gpus)}{suffix}"
        required = {"CPU": self._cpus * len(self), "GPU": self._gpus * len(self)}
        if any(cluster_total(resource) < number for resource, number in required.items()):
            text += f" (waiting for nodes: the cluster has {self._describe_cluster()})"
        return text

    def submit(
        self, call: Callable[[Any, int], Any], indices: Sequence[int] | None = None
    ) -> list[Any]:
        """`call(actor, index)` makes one remote call on each worker, or on those of `indices`.
        Returns the references that it returned, in that order."""
        indices = range(len(self)) if indices is None else indices
        return [call(self._actors[self._active[index]], index) for index in indices]

    def each(
        self, call: Callable[[Any, int], Any], indices: Sequence[int] | None = None
    ) -> list[Any]:
        """`submit`, and wait for the results.

        Raises:
            WorkersLost: a worker died; raised after all others have answered.
            IntServeError: a worker raised it; or the cluster has no room for any worker.
        """
        self._await_first_start()
        return self.gather(self.submit(call, indices))

    def gather(self, references: Sequence[Any]) -> list[Any]:
        """Wait for the results of `submit`; raises as `each`."""
        results: list[Any] = []
        lost: RayTaskError | BaseException | None = None
        failed: RayTaskError | None = None
        for reference in references:
            try:
                results.append(ray.get(reference))
            except (*LOSS_ERRORS, RayTaskError) as error:
                if is_loss(error):
                    lost = error
                else:
                    failed = failed or error
        if lost is not None:
            raise WorkersLost from lost
        if failed is not None:
            raise cause_of(failed) from None
        return results

    def share(self, value: Any) -> Any:
        """Put a large argument into the object store, so that each node fetches it once; pass the
        returned reference in its place."""
        return ray.put(value)

    def recover(self) -> list[int]:
        """Detect dead workers, start others in their slots, and wait for them, though not beyond
        the limits above. Returns the slots of the dead.

        Raises:
            IntServeError: no worker is left, and none could be started.
        """
        dead = [slot for slot in self._active if not _is_alive(self._actors[slot])]
        self._active = [slot for slot in self._active if slot not in dead]
        for slot in dead:
            self._start(slot)
        timeout_s = REPLACEMENT_TIMEOUT_S if self._active else self._start_timeout_s
        self._await_starts(timeout_s, REPLACEMENT_PATIENCE_S)
        if not self._active:
            raise IntServeError(
                f"no worker is left, and none could be started within {self._start_timeout_s:.0f} "
                f"s {self._describe_shortage()}; add nodes and run again, which goes on at this "
                "layer"
            )
        return dead

    def admit(self) -> bool:
        """Activate workers that have become ready; returns whether the active set has changed. The
        first call waits for all, or after a while for those that find room on the cluster.

        Raises:
            IntServeError: no worker finds room, or workers cannot start.
        """
        before = list(self._active)
        self._await_first_start()
        self._await_starts(0.0, 0.0)
        return before != self._active

    def close(self) -> None:
        for actor in self._actors.values():
            ray.kill(actor)
        for group in self._groups:
            remove_placement_group(group)
        self._actors, self._starting, self._active = {}, {}, []

    def _await_first_start(self) -> None:
        """On the first use of the pool, wait until workers have started."""
        if not self._is_new:
            return
        self._is_new = False
        self._active = []
        self._await_starts(self._start_timeout_s, START_PATIENCE_S)
        if not self._active:
            raise IntServeError(
                f"none of {self.size} workers started within {self._start_timeout_s:.0f} s "
                f"{self._describe_shortage()}; add nodes, and run again"
            )

    def _await_starts(self, timeout_s: float, patience_s: float) -> None:
        """Wait for starting workers and activate those that are ready. Waits at most `timeout_s`;
        once a worker is active, at most `patience_s` after a starting one was last seen to have
        room on a node."""
        now = time.monotonic()
        deadline, patience_end = now + timeout_s, now + patience_s
        while self._starting:
            if self._check_placements() and timeout_s:
                patience_end = time.monotonic() + patience_s
            left_s = max(0.0, min(deadline - time.monotonic(), 0.5))
            waiting = {reference: slot for slot, reference in self._starting.items()}
            done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=left_s)
            for reference in done:
                self._finish_start(waiting[reference])
            now = time.monotonic()
            if now >= deadline or (self._active and now >= patience_end):
                return

    def _finish_start(self, slot: int) -> None:
        """Activate the worker whose start has ended; if it died, start another in its slot."""
        try:
            node = ray.get(self._starting.pop(slot))
        except LOSS_ERRORS as error:
            self._failed_starts[slot] += 1
            if self._failed_starts[slot] >= MAX_STARTS:
                last = str(error).strip().splitlines()[-1]
                raise IntServeError(
                    f"a worker has failed to start {MAX_STARTS} times ({last}); see the logs of "
                    "Ray on its node"
                ) from error
            self._start(slot)
            return
        self._failed_starts[slot] = 0
        self._node_ids[slot] = node
        self._active = sorted({*self._active, slot})

    def _check_placements(self) -> bool:
        """Whether Ray has placed one of the starting workers on a node. Restarts those that have
        lost their node, with a new placement group."""
        is_placed = False
        for slot in list(self._starting):
            state = placement_group_table(self._groups[slot])["state"]
            is_placed = is_placed or state == "CREATED"
            if state == "RESCHEDULING":
                remove_placement_group(self._groups[slot])
                self._groups[slot] = self._reserve(slot)
                self._start(slot)
        return is_placed

    def _reserve(self, slot: int) -> Any:
        return placement_group([self._bundles[slot]], strategy=self._strategy)

    def _describe_shortage(self) -> str:
        required = self._describe_resources(self._cpus, self._gpus)
        cluster = self._describe_cluster()
        return f"(each takes {required} of a node; the cluster has {cluster} in all)"

    def _describe_cluster(self) -> str:
        return self._describe_resources(cluster_total("CPU"), cluster_total("GPU"))

    def _describe_resources(self, cpus: float, gpus: float) -> str:
        """`2 CPUs and 1 GPU`; names GPUs only where workers use any."""
        counts = {"CPU": cpus} | ({"GPU": gpus} if self._gpus else {})
        return " and ".join(f"{n:.0f} {name}{'' if n == 1 else 's'}" for name, n in counts.items())

    def _start(self, slot: int) -> None:
        if (old := self._actors.get(slot)) is not None:
            ray.kill(old)
        strategy = PlacementGroupSchedulingStrategy(
            self._groups[slot], placement_group_bundle_index=0
        )
        options = {
            "num_cpus": self._cpus,
            "num_gpus": self._gpus,
            "max_restarts": 0,
            "scheduling_strategy": strategy,
            "concurrency_groups": {"write": 1},
        }
        self._actors[slot] = ray.remote(**options)(QuantizeWorker).remote()
        self._starting[slot] = self._actors[slot].ready.remote()


def _is_alive(actor: Any) -> bool:
    try:
        ray.get(actor.ready.remote())
    except LOSS_ERRORS:
        return False
    return True
