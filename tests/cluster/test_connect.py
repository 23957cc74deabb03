"""Connecting to a real Ray: ours is stopped, a foreign one is left running. And placement."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, remove_placement_group
from support.processes import title, tree

from cluster.bundles import Placement, engine_placement, worker_placement
from cluster.connect import connect
from deepseek.errors import DeployError

pytestmark = pytest.mark.ray


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch):
    """This process is connected to none, and none is named."""
    assert not ray.is_initialized(), "another test's Ray is still connected"
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_a_local_ray_is_started_and_stopped_and_nested_connections_share_it(no_ray: None) -> None:
    on_sigterm = signal.getsignal(signal.SIGTERM)
    threads: list[str] = []
    with connect(
        num_cpus=3, meanwhile=lambda: threads.append(threading.current_thread().name)
    ) as ours:
        assert ours.started
        assert len(threads) == 1
        assert threads[0] != threading.main_thread().name, "it runs beside the start"
        words = " ".join(map(title, tree(os.getpid())))
        assert "raylet" in words
        for unused in ("log_monitor.py", "autoscaler", "dashboard/dashboard.py"):
            assert unused not in words, "nobody asks it"
        assert signal.getsignal(signal.SIGTERM) == on_sigterm, "Ray's own ends with code 15"
        assert ray.cluster_resources()["CPU"] == 3
        with connect(num_cpus=1, meanwhile=lambda: threads.append("again")) as inner:
            assert not inner.started
            assert inner.address == ours.address
        assert threads[1:] == ["again"]
        assert ray.is_initialized(), "the inner connection stopped what it did not start"
        assert ours.describe() == f"started a local Ray at {ours.address}"
    assert not ray.is_initialized()
    ours.close()


def test_what_fails_beside_the_start_ends_the_ray_and_is_the_error(no_ray: None) -> None:
    def fail() -> None:
        raise DeployError("imported before")

    with pytest.raises(DeployError, match="^imported before$"):
        connect(num_cpus=1, meanwhile=fail)
    assert not ray.is_initialized()
    assert "raylet" not in " ".join(map(title, tree(os.getpid())))
    assert "token-" not in os.environ.get("RAY_AUTH_TOKEN_PATH", "")


@pytest.mark.parametrize(
    ("given", "added"), [pytest.param(None, 0, marks=pytest.mark.slow), ("3", 3)]
)
def test_workers_of_a_local_ray_are_as_nice_as_their_driver_or_as_the_user_says(
    given: str | None, added: int, root: Path
) -> None:
    """In a driver of its own, which is nicer than this process."""
    program = (
        "import os, ray\n"
        "from cluster.connect import connect\n"
        "with connect(num_cpus=1):\n"
        "    theirs = ray.get(ray.remote(lambda: os.nice(0)).remote())\n"
        "print(theirs - os.nice(0))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in
                   ("RAY_ADDRESS", "RAY_worker_niceness")}  # fmt: skip
    done = subprocess.run(
        ["nice", "-n", "2", sys.executable, "-c", program],
        cwd=root,
        env=environment if given is None else environment | {"RAY_worker_niceness": given},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == f"{added}\n", done.stderr


def test_a_foreign_ray_is_left_running(no_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two nodes of a foreign cluster, found by address and by RAY_ADDRESS; GPUs are pretended."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "num_gpus": 8, "include_dashboard": False},
    )
    try:
        cluster.add_node(num_cpus=1, num_gpus=8)
        with connect(cluster.address) as found:
            assert not found.started
            assert found.describe() == f"using the Ray at {cluster.address}"
            _two_nodes_hold_one_tp16_engine()
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        with connect(num_cpus=64) as again:
            assert again.address == cluster.address
            assert ray.cluster_resources()["CPU"] == 2
    finally:
        cluster.shutdown()


def _two_nodes_hold_one_tp16_engine() -> None:
    placement = engine_placement(16, cpus_per_node=1)
    group = placement_group(list(placement.bundles), strategy=placement.strategy)
    assert group.wait(30), "two nodes of 8 GPUs must hold a TP-16 replica"
    nodes = ray.util.placement_group_table(group)["bundles_to_node_id"].values()
    assert len(set(nodes)) == 2
    remove_placement_group(group)


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("127.0.0.1:9", "refused"),
        ("nonsense", "it is not HOST:PORT of a Ray head"),
        ("http://127.0.0.1:8265", "it is not HOST:PORT of a Ray head"),
        ("127.0.0.1:99999", "no Ray answers"),
    ],
)
def test_a_wrong_address_is_one_sentence_at_once(
    address: str, reason: str, no_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = time.monotonic()
    for give in ("argument", "environment"):
        if give == "environment":
            monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(DeployError) as caught:
            connect(address if give == "argument" else None)
        assert address in str(caught.value)
        assert reason in str(caught.value)
        assert "correct --address or RAY_ADDRESS" in str(caught.value)
    assert time.monotonic() - started < 30


def test_workers_are_spread() -> None:
    assert worker_placement(3) == Placement(({"CPU": 1.0},) * 3, "SPREAD")
    assert worker_placement(2, cpus=4, gpus=1).bundles == ({"CPU": 4.0, "GPU": 1.0},) * 2


@pytest.mark.parametrize(
    ("gpus", "bundles", "strategy"),
    [(0, 1, "STRICT_PACK"), (1, 1, "STRICT_PACK"), (8, 1, "STRICT_PACK"), (16, 2, "STRICT_SPREAD")],
)
def test_an_engine_takes_whole_nodes_beyond_one(gpus: int, bundles: int, strategy: str) -> None:
    placement = engine_placement(gpus)
    assert placement.strategy == strategy
    assert len(placement.bundles) == bundles
    assert sum(bundle.get("GPU", 0) for bundle in placement.bundles) == gpus
    assert all(bundle["CPU"] > 0 for bundle in placement.bundles)
