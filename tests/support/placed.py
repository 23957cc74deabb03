"""A service of engines on logical GPUs, on the cluster of RAY_ADDRESS: a process of its own.

    python tests/support/placed.py PORT FOLDER

It takes commands as lines on stdin, and answers each with one line of JSON:

    check REPLICAS       what `serve_app.placement` says of so many replicas of 8 GPUs
    hold / release       an actor that takes 8 GPUs
    serve REPLICAS       serve them; an engine loads until FOLDER/go is there
    serve-two-nodes      serve one replica of 16 GPUs, whose other node runs a script's worker
    fail                 serve one whose load fails
    table                who holds what, and free GPUs by node

Each engine leaves FOLDER/engine-PID.json: its GPUs, as its process sees them, and its node.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle, serve
from support import remote_engines
from support.remote_engines import SUPPORT, scripted_plan

from cluster.node_table import read_holders, read_nodes
from deepseek.errors import DeployError, IntServeError
from serve_app.app import build_with
from serve_app.config import EchoOptions, ServeConfig, VllmOptions
from serve_app.engines.echo import EchoEngine
from serve_app.engines.protocol import Engine, EngineInfo, LoadProgress
from serve_app.engines.remote.launch import Deadlines, Launch, Plan
from serve_app.local import APP_NAME, _telling_why, serve_running
from serve_app.placement import check_this_cluster
from serve_app.replica.spread import SpreadEngine, node_address, ray_nodes

H800 = {"hardware": "H800-80GB"}
LAUNCH = Launch(python=Path(sys.executable), backend="scripted_backend", path=(str(SUPPORT),))


class PlacedEngine(EchoEngine):
    """Loads until it may; or fails to."""

    def __init__(self, folder: Path, error: str | None) -> None:
        super().__init__(EchoOptions())
        self._folder, self._error = folder, error
        self._read = 0

    def loading(self) -> LoadProgress | None:
        return LoadProgress("reading the weights", self._read, 100 * 10**9)

    async def start(self) -> EngineInfo:
        if self._error is not None:
            raise DeployError(self._error)
        leave_word(self._folder)
        while not (self._folder / "go").exists():
            self._read += 10**9
            await asyncio.sleep(0.1)
        return await super().start()


def leave_word(folder: Path) -> None:
    word = {
        "pid": os.getpid(),
        "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "node": ray.get_runtime_context().get_node_id(),
    }
    (folder / f"engine-{os.getpid()}.json").write_text(json.dumps(word))


def other_plan(folder: Path, options: VllmOptions) -> Plan:
    return scripted_plan(folder, journal=str(folder / "other"))


def first_plan(folder: Path, options: VllmOptions) -> Plan:
    return scripted_plan(folder, journal=str(folder / "first"))


def spread_engine(folder: Path) -> Engine:
    leave_word(folder)
    more = {"launch": LAUNCH, "deadlines": Deadlines(kill_s=5.0)}
    return SpreadEngine(
        VllmOptions(directory=folder, python=Path(sys.executable)),
        count=2,
        address=node_address,
        others=partial(ray_nodes, plan=partial(other_plan, folder), **more),
        plan=partial(first_plan, folder),
        **more,  # type: ignore[arg-type]
    )


def config(port: int, replicas: int, gpus: int = 8) -> ServeConfig:
    engine = {"kind": "echo"}
    pool = {"engine": engine, "replicas": replicas, "gpus": gpus, "labels": H800, "cpus": 0.5}
    given = {"pools": {"default": pool}, "http": {"port": port}, "ingress": {"replicas": 1}}
    return ServeConfig.model_validate(given)


def refusal(given: ServeConfig) -> str | None:
    try:
        check_this_cluster(given)
    except IntServeError as error:
        return str(error)
    return None


def deploy(given: ServeConfig, make: Any) -> str | None:
    """Serve it; the sentence where it does not start."""
    try:
        with _telling_why():
            serve.run(build_with(given, make), name=APP_NAME, route_prefix="/")
    except DeployError as error:
        return str(error)
    return None


def commands(port: int, folder: Path) -> Iterator[Any]:
    """One answer for each line of stdin."""
    holder: Any = None
    for line in sys.stdin:
        word, *rest = line.split()
        if word == "check":
            yield refusal(config(port, int(rest[0])))
        elif word == "hold":
            options = {"num_gpus": 8, "label_selector": H800, "name": "Trainer", "num_cpus": 0}
            holder = ray.remote(Trainer).options(**options).remote()
            yield ray.get(holder.node.remote())
        elif word == "release":
            ray.kill(holder)
            yield None
        elif word == "serve":
            yield deploy(config(port, int(rest[0])), partial(PlacedEngine, folder, None))
        elif word == "fail":
            says = "rank 3: model.layers.7.mlp.gate.weight is missing"
            yield deploy(config(port, 1), partial(PlacedEngine, folder, says))
        elif word == "serve-two-nodes":
            yield deploy(config(port, 1, gpus=16), partial(spread_engine, folder))
        elif word == "delete":
            serve.delete(APP_NAME)
            yield None
        elif word == "table":
            free = {node.node_id: node.free.get("GPU", 0.0) for node in read_nodes()}
            held = [[h.name, h.node_id, h.resources["GPU"]] for h in read_holders()
                    if h.resources.get("GPU")]  # fmt: skip
            yield {"free": free, "held": held}


class Trainer:
    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()


def main(port: int, folder: Path) -> None:
    cloudpickle.register_pickle_by_value(remote_engines)
    stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints
    with serve_running(config(port, 1)):
        for answer in commands(port, folder):
            print(json.dumps(answer), file=stdout, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
