"""`python -m serve_app` with TensorRT-LLM replicas, on Ray nodes with logical GPUs.

The one thing that is not real is `tensorrt_llm`: the engine's environment holds the strict double
of tests/support/trtllm_double, which computes with the engine directory in TensorRT-LLM's
arithmetic and has a process for each rank.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]
import ray
import yaml
from support.engine_environments import make_double_environment
from support.ports import free_port
from support.raylets import Raylets, use_token
from support.serving import metric
from support.trtllm_doubles import Double

from bench.stacks.service import started
from serve_app.config import ServeConfig
from serve_app.proxy_environment import proxy_environment

MODEL = "tiny-w4a8"
#: In the command line of guardians and workers.
WORKER = "engines/worker/__main__.py"
RANKS, LABELS = 8, {"hardware": "H800-80GB"}


@dataclass(frozen=True)
class GpuService:
    """The running service, and its processes. `pool` is the name of its only pool."""

    url: str
    double: Double
    cluster: Raylets
    pid: int
    log: Path

    def metrics(self) -> str:
        try:
            return httpx.get(f"{self.url}/metrics", timeout=10).text
        except httpx.HTTPError:
            return ""

    @property
    def ready(self) -> int:
        """Replicas that serve."""
        return int(metric(self.metrics(), "intserve_pool_replicas_ready", pool="default"))

    @property
    def resumed(self) -> int:
        """Sequences that went on in another replica."""
        return int(metric(self.metrics(), "intserve_resumes_total", outcome="resumed"))

    def replicas(self) -> list[psutil.Process]:
        """Serve's processes, each of which has an adapter."""
        found = self.cluster.processes("ray::ServeReplica:intserve:engine-default")
        return [psutil.Process(pid) for pid in found]

    def chains(self) -> list[list[psutil.Process]]:
        """Of each replica that has started its engine: the outer guardian, the inner one, and the
        worker, which imports `tensorrt_llm`."""
        found = []
        for replica in self.replicas():
            chain: list[psutil.Process] = []
            below = replica
            while below is not None and len(chain) < 3:
                with suppress(psutil.NoSuchProcess):
                    started = [p for p in below.children() if WORKER in " ".join(p.cmdline())]
                    chain += started[:1]
                    below = started[0] if started else None
                    continue
                break
            if len(chain) == 3:
                found.append(chain)
        return found

    def workers(self) -> list[psutil.Process]:
        """The processes that import `tensorrt_llm`, one in each replica."""
        return [chain[-1] for chain in self.chains()]

    def free_gpus(self) -> int:
        """Logical GPUs that Ray has reserved for nobody."""
        return int(ray.available_resources().get("GPU", 0))


def ranks_of(worker: psutil.Process) -> list[psutil.Process]:
    """The rank processes below a worker."""
    return [p for p in worker.children(recursive=True) if "rank.py" in " ".join(p.cmdline())]


@contextmanager
def trtllm_service(
    engine: Path, output: Path, nodes: int, faults: dict[str, Any], **pool: Any
) -> Iterator[GpuService]:
    """Nodes and the service on them, once it has said that it serves; everything is stopped at the
    end. `pool` are keys of its section, `faults` what goes wrong from the beginning. Files are
    written to `output`.

    Raises:
        SystemExit: it does not serve.
    """
    python, port = make_double_environment(output / "environment"), free_port()
    section = {
        "engine": {"kind": "trtllm", "directory": str(engine), "python": str(python)},
        "labels": LABELS,
        "replicas": 2,
        "cpus": 1.0,
        **pool,
    }
    raw = {
        "model_name": MODEL,
        "http": {"port": port},
        "ingress": {"replicas": 1, "cpus": 0.1},
        "pools": {"default": section},
    }
    config, log = output / "serve.yaml", output / "serve.log"
    config.write_text(yaml.safe_dump(raw))
    double = Double(output, strict="record")
    double.switch(**faults)
    os.environ.update(double.env)  # nodes, replicas and engines inherit it
    use_token()
    with (
        proxy_environment(ServeConfig.model_validate(raw)),
        Raylets(0, cpus=2) as cluster,
    ):
        for _ in range(nodes):
            cluster.add_node(gpus=RANKS, labels=LABELS)
        command = ["-m", "serve_app", "--config", str(config)]
        with started(command, log, {"RAY_ADDRESS": cluster.address}) as pid:
            ray.init(cluster.address, log_to_driver=False, namespace="bench")
            try:
                yield GpuService(f"http://127.0.0.1:{port}", double, cluster, pid, log)
            finally:
                ray.shutdown()


def left_behind(output: Path, patience_s: float = 10.0) -> list[str]:
    """Processes of the environment in `output` that are still there after a while."""
    end = time.monotonic() + patience_s
    while True:
        found = []
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if words and words[0].startswith(str(output)):
                found.append(" ".join(words)[:120])
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.2)
