"""Whether the replicas of a service find room on the nodes that are there, before any is started.

Ray and Serve wait for GPUs without a word. Here the wait is one sentence: which label, how many
GPUs are needed, how many are there, and who holds them. Pure functions of a table of nodes;
node_table.py reads it from a cluster.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.connect import Placement

#: Resources are compared with this much to spare: Ray counts in ten-thousandths.
_EPSILON = 1e-4
#: Holders, and kinds of nodes, that one sentence names.
_NAMED = 4

Resources = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class NodeRoom:
    """One node: Ray's id, its address, the labels that its owner gave it, and its resources by name
    (`GPU`, `CPU`), all and free ones."""

    node_id: str
    address: str
    labels: Mapping[str, str]
    total: Resources
    free: Resources

    @property
    def name(self) -> str:
        """For people."""
        return f"node {self.node_id[:8]} ({self.address})"

    def has(self, labels: Mapping[str, str]) -> bool:
        return all(self.labels.get(name) == value for name, value in labels.items())


@dataclass(frozen=True, slots=True)
class Holder:
    """What somebody holds on one node. `name` is for people: `actor Trainer`."""

    node_id: str
    name: str
    resources: Resources


@dataclass(frozen=True, slots=True)
class Demand:
    """`replicas` of a pool, each with one placement, of amounts above 0, on nodes with `labels`."""

    pool: str
    replicas: int
    placement: Placement
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def gpus(self) -> int:
        """GPUs of one replica."""
        return round(sum(bundle.get("GPU", 0.0) for bundle in self.placement.bundles))

    def unit(self, kind: str) -> str:
        """What one replica needs of a kind of resource, in words."""
        bundles = self.placement.bundles
        amount = _amount(bundles[0].get(kind, 0.0), kind)
        nodes = "one node" if len(bundles) == 1 else f"each of {len(bundles)} nodes"
        return f"{amount} on {nodes}"

    @property
    def where(self) -> str:
        """Which nodes may have it, in words."""
        return f"nodes labeled {_labels(self.labels)}" if self.labels else "nodes"


def shortage(
    demands: Sequence[Demand], nodes: Sequence[NodeRoom], holders: Sequence[Holder]
) -> str | None:
    """Why these replicas cannot all be placed now, in one sentence; None where they can.

    Replicas are placed one after another, those that need the most GPUs first, each on the node
    where it leaves the fewest free.
    """
    free = {node.node_id: dict(node.free) for node in nodes}
    taken: list[Holder] = list(holders)
    for demand in sorted(demands, key=lambda d: (-_largest(d), -len(d.labels))):
        placed, before, held = 0, {name: dict(room) for name, room in free.items()}, list(taken)
        while placed < demand.replicas:
            chosen = _place(demand, nodes, free)
            if chosen is None:
                return _sentence(demand, placed, nodes, free, before, held)
            for node_id, bundle in zip(chosen, demand.placement.bundles, strict=True):
                for name, amount in bundle.items():
                    free[node_id][name] = free[node_id].get(name, 0.0) - amount
                taken.append(Holder(node_id, f"pool {demand.pool}", bundle))
            placed += 1
    return None


def _largest(demand: Demand) -> float:
    return max(bundle.get("GPU", 0.0) for bundle in demand.placement.bundles)


def _place(
    demand: Demand, nodes: Sequence[NodeRoom], free: Mapping[str, Resources]
) -> list[str] | None:
    """The node of each bundle of one replica, None where there is no room. A placement has one
    bundle, or bundles for as many nodes."""
    chosen: list[str] = []
    for bundle in demand.placement.bundles:
        fitting = [
            node
            for node in nodes
            if node.has(demand.labels)
            and node.node_id not in chosen
            and _fits(bundle, free[node.node_id])
        ]
        if not fitting:
            return None
        best = min(fitting, key=lambda node: (free[node.node_id].get("GPU", 0.0), node.node_id))
        chosen.append(best.node_id)
    return chosen


def _fits(bundle: Resources, room: Resources) -> bool:
    return all(room.get(name, 0.0) >= amount - _EPSILON for name, amount in bundle.items())


def _sentence(
    demand: Demand,
    placed: int,
    nodes: Sequence[NodeRoom],
    left: Mapping[str, Resources],
    free: Mapping[str, Resources],
    holders: Sequence[Holder],
) -> str:
    """Why `demand` gets no more than `placed` replicas. `left` is what they leave of `free`."""
    there = [node for node in nodes if node.has(demand.labels)]
    key = f"pools.{demand.pool}"
    if not there:
        wanted = _labels(demand.labels)
        return (
            f"{key}.labels: no node of the cluster is labeled {wanted}; there are "
            f"{_kinds(nodes, demand.labels)}; start Ray on the right ones with `ray start "
            f"--labels={wanted}`, or correct the labels"
        )
    bundles = demand.placement.bundles
    able = [node for node in there if _fits(bundles[0], node.total)]
    if not able:
        kind = _short(bundles[0], [node.total for node in there])
        most = max(node.total.get(kind, 0.0) for node in there)
        return (
            f"pool {demand.pool} needs {demand.unit(kind)} for each replica, and the largest of "
            f"{len(there)} {demand.where} has {_amount(most, kind)}; use larger nodes, or lower "
            f"{key}.{kind.lower()}s or what its engine was built for"
        )
    kind = _short(bundles[0], [left[node.node_id] for node in able])
    needed = bundles[0].get(kind, 0.0) * len(bundles) * demand.replicas
    sentence = (
        f"pool {demand.pool} needs {_amount(needed, kind)} on {demand.where}: {demand.replicas} "
        f"{_plural(demand.replicas, 'replica')} of {demand.unit(kind)}"
    )
    total = sum(node.total.get(kind, 0.0) for node in there)
    copies = sum(_copies(bundles[0], node.total) for node in able)
    spread = copies if len(bundles) == 1 else len(able) // len(bundles)
    lower = f"lower {key}.replicas to {placed} or " if placed else ""
    if spread < demand.replicas:
        count = f"{len(there)} {_plural(len(there), 'node')}"
        return f"{sentence}, and there are {_amount(total, kind)} on {count}; {lower}add nodes"
    now = sum(free[node.node_id].get(kind, 0.0) for node in there)
    return (
        f"{sentence}; {_amount(total, kind)} are there and {now:g} are free"
        f"{_held(there, kind, holders)}; stop what holds them, {lower}add nodes"
    ).replace("them, add", "them or add")


def _held(there: Sequence[NodeRoom], kind: str, holders: Sequence[Holder]) -> str:
    """` (actor A holds 8 GPUs on node N)` for the kind of resource that is short."""
    names = {node.node_id: node.name for node in there}
    amounts: dict[tuple[str, str], float] = {}
    for holder in holders:
        if holder.node_id in names and (amount := holder.resources.get(kind, 0.0)) > 0:
            place = holder.name, names[holder.node_id]
            amounts[place] = amounts.get(place, 0.0) + amount
    rows = sorted(amounts.items(), key=lambda row: (-row[1], row[0]))
    words = [f"{who} holds {_amount(amount, kind)} on {on}" for (who, on), amount in rows[:_NAMED]]
    if len(rows) > _NAMED:
        words.append(f"and {len(rows) - _NAMED} more")
    return f" ({', '.join(words)})" if words else ""


def _kinds(nodes: Sequence[NodeRoom], labels: Mapping[str, str]) -> str:
    """The nodes by what they say under these labels' names."""
    if not nodes:
        return "no nodes"
    kinds = Counter(
        ", ".join(f"{name}={node.labels[name]}" for name in labels if name in node.labels)
        for node in nodes
    )
    words = [
        f"{count} with {kind}" if kind else f"{count} without {' and '.join(labels)}"
        for kind, count in kinds.most_common(_NAMED)
    ]
    return ", ".join(words)


def _copies(bundle: Resources, room: Resources) -> int:
    """How often a bundle fits into a node."""
    counts = [int((room.get(kind, 0.0) + _EPSILON) // amount) for kind, amount in bundle.items()]
    return min(counts, default=0)


def _short(bundle: Resources, rooms: Sequence[Resources]) -> str:
    """The kind of resource that keeps a bundle from every one of these rooms: GPUs before CPUs."""
    for kind in ("GPU", "CPU"):
        amount = bundle.get(kind, 0.0)
        if amount and all(room.get(kind, 0.0) < amount - _EPSILON for room in rooms):
            return kind
    return "GPU" if "GPU" in bundle else "CPU"


def _amount(count: float, kind: str) -> str:
    return f"{count:g} {_plural(count, kind)}"


def _plural(count: float, word: str) -> str:
    return word if count == 1 else f"{word}s"


def _labels(labels: Mapping[str, str]) -> str:
    return ",".join(f"{name}={value}" for name, value in sorted(labels.items()))
