"""An engine on several nodes lives and dies as one; here each node is a process of a script."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.remote_engines import SUPPORT, scripted_plan
from support.serving import make_request, read_answer

from deepseek.errors import DeployError
from serve_app.config import VllmOptions
from serve_app.engines.remote.launch import Deadlines, Launch, Plan
from serve_app.engines.remote.nodes import Nodes, here, launch_on_node, plan_over_nodes
from serve_app.engines.worker import processes
from serve_app.errors import EngineUnavailable
from serve_app.replica.spread import NodeProcess, SpreadEngine

PYTHON = Path(sys.executable)
LAUNCH = Launch(python=PYTHON, backend="scripted_backend", path=(str(SUPPORT),))
DEADLINES = Deadlines(kill_s=5.0)

pytestmark = pytest.mark.heavy


class Node(NodeProcess):
    name = "node two"


class Spread:
    """An engine on two nodes; `other` are arguments of the second one's script."""

    def __init__(self, directory: Path, other: dict[str, Any], **arguments: Any) -> None:
        self.options = VllmOptions(directory=directory, python=PYTHON)
        self.directory = directory
        self._other, self._arguments = other, arguments
        self.engine = SpreadEngine(
            self.options,
            count=2,
            address=lambda: "127.0.0.1",
            others=self._others,
            launch=LAUNCH,
            plan=lambda _: self._plan("first", self._arguments),
            deadlines=DEADLINES,
        )

    def started(self, node: str) -> dict[str, Any]:
        """What the script of a node wrote of its start."""
        path = self.directory / f"journal-{node}"
        first: dict[str, Any] = json.loads(path.read_text().splitlines()[0])
        return first

    def _plan(self, node: str, arguments: dict[str, Any]) -> Plan:
        return scripted_plan(
            self.directory, **{"journal": str(self.directory / f"journal-{node}"), **arguments}
        )

    def _others(self, options: VllmOptions, nodes: Nodes) -> Sequence[Node]:
        plan = self._plan("second", self._other)
        return [
            Node(
                options, nodes, 1, "127.0.0.2",
                launch=LAUNCH, plan=lambda _: plan, deadlines=DEADLINES,
            )
        ]  # fmt: skip


def is_running(pid: int) -> bool:
    return processes.start_of(pid) is not None


async def test_every_node_is_told_which_it_is_and_where_all_meet(tmp_path: Path) -> None:
    spread = Spread(tmp_path, {})
    try:
        await spread.engine.start()
        text, done = await read_answer(spread.engine, make_request("over two nodes", max_tokens=9))
        assert (text, done.reason) == ("over two ", "length")
        first, second = spread.started("first"), spread.started("second")
        told = [one["arguments"] for one in (first, second)]
        assert [one["node_rank"] for one in told] == [0, 1]
        for one in told:
            assert (one["nnodes"], one["master_addr"]) == (2, "127.0.0.1")
            assert one["distributed_executor_backend"] == "mp"
        assert told[0]["master_port"] == told[1]["master_port"]
        await spread.engine.check()
    finally:
        await spread.engine.shutdown()
    assert not any(is_running(one["pid"]) for one in (first, second))


@pytest.mark.parametrize(
    ("first", "other", "says"),
    [
        ({"constructor": "slow", "slow_s": 600}, {"constructor": "refuse"}, "node two: "),
        ({"constructor": "refuse"}, {"constructor": "slow", "slow_s": 600}, ""),
        ({"constructor": "slow", "slow_s": 600}, {"constructor": "die"}, "node two: "),
    ],
)
async def test_the_node_that_does_not_load_ends_the_others_in_its_sentence(
    first: dict[str, Any], other: dict[str, Any], says: str, tmp_path: Path
) -> None:
    spread = Spread(tmp_path, other, **first)
    with pytest.raises(DeployError) as caught:
        await spread.engine.start()
    assert str(caught.value).startswith(f"{says}{tmp_path} did not load in trtllm: ")
    for node in ("first", "second"):
        journal = tmp_path / f"journal-{node}"
        assert not journal.exists() or not is_running(spread.started(node)["pid"])
    await spread.engine.shutdown()


async def test_a_node_that_dies_is_the_end_of_the_engine(tmp_path: Path) -> None:
    spread = Spread(tmp_path, {"ranks": 1})
    try:
        await spread.engine.start()
        pid = spread.started("second")["pid"]
        os.kill(pid, signal.SIGKILL)
        (watch,) = spread.engine._watches
        await watch
        with pytest.raises(EngineUnavailable, match="the engine has failed and is being replaced"):
            await spread.engine.check()
    finally:
        await spread.engine.shutdown()
    assert not is_running(spread.started("first")["pid"])


def test_vllm_on_another_node_is_another_backend_and_there_is_no_second_try(
    tmp_path: Path,
) -> None:
    nodes = here(2, "127.0.0.1")
    assert nodes.port > 0
    plan = replace(scripted_plan(tmp_path), less_memory={"a": 1})
    assert plan_over_nodes(plan, nodes, 1).less_memory is None
    launch = Launch(python=PYTHON, backend="vllm", env={"A": "b"})
    first = launch_on_node(launch, "10.0.0.1", first=True)
    assert (first.backend, first.env) == ("vllm", {"A": "b", "VLLM_HOST_IP": "10.0.0.1"})
    assert launch_on_node(launch, "10.0.0.2", first=False).backend == "vllm_node"
