"""One copy of an engine per node of a Ray cluster: a task on each, lost ones run again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError, TaskUnschedulableError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.connect import connect
from deepseek.errors import IntServeError, first_line
from quant_jobs.ray_losses import LOSS_ERRORS, cause_of, is_loss
from quant_jobs.targets.sharded import Note, Progress
from quant_jobs.targets.staging import NodeCopy, copy_here

#: Losses of the task of a node that is still there before it counts as failed.
MAX_LOSSES = 3
_POLL_S = 1.0


def stage_on_nodes(
    engine: Path, place: str, digest: str, workers: int, progress: Progress, note: Note
) -> list[NodeCopy]:
    """Copy the engine on every node that has CPUs or GPUs, also on those that join meanwhile.
    Returns a copy for each, in the order in which Ray knows them; reserves no CPUs.

    Raises:
        IntServeError: there is no such node.
    """
    with connect(num_cpus=workers):
        return _Stage(engine, place, digest, progress, note).run()


class _Stage:
    def __init__(
        self, engine: Path, place: str, digest: str, progress: Progress, note: Note
    ) -> None:
        self._arguments = (engine, place, digest)
        self._progress, self._note = progress, note
        self._addresses: dict[str, str] = {}  # by node id
        self._running: dict[Any, str] = {}  # reference of a result -> node id
        self._copies: dict[str, NodeCopy] = {}  # by node id
        self._losses: Counter[str] = Counter()

    def run(self) -> list[NodeCopy]:
        self._start_missing()
        if not self._running:
            raise IntServeError(
                "the cluster has no node with CPUs or GPUs that could have a copy; add nodes, then "
                "run the same command again"
            )
        while self._running:
            self._progress(len(self._copies), len(self._copies) + len(self._running))
            finished, _ = ray.wait(list(self._running), num_returns=1, timeout=_POLL_S)
            for reference in finished:
                self._take(reference)
            self._leave_dead_nodes()
            self._start_missing()
        self._progress(len(self._copies), len(self._copies))
        there = _nodes()
        return [
            copy if node in there else copy.model_copy(update={"has_left": True})
            for node, copy in self._copies.items()
        ]

    def _start_missing(self) -> None:
        """Start the copy of every node that has none and is not at it."""
        busy, nodes = set(self._running.values()), _nodes()
        for node, address in nodes.items():
            if node in self._copies or node in busy:
                continue
            if self._addresses and node not in self._addresses:
                self._note(f"node {node[:12]} ({address}) joined and gets a copy too")
            task = ray.remote(_copy_on_node).options(
                num_cpus=0,
                max_retries=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            )
            self._running[task.remote(*self._arguments, node, address)] = node
        self._addresses |= nodes

    def _take(self, reference: Any) -> None:
        node = self._running.pop(reference)
        try:
            self._copies[node] = ray.get(reference)
            return
        except (*LOSS_ERRORS, TaskUnschedulableError, RayTaskError) as error:
            if not is_loss(error) and not isinstance(error, TaskUnschedulableError):
                raise cause_of(error) from None
            reason = first_line(error)
        if node not in _nodes():
            self._leave(node)
            return
        copy = self._no_copy(node)
        self._losses[node] += 1
        if self._losses[node] >= MAX_LOSSES:
            problem = f"its worker was lost {MAX_LOSSES} times ({reason}); see Ray's logs there"
            self._copies[node] = copy.model_copy(update={"problem": problem})
            return
        self._note(f"{copy.name} lost its worker ({reason}); its copy goes on")

    def _leave_dead_nodes(self) -> None:
        """Give up the tasks of nodes that are dead. Ray itself would wait for the answer of a
        worker that has outlived its node, frozen or without a network."""
        nodes = _nodes()
        for reference, node in list(self._running.items()):
            if node not in nodes:
                del self._running[reference]
                self._leave(node)

    def _leave(self, node: str) -> None:
        copy = self._no_copy(node)
        self._note(f"{copy.name} left the cluster before its copy was whole")
        self._copies[node] = copy.model_copy(update={"problem": "no copy", "has_left": True})

    def _no_copy(self, node: str) -> NodeCopy:
        return NodeCopy(node=node, address=self._addresses[node], directory=self._arguments[1])


def _nodes() -> dict[str, str]:
    """Address by id of the nodes that are alive and have CPUs or GPUs."""
    return {
        node["NodeID"]: node["NodeManagerAddress"]
        for node in ray.nodes()
        if node["Alive"] and (node["Resources"].get("CPU") or node["Resources"].get("GPU"))
    }


def _copy_on_node(engine: Path, place: str, digest: str, node: str, address: str) -> NodeCopy:
    """On the node."""
    return copy_here(engine, place, digest, node, address)
