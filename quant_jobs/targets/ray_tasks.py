"""The tasks of a build on Ray: so many at a time, spread over the nodes, lost ones run again.

Ray's own retries are off: a task that is lost with its worker or node is submitted again here,
where it is counted and reported, and not for ever.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Set
from typing import Any

import ray
from ray.exceptions import RayTaskError

from cluster.connect import connect
from deepseek.errors import IntServeError, first_line
from quant_jobs.ray_losses import LOSS_ERRORS, cause_of, cluster_total, is_loss
from quant_jobs.targets.sharded import BuiltFile, Note, Task, TaskRunner

#: Losses of one file's task before the build ends.
MAX_LOSSES = 4
#: Seconds for which Ray may itself report the tasks of a dead node. It does not where a worker has
#: outlived its node (frozen, or without a network): it would wait for the answer.
NODE_GRACE_S = 10.0
#: Longest wait for a node with a CPU when the cluster has none.
NODE_TIMEOUT_S = 600.0
_POLL_S = 1.0

Finish = Callable[[Task, BuiltFile | None], None]


def run_on_ray(
    runner: TaskRunner, tasks: deque[Task], finish: Finish, workers: int, note: Note
) -> None:
    """Run tasks until `tasks` is empty, at most `workers` at a time; `finish` takes each result in
    this process and may add tasks. After an error the tasks that are running still finish.

    Raises:
        IntServeError: of a task; a task was lost too often; or the cluster has no CPU.
    """
    with connect(num_cpus=workers):
        _Tasks(runner, tasks, finish, note).run(workers)


class _Tasks:
    def __init__(self, runner: TaskRunner, tasks: deque[Task], finish: Finish, note: Note) -> None:
        self._runner, self._shared_runner = runner, ray.put(runner)
        self._tasks, self._finish, self._note = tasks, finish, note
        self._running: dict[Any, Task] = {}  # by the reference of the result
        self._submitted: dict[Any, float] = {}  # by the reference of the result
        self._losses: Counter[str] = Counter()  # by key
        self._failed: BaseException | None = None
        self._last_cpu = time.monotonic()
        self._dead: dict[str, float] = {}  # id of a node -> when it was first seen to be dead

    def run(self, workers: int) -> None:
        remote = ray.remote(_run_task).options(
            num_cpus=1, max_retries=0, scheduling_strategy="SPREAD"
        )
        self._note(self._describe(workers))
        while self._running or (self._tasks and self._failed is None):
            while self._tasks and self._failed is None and len(self._running) < workers:
                task = self._tasks.popleft()
                self._runner.forget_node(task.key)
                reference = remote.remote(self._shared_runner, task)
                self._running[reference] = task
                self._submitted[reference] = time.monotonic()
            finished, _ = ray.wait(list(self._running), num_returns=1, timeout=_POLL_S)
            for reference in finished:
                self._take(reference)
            self._check_nodes()
        if self._failed is not None:
            raise self._failed
        if total := sum(self._losses.values()):
            self._note(f"{total} tasks were lost with their workers or nodes, and run again")

    def _take(self, reference: Any) -> None:
        task = self._running.pop(reference)
        try:
            result = ray.get(reference)
        except (*LOSS_ERRORS, RayTaskError) as error:
            if is_loss(error):
                self._lose(task, first_line(error))
            else:
                self._failed = self._failed or cause_of(error)
            return
        try:
            self._finish(task, result)
        except IntServeError as error:
            self._failed = self._failed or error

    def _lose(self, task: Task, reason: str) -> None:
        """Count a lost task and put it back, first in line."""
        self._losses[task.key] += 1
        number = self._losses[task.key]
        if number >= MAX_LOSSES:
            self._failed = self._failed or IntServeError(
                f"the task that builds file {task.key} was lost {number} times with its worker or "
                f"node ({reason}); see Ray's logs on the nodes and whether they have memory for "
                "one layer per worker, then run the same command again to go on"
            )
            return
        self._note(f"lost the worker or node that had file {task.key} ({reason}); it is run again")
        self._tasks.appendleft(task)

    def _check_nodes(self) -> None:
        """Give up the tasks of dead nodes; and wait for a node where the cluster has lost all,
        though not for ever."""
        now = time.monotonic()
        for node in ray.nodes():
            if not node["Alive"]:
                self._dead.setdefault(node["NodeID"], now)
        gone = {node for node, since in self._dead.items() if now - since > NODE_GRACE_S}
        for reference, task in list(self._running.items()) if gone else ():
            node = self._runner.node_of(task.key)
            if node in gone:
                del self._running[reference]
                self._lose(task, f"node {node[:12]} is dead")
            elif node is None and self._may_be_lost(reference, gone):
                # Its worker may have stopped before it could say where it is. Were it only waiting
                # for a CPU, the same task twice would still write the same bytes.
                del self._running[reference]
                self._lose(task, "it had not begun when a node died")
        if cluster_total("CPU") >= 1:
            self._last_cpu = now
        elif now - self._last_cpu > NODE_TIMEOUT_S:
            raise IntServeError(
                f"the cluster has had no node with a CPU for {NODE_TIMEOUT_S:.0f} s; add nodes, "
                "then run the same command again to go on"
            )

    def _may_be_lost(self, reference: Any, gone: Set[str]) -> bool:
        """Whether a task that has not said where it is was submitted before one of these nodes
        died."""
        return any(self._submitted[reference] < self._dead[node] for node in gone)

    def _describe(self, workers: int) -> str:
        """`2 at a time on 4 CPUs of 3 nodes`; whether others have taken all CPUs."""
        cpus, free = cluster_total("CPU"), ray.available_resources().get("CPU", 0)
        nodes = sum(1 for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU"))
        text = f"{workers} at a time on {cpus:.0f} CPUs of {nodes} node{'s' if nodes > 1 else ''}"
        if cpus < 1:
            return f"{text}: waiting for nodes"
        return text if free >= 1 else f"{text}: all are in use, waiting for a free one"


def _run_task(runner: TaskRunner, task: Task) -> BuiltFile | None:
    """On a worker."""
    node = ray.get_runtime_context().get_node_id()
    runner.start(task.key, node, ray.util.get_node_ip_address())
    return runner.run(task)
