"""Engines on logical GPUs of real raylets: reserved, refused, loaded, killed, and nothing leaks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.configs import make_config
from support.deployed import Deployed
from support.ports import free_port
from support.raylets import Raylets
from support.serving import metric, wait_for

from serve_app.config import EchoOptions
from serve_app.proxy_environment import proxy_environment

pytestmark = [pytest.mark.ray, pytest.mark.heavy]

EIGHT = ",".join(map(str, range(8)))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Raylets]:
    """Two nodes of 8 GPUs of one kind, and one of another."""
    with (
        proxy_environment(make_config(echo=EchoOptions(), port=free_port())),
        Raylets(0, cpus=4) as made,
    ):
        for hardware in ("H800-80GB", "H800-80GB", "H20-96GB"):
            made.add_node(gpus=8, labels={"hardware": hardware})
        yield made


class Placed:
    """`support/placed.py`, and what its engines write down."""

    def __init__(self, cluster: Raylets, folder: Path, root: Path) -> None:
        self.port, self.folder, self.cluster = free_port(), folder, cluster
        self._process = subprocess.Popen(
            [sys.executable, str(root / "tests/support/placed.py"), str(self.port), str(folder)],
            cwd=root,
            env={
                **os.environ,
                "RAY_ADDRESS": cluster.address,
                "PYTHONPATH": f"{root}:{root / 'tests'}",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def say(self, command: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "it has ended"
        return json.loads(line)

    def ask(self, command: str) -> Any:
        self.say(command)
        return self.answer()

    def engines(self) -> dict[int, dict[str, Any]]:
        """What each engine that was started says of itself, by process."""
        words = [json.loads(path.read_text() or "null") for path in self.folder.glob("engine-*")]
        return {word["pid"]: word for word in words if word}

    def health(self) -> httpx.Response | None:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/health", timeout=5)
        except httpx.HTTPError:
            return None

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        finally:
            self._process.kill()
            assert self._process.stdout is not None
            self._process.stdout.close()


@pytest.fixture
def placed(cluster: Raylets, tmp_path: Path, root: Path) -> Iterator[Placed]:
    made = Placed(cluster, tmp_path, root)
    yield made
    made.close()


def loading(placed: Placed) -> Any:
    """What /health says of replicas that load, once there are two with a speed."""
    answer = placed.health()
    if answer is None or answer.status_code != 503:
        return None
    told = answer.json().get("loading", [])
    return answer if len(told) == 2 and all(one["eta_s"] is not None for one in told) else None


def test_replicas_reserve_their_gpus_and_say_how_far_they_are_and_what_dies_leaks_nothing(
    placed: Placed,
) -> None:
    first, second, other = placed.cluster.node_ids
    # A shortage is one sentence before anything starts.
    assert placed.ask("check 2") is None
    assert placed.ask("check 3") == (
        "pool default needs 24 GPUs on nodes labeled hardware=H800-80GB: 3 replicas of 8 GPUs on "
        "one node, and there are 16 GPUs on 2 nodes; lower pools.default.replicas to 2 or add nodes"
    )
    held = placed.ask("hold")
    assert held in (first, second), "Ray's own selector agrees with ours"
    told = wait_for(lambda: placed.ask("check 2"))
    assert "16 GPUs are there and 8 are free (" in told
    assert f"actor Trainer holds 8 GPUs on node {held[:8]}" in told
    placed.ask("release")
    wait_for(lambda: placed.ask("check 2") is None)

    # Loading is neither up nor failed.
    placed.say("serve 2")
    answer = wait_for(lambda: loading(placed), timeout_s=60)
    error = answer.json()["error"]["message"]
    assert error.startswith("no engine replica is ready: 2 are loading (reading the weights, ")
    assert "GB of 100.0 GB, about " in error
    one = answer.json()["loading"][0]
    assert one["total_bytes"] == 100 * 10**9
    assert 0 < one["done_bytes"] < one["total_bytes"]
    base = f"http://127.0.0.1:{placed.port}"
    assert httpx.get(f"{base}/live").status_code == 200
    metrics = httpx.get(f"{base}/metrics").text
    assert metric(metrics, "intserve_loading_expected_bytes", pool="default") == 200 * 10**9
    (placed.folder / "go").touch()
    assert placed.answer() is None
    health = wait_for(lambda: (h := placed.health()) is not None and h.status_code == 200 and h)
    assert "loading" not in health.json()

    # Each has the GPUs of a node of the label, and its process sees them.
    engines = placed.engines()
    assert {word["node"] for word in engines.values()} == {first, second}
    assert {word["gpus"] for word in engines.values()} == {EIGHT}
    table = placed.ask("table")
    assert {node: table["free"][node] for node in (first, second, other)} == {
        first: 0.0,
        second: 0.0,
        other: 8.0,
    }
    assert placed.ask("check 2") is None, "an update replaces what these hold"

    # One that dies is replaced on its own GPUs, and nothing else is reserved.
    victim = next(iter(engines))
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: len(placed.engines()) == 3, timeout_s=60)
    wait_for(
        lambda: (h := placed.health()) is not None and h.json().get("engine_replicas") == 2,
        timeout_s=60,
    )
    (new,) = placed.engines().keys() - engines.keys()
    assert placed.engines()[new]["gpus"] == EIGHT
    assert placed.engines()[new]["node"] == engines[victim]["node"]
    held_by = placed.ask("table")["held"]
    assert sorted(node for _, node, _ in held_by) == sorted([first, second])
    assert all(name.startswith("placement group SERVE_REPLICA::") for name, _, _ in held_by)


@pytest.mark.slow
def test_a_load_that_fails_is_told_in_its_own_sentence_and_holds_nothing(placed: Placed) -> None:
    told = placed.ask("fail")
    assert told == "the service did not start: rank 3: model.layers.7.mlp.gate.weight is missing"
    placed.ask("delete")
    wait_for(lambda: not placed.ask("table")["held"])


@pytest.mark.slow
def test_a_replica_on_two_nodes_has_a_process_and_gpus_on_each_and_ends_as_one(
    placed: Placed,
) -> None:
    def started(node: str) -> list[int]:
        path = placed.folder / node
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line)["pid"] for line in lines if '"start"' in line]

    def gpus(pid: int) -> str:
        words = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        return next(w for w in words if w.startswith("CUDA_VISIBLE_DEVICES="))

    assert placed.ask("serve-two-nodes") is None
    first, second, _ = placed.cluster.node_ids
    assert sorted(node for _, node, _ in placed.ask("table")["held"]) == sorted([first, second])
    (ours,), (theirs,) = started("first"), started("other")
    assert gpus(ours) == gpus(theirs) == f"CUDA_VISIBLE_DEVICES={EIGHT}"
    os.kill(theirs, signal.SIGKILL)
    wait_for(lambda: len(started("other")) == 2 and len(started("first")) == 2, timeout_s=60)
    wait_for(lambda: (h := placed.health()) is not None and h.status_code == 200, timeout_s=60)
    assert not Path(f"/proc/{ours}").exists()
    assert sorted(node for _, node, _ in placed.ask("table")["held"]) == sorted([first, second])
    placed.ask("delete")
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started("other")))


@pytest.mark.slow
def test_serve_deploy_is_told_what_is_short() -> None:
    pool = {"engine": {"kind": "echo"}, "gpus": 8, "labels": {"hardware": "H800-80GB"}}
    says = "pools.default.labels: no node of the cluster is labeled hardware=H800-80GB; there are 1"
    with Deployed() as deployed, pytest.raises(RuntimeError, match=re.escape(says)):
        deployed.deploy({"pools": {"default": pool}})
