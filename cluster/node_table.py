"""Reads from the cluster that this process is connected to what reservation.py reasons about.

From Ray's GCS, which every cluster has: the State API needs a dashboard.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from cluster.reservation import Holder, NodeRoom

#: What a Serve deployment's placement groups are called.
_REPLICA = re.compile(r"SERVE_REPLICA::(?P<app>.*)#(?P<deployment>[^#]+)#(?P<id>[^#]+)")
_KINDS = ("GPU", "CPU")


def read_nodes() -> list[NodeRoom]:
    """The live nodes, with what is free of them now."""
    import ray
    from ray._private.state import available_resources_per_node

    free = available_resources_per_node()
    return [
        NodeRoom(
            node_id=node["NodeID"],
            address=node["NodeManagerAddress"],
            labels=dict(node.get("Labels") or {}),
            total=_of_kinds(node["Resources"]),
            free=_of_kinds(free.get(node["NodeID"], {})),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def read_holders() -> list[Holder]:
    """Who holds GPUs and CPUs: placement groups, and actors outside of any. Tasks are not among
    them: they end by themselves."""
    return [*_groups(), *_actors()]


def replica_of(holder: Holder) -> str | None:
    """The Serve deployment whose replica a holder is, None for anything else."""
    match = _REPLICA.search(holder.name)
    return match["deployment"] if match else None


def _groups() -> Iterator[Holder]:
    from ray.util.placement_group import placement_group_table

    for group in placement_group_table().values():
        if group["state"] not in ("CREATED", "RESCHEDULING"):
            continue
        name = group["name"] or group["placement_group_id"][:12]
        for index, node_id in group["bundles_to_node_id"].items():
            if node_id:
                yield Holder(node_id, f"placement group {name}", _of_kinds(group["bundles"][index]))


def _actors() -> Iterator[Holder]:
    from ray._private.state import state
    from ray.core.generated.gcs_pb2 import ActorTableData

    # Ray's own table of actors leaves out what they hold.
    accessor: Any = state._connect_and_get_accessor()
    for data in accessor.get_actor_table(None, "ALIVE"):
        actor = ActorTableData.FromString(data)
        resources = _of_kinds(dict(actor.required_resources))
        if actor.placement_group_id.strip(b"\xff") or not any(resources.values()):
            continue
        name = actor.name or actor.class_name
        yield Holder(actor.address.node_id.hex(), f"actor {name}", resources)


def _of_kinds(resources: dict[str, Any]) -> dict[str, float]:
    return {name: float(resources[name]) for name in _KINDS if name in resources}
