"""What one worker or one engine replica reserves of a cluster: bundles, and how they lie.

Plain values without Ray, so that a plan and a test need no cluster.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cluster.hardware import GPUS_PER_NODE

Strategy = Literal["SPREAD", "STRICT_PACK", "STRICT_SPREAD"]


@dataclass(frozen=True, slots=True)
class Placement:
    """Arguments of `ray.util.placement_group`, or of a Serve deployment's placement group."""

    bundles: tuple[dict[str, float], ...]
    strategy: Strategy


def worker_placement(num_workers: int, *, cpus: float = 1, gpus: float = 0) -> Placement:
    """One bundle per quantize worker, spread over the nodes: workers read their shares of the
    source over different network links, and the loss of a node costs as few workers as possible."""
    assert num_workers > 0, "a job has at least one worker"
    bundle = {"CPU": float(cpus)} | ({"GPU": float(gpus)} if gpus else {})
    return Placement(tuple(dict(bundle) for _ in range(num_workers)), "SPREAD")


def engine_placement(num_gpus: int, *, cpus_per_node: float = 8) -> Placement:
    """Bundles of one engine replica: one per node, with all the GPUs that it takes there.

    Tensor parallelism up to 8 stays inside one node (STRICT_PACK), on NVLink. Above, the replica
    takes whole nodes, one bundle per node (STRICT_SPREAD): TP-16 is two bundles of 8 GPUs. The
    replica's actor runs in bundle 0. Without GPUs there is one CPU bundle.
    """
    if num_gpus <= GPUS_PER_NODE:
        gpus = {"GPU": float(num_gpus)} if num_gpus else {}
        return Placement(({**gpus, "CPU": float(cpus_per_node)},), "STRICT_PACK")
    assert num_gpus % GPUS_PER_NODE == 0, "more than one node is whole nodes"
    bundle = {"GPU": float(GPUS_PER_NODE), "CPU": float(cpus_per_node)}
    num_nodes = num_gpus // GPUS_PER_NODE
    return Placement(tuple(dict(bundle) for _ in range(num_nodes)), "STRICT_SPREAD")
