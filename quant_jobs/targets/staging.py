"""Stage an engine: copy it to a disk of every node of the cluster (`build --stage DIR`).

Every node copies for itself what it lacks (`local_copy.py`), from the storage that all share. A
node that cannot is one line of the report, which names it, and spoils no other copy. Nodes that
have neither CPUs nor GPUs (a head that only schedules) serve nothing and get no copy. A node that
joins meanwhile gets one; one that leaves is reported.

`{node}` in DIR stands for Ray's id of the node, for nodes that share a file system: without it
they would write the same directory. Ray gives a machine another id at every start.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from deepseek.artifact.engine_manifest import read_engine_manifest
from deepseek.errors import IntServeError, OutputError
from deepseek.outputs import format_bytes
from quant_jobs.targets.local_copy import copy_engine
from quant_jobs.targets.sharded import Note, Progress

PLACEHOLDER = "{node}"


class NodeCopy(BaseModel):
    """The copy on one node. `node` is Ray's id, or this machine's name without Ray; `problem` is a
    sentence where there is no whole copy. `has_left` says that the node is no longer there, with
    its copy or without."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    node: str
    address: str
    directory: str
    copied_bytes: int = 0
    kept_bytes: int = 0
    seconds: float = 0.0
    problem: str | None = None
    has_left: bool = False

    @property
    def name(self) -> str:
        """For people: the start of the id, and the address."""
        return f"node {self.node[:12]} ({self.address})"

    @property
    def gb_per_s(self) -> float:
        """GB per second that were copied or verified."""
        return (self.copied_bytes + self.kept_bytes) / 1e9 / max(self.seconds, 1e-9)

    def describe(self) -> str:
        """One line for people."""
        if self.has_left:
            return f"{self.name} left the cluster"
        if self.problem is not None:
            return f"{self.name}: {self.problem}"
        return (
            f"{self.name}: {self.directory}, {format_bytes(self.copied_bytes)} copied and "
            f"{format_bytes(self.kept_bytes)} kept in {self.seconds:.1f} s, "
            f"{self.gb_per_s:.2f} GB/s"
        )


class StageReport(BaseModel):
    """The copies of one engine, by node."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    engine_digest: str
    nodes: tuple[NodeCopy, ...]

    def describe(self) -> list[str]:
        """A line per node for people."""
        return [node.describe() for node in self.nodes]

    def check(self) -> None:
        """Check that every node that is still there has its copy.

        Raises:
            OutputError: some have none; the sentence names each with its reason.
        """
        failed = [node for node in self.nodes if node.problem is not None and not node.has_left]
        if not failed:
            return
        reasons = "; ".join(node.describe() for node in failed)
        there = sum(1 for node in self.nodes if not node.has_left)
        raise OutputError(f"{len(failed)} of {there} nodes have no copy of the engine: {reasons}")


def stage_engine(
    engine: Path,
    local: Path,
    workers: int,
    progress: Progress,
    *,
    note: Note = lambda line: None,
) -> StageReport:
    """Copy the engine to the directory `local` of every node, `{node}` in it replaced; with
    `workers` 0 of this machine alone, without Ray. `progress` counts nodes, without Ray tensor
    files. A node without a copy is in the report and raises nothing.

    Raises:
        ArtifactError: `engine` is no engine.
        IntServeError: the cluster has no node that could have a copy.
    """
    engine, digest = engine.absolute(), read_engine_manifest(engine).digest
    place = str(local.absolute())
    if workers:
        from quant_jobs.targets.ray_staging import stage_on_nodes

        nodes = stage_on_nodes(engine, place, digest, workers, progress, note)
    else:
        name = socket.gethostname()
        nodes = [copy_here(engine, place, digest, name, "this machine", progress)]
    return StageReport(engine_digest=digest, nodes=tuple(nodes))


def copy_here(
    engine: Path,
    place: str,
    digest: str,
    node: str,
    address: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> NodeCopy:
    """Copy the engine to this node; what keeps it from that is in the result."""
    local = Path(place.replace(PLACEHOLDER, node))
    copy = NodeCopy(node=node, address=address, directory=str(local))
    try:
        figures = copy_engine(engine, local, digest, progress)
    except IntServeError as error:
        return copy.model_copy(update={"problem": str(error)})
    except OSError as error:
        path, reason = error.filename or local, (error.strerror or str(error)).lower()
        return copy.model_copy(update={"problem": f"{path} cannot be used ({reason})"})
    return copy.model_copy(update=dict(figures))
