"""Whether replicas find room is a function of a table of nodes, and a shortage is one sentence."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.connect import Placement, engine_placement
from cluster.reservation import Demand, Holder, NodeRoom, shortage

H800 = {"hardware": "H800-80GB"}


def node(name: str, gpus: float = 8, free: float | None = None, **labels: str) -> NodeRoom:
    total = {"GPU": gpus, "CPU": 64.0}
    left = total if free is None else total | {"GPU": free}
    return NodeRoom(name, f"10.0.0.{name[-1]}", labels, total, left)


def demand(
    replicas: int = 1, gpus: int = 8, pool: str = "default", labels: Any = H800, cpus: float = 1
) -> Demand:
    return Demand(pool, replicas, engine_placement(gpus, cpus_per_node=cpus), labels)


def test_replicas_that_find_room_are_no_shortage() -> None:
    nodes = [node(f"n{i}", **H800) for i in range(3)]
    assert shortage([demand(3)], nodes, []) is None
    assert shortage([demand(1, gpus=16)], nodes, []) is None
    assert shortage([demand(6, gpus=4)], nodes, []) is None
    assert shortage([], [], []) is None


def test_small_replicas_do_not_take_the_whole_node_that_a_large_one_needs() -> None:
    nodes = [node("n1", **H800), node("n2", free=4, **H800)]
    small, large = demand(1, gpus=4, pool="small"), demand(1, gpus=8, pool="large")
    assert shortage([small, large], nodes, []) is None


@pytest.mark.parametrize(
    ("demands", "nodes", "holders", "sentence"),
    [
        (
            [demand(1)],
            [node("n1", hardware="H20-96GB"), node("n2", hardware="H20-96GB"), node("n3", 0)],
            [],
            "pools.default.labels: no node of the cluster is labeled hardware=H800-80GB; there are "
            "2 with hardware=H20-96GB, 1 without hardware; start Ray on the right ones with `ray "
            "start --labels=hardware=H800-80GB`, or correct the labels",
        ),
        (
            [demand(1)],
            [node("n1", 4, **H800), node("n2", 2, **H800)],
            [],
            "pool default needs 8 GPUs on one node for each replica, and the largest of 2 nodes "
            "labeled hardware=H800-80GB has 4 GPUs; use larger nodes, or lower pools.default.gpus "
            "or what its engine was built for",
        ),
        (
            [demand(1, cpus=96)],
            [node("n1", **H800)],
            [],
            "pool default needs 96 CPUs on one node for each replica, and the largest of 1 nodes "
            "labeled hardware=H800-80GB has 64 CPUs; use larger nodes, or lower pools.default.cpus "
            "or what its engine was built for",
        ),
        (
            [demand(3)],
            [node("n1", **H800), node("n2", **H800)],
            [],
            "pool default needs 24 GPUs on nodes labeled hardware=H800-80GB: 3 replicas of 8 GPUs "
            "on one node, and there are 16 GPUs on 2 nodes; lower pools.default.replicas to 2 or "
            "add nodes",
        ),
        (
            [demand(2)],
            [node("n1", **H800), node("n2", free=0, **H800), node("n3", **H800 | {"zone": "b"})],
            [Holder("n2", "actor Trainer", {"GPU": 8.0, "CPU": 1.0})],
            None,
        ),
        (
            [demand(2)],
            [node("n1", **H800), node("n2", free=0, **H800), node("n3", free=3, **H800)],
            [
                Holder("n2", "placement group train", {"GPU": 4.0}),
                Holder("n2", "placement group train", {"GPU": 4.0}),
                Holder("n3", "actor Notebook", {"GPU": 5.0}),
                Holder("n9", "actor Elsewhere", {"GPU": 8.0}),
                Holder("n1", "actor Frugal", {"CPU": 1.0}),
            ],
            "pool default needs 16 GPUs on nodes labeled hardware=H800-80GB: 2 replicas of 8 GPUs "
            "on one node; 24 GPUs are there and 11 are free (placement group train holds 8 GPUs on "
            "node n2 (10.0.0.2), actor Notebook holds 5 GPUs on node n3 (10.0.0.3)); stop what "
            "holds them, lower pools.default.replicas to 1 or add nodes",
        ),
        (
            [demand(1, gpus=16, labels={})],
            [node("n1"), node("n2", free=7)],
            [Holder("n2", "actor One", {"GPU": 1.0})],
            "pool default needs 16 GPUs on nodes: 1 replica of 8 GPUs on each of 2 nodes; 16 GPUs "
            "are there and 15 are free (actor One holds 1 GPU on node n2 (10.0.0.2)); stop what "
            "holds them or add nodes",
        ),
        (
            [demand(1, gpus=16, labels={})],
            [node("n1"), node("n2", 4)],
            [],
            "pool default needs 16 GPUs on nodes: 1 replica of 8 GPUs on each of 2 nodes, and "
            "there are 12 GPUs on 2 nodes; add nodes",
        ),
        (
            [demand(1, pool="a"), demand(1, pool="b")],
            [node("n1", **H800)],
            [],
            "pool b needs 8 GPUs on nodes labeled hardware=H800-80GB: 1 replica of 8 GPUs on one "
            "node; 8 GPUs are there and 0 are free (pool a holds 8 GPUs on node n1 (10.0.0.1)); "
            "stop what holds them or add nodes",
        ),
    ],
)
def test_a_shortage_says_which_label_how_many_and_who_holds_them(
    demands: list[Demand], nodes: list[NodeRoom], holders: list[Holder], sentence: str | None
) -> None:
    assert shortage(demands, nodes, holders) == sentence


def test_a_sentence_names_four_holders_and_counts_the_others() -> None:
    holders = [Holder("n1", f"actor A{i}", {"GPU": 1.0}) for i in range(8)]
    told = shortage([demand(1)], [node("n1", free=0, **H800)], holders)
    assert told is not None
    assert told.count("holds 1 GPU") == 4
    assert "and 4 more" in told


def test_an_actor_without_gpus_wants_its_label_and_its_cpus() -> None:
    wanted = Demand("default", 1, Placement(({"CPU": 2.0},), "STRICT_PACK"), H800)
    assert shortage([wanted], [node("n1", 0, **H800)], []) is None
    assert "no node of the cluster is labeled" in (shortage([wanted], [node("n1", 0)], []) or "")
