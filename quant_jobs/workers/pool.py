"""The workers of a job as Ray actors: started, called together, replaced when they die.

Ray's own restarts are off (`max_restarts` 0): a new worker knows nothing, and only the driver knows
which blocks to give it and from which boundary. So a death is reported as `WorkersLost`; the driver
calls `recover`, which goes on with who is left where a replacement finds no place on the cluster,
and repeats the layer.

Every worker has a placement group of its own, of one bundle, and Ray spreads the groups evenly over
the nodes. One group of all would be placed all or nothing: on a cluster that has lost a node the
next run would wait for ever, and of two nodes lost and one returned, the returned one stays idle.
A group that has lost its node is given up for a new one: Ray tries to place the old one again
without a pause, which takes a core of the head for as long as there is no room for it (measured
with Ray 2.60), and lets a new one wait until a node joins.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.connect import worker_placement
from deepseek.errors import IntServeError
from quant_jobs.workers.actor import QuantizeWorker
from quant_jobs.workers.messages import register_tensor_serializer
from quant_jobs.workers.protocol import WorkersLost

#: How long the first workers may wait for a place on the cluster and load their libraries.
START_TIMEOUT_S = 600.0
#: How long a job waits for places for all of its workers before it starts with those that have one.
START_PATIENCE_S = 30.0
#: How long a job waits for the replacement of a dead worker before it goes on with fewer; and when
#: the cluster has no place for it.
REPLACEMENT_TIMEOUT_S = 60.0
REPLACEMENT_PATIENCE_S = 5.0
#: Times that a worker may fail to start, one after the other.
MAX_STARTS = 4

#: Ray's words for: a worker, its node, or what only they had in memory is gone. The memory monitor,
#: which kills workers when a node runs short, has a word of its own.
_LOSS_ERRORS = (RayActorError, ObjectLostError, NodeDiedError, WorkerCrashedError, OutOfMemoryError)


class WorkerPool:
    """Up to `size` workers, spread over the nodes, for each of which `cpus` and `gpus` are kept
    free. Ray must be connected.

    Starting returns at once; the first `admit` or `each` waits for the workers' libraries to load.
    `len` and every index count the workers that are at work now.
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
        self.size, self._cpus, self._gpus = size, cpus, gpus
        self._start_timeout_s = start_timeout_s
        placement = worker_placement(size, cpus=cpus, gpus=gpus)
        self._bundles, self._strategy = placement.bundles, placement.strategy
        self._groups = [self._reserve(slot) for slot in range(size)]
        self._actors: dict[int, Any] = {}  # by place
        self._starting: dict[int, Any] = {}  # place -> answered when its worker is ready
        self._failed_starts = [0] * size  # in vain, since a worker was last ready at this place
        self._node_ids: dict[int, str] = {}  # place -> Ray's name for the worker's node
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
        """Who is at work: by index, the worker's slot in the pool."""
        return list(self._active)

    @property
    def nodes(self) -> list[int]:
        """By index, the node that the worker is on; nodes are numbered as they come up."""
        ids = [self._node_ids[slot] for slot in self._active]
        numbers = {node: number for number, node in enumerate(dict.fromkeys(ids))}
        return [numbers[node] for node in ids]

    def describe(self) -> str:
        """`3 workers`, what each takes if that is not one CPU, and that they must wait where the
        cluster is too small for now."""
        text, each = f"{len(self)} worker", ""
        if len(self) > 1:
            text, each = f"{text}s", " each"
        if (self._cpus, self._gpus) != (1, 0):
            text += f" of {self._describe_resources(self._cpus, self._gpus)}{each}"
        wanted = {"CPU": self._cpus * len(self), "GPU": self._gpus * len(self)}
        if any(_cluster_total(what) < number for what, number in wanted.items()):
            text += f" (waiting for nodes: the cluster has {self._describe_cluster()})"
        return text

    def submit(
        self, call: Callable[[Any, int], Any], indices: Sequence[int] | None = None
    ) -> list[Any]:
        """`call(actor, index)` makes one remote call on each worker (or on those of `indices`);
        returns what it returned, references to results that may be passed on, in that order."""
        indices = range(len(self)) if indices is None else indices
        return [call(self._actors[self._active[index]], index) for index in indices]

    def each(
        self, call: Callable[[Any, int], Any], indices: Sequence[int] | None = None
    ) -> list[Any]:
        """`submit`, and the results themselves.

        Raises:
            WorkersLost: after all others have answered, so that nobody is still at work.
            IntServeError: what a worker raised as the user's mistake; or no place on the cluster.
        """
        self._await_first_start()
        return self.gather(self.submit(call, indices))

    def gather(self, references: Sequence[Any]) -> list[Any]:
        """The results of `submit`; raises as `each`."""
        results: list[Any] = []
        lost: RayTaskError | BaseException | None = None
        failed: RayTaskError | None = None
        for reference in references:
            try:
                results.append(ray.get(reference))
            except (*_LOSS_ERRORS, RayTaskError) as error:
                if is_loss(error):
                    lost = error
                else:
                    failed = failed or error
        if lost is not None:
            raise WorkersLost from lost
        if failed is not None:
            raise _cause(failed) from None
        return results

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
        """Take in workers that have become ready since; whether who is at work has changed. The
        first time, wait for all, or after a while for those that find a place.

        Raises:
            IntServeError: nobody finds a slot, or workers cannot start.
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
        """The first time that workers are needed, they may still be loading their libraries."""
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
        """Wait for workers that were started; whoever is ready is at work from now on. Not longer
        than `timeout_s`; nor, if somebody is at work, than `patience_s` after it was last seen that
        one of the others has a place."""
        now = time.monotonic()
        deadline, hopeless = now + timeout_s, now + patience_s
        while self._starting:
            if self._find_slots() and timeout_s:
                hopeless = time.monotonic() + patience_s
            left_s = max(0.0, min(deadline - time.monotonic(), 0.5))
            waiting = {reference: slot for slot, reference in self._starting.items()}
            done, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=left_s)
            for reference in done:
                self._finish_start(waiting[reference])
            now = time.monotonic()
            if now >= deadline or (self._active and now >= hopeless):
                return

    def _finish_start(self, slot: int) -> None:
        """A worker has ended its start, well or by dying; then another one is started."""
        try:
            node = ray.get(self._starting.pop(slot))
        except _LOSS_ERRORS as error:
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

    def _find_slots(self) -> bool:
        """Whether a node has room for one of those that are awaited, as far as Ray knows by now.
        Whoever has lost its node starts anew, for wherever there will be room."""
        found = False
        for slot in list(self._starting):
            state = placement_group_table(self._groups[slot])["state"]
            found = found or state == "CREATED"
            if state == "RESCHEDULING":
                remove_placement_group(self._groups[slot])
                self._groups[slot] = self._reserve(slot)
                self._start(slot)
        return found

    def _reserve(self, slot: int) -> Any:
        return placement_group([self._bundles[slot]], strategy=self._strategy)

    def _describe_shortage(self) -> str:
        wanted = self._describe_resources(self._cpus, self._gpus)
        return f"(each takes {wanted} of a node; the cluster has {self._describe_cluster()} in all)"

    def _describe_cluster(self) -> str:
        return self._describe_resources(_cluster_total("CPU"), _cluster_total("GPU"))

    def _describe_resources(self, cpus: float, gpus: float) -> str:
        """For a sentence; GPUs only where workers take any."""
        counts = {"CPU": cpus} | ({"GPU": gpus} if self._gpus else {})
        return " and ".join(f"{n:.0f} {what}{'' if n == 1 else 's'}" for what, n in counts.items())

    def _start(self, slot: int) -> None:
        if (old := self._actors.get(slot)) is not None:
            ray.kill(old)
        where = PlacementGroupSchedulingStrategy(self._groups[slot], placement_group_bundle_index=0)
        options = {
            "num_cpus": self._cpus,
            "num_gpus": self._gpus,
            "max_restarts": 0,
            "scheduling_strategy": where,
            "concurrency_groups": {"write": 1},
        }
        self._actors[slot] = ray.remote(**options)(QuantizeWorker).remote()
        self._starting[slot] = self._actors[slot].ready.remote()


def is_loss(error: BaseException | None) -> bool:
    """Whether a worker or a node was lost; also where the call failed only because it was given
    the result of one that died."""
    while isinstance(error, RayTaskError) and not isinstance(error, _LOSS_ERRORS):
        error = error.cause
    return isinstance(error, _LOSS_ERRORS)


def _cause(error: BaseException) -> BaseException:
    """What to raise for a call that failed: the user's mistake itself, or all that Ray knows."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, IntServeError) else error


def _is_alive(actor: Any) -> bool:
    try:
        ray.get(actor.ready.remote())
    except _LOSS_ERRORS:
        return False
    return True


def _cluster_total(resource: str) -> float:
    """What the cluster has of it, whoever uses it."""
    return float(ray.cluster_resources().get(resource, 0))
