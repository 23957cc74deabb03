"""Real Ray clusters of several nodes on this machine, whose nodes can be killed.

A node is a raylet with its own scheduler, object store and workers; to Ray, killing it is the death
of a machine. All nodes share one IP address here; `namespaces.py` has nodes with their own. Jobs
run on them as on a cluster: a driver process finds Ray by RAY_ADDRESS.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

from cluster.access import MODE, TOKEN, TOKEN_PATH, set_environment
from quant_jobs.workers.actor import QuantizeWorker

#: Ray's smallest store is 75 MiB.
OBJECT_STORE_BYTES = 100 << 20

#: A dead node is noticed in a few seconds, not in half a minute; and a busy one is not called dead.
HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 2000,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 4,
}


def use_token() -> None:
    """Put Ray into token mode, with a token of this process: for a bench, for which no conftest has
    done so. Call it before the first cluster."""
    set_environment({MODE: "token", TOKEN: secrets.token_hex(32), TOKEN_PATH: None})


class Raylets:
    """A head without CPUs and `nodes` nodes of `cpus` CPUs each. To be closed: a context. GPUs are
    logical: Ray counts them and gives them out, and there are none.

    Make and close it in the main thread: the kernel ends a raylet with the thread that started it,
    which is what cleans up after a test that was killed.
    """

    def __init__(self, nodes: int, cpus: int = 1) -> None:
        base = os.environ.get("RAY_TMPDIR", "/tmp")
        # The head writes its address there, wherever its own folder is, and does not make it.
        Path(base, "ray").mkdir(exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix="r-", dir=base))
        self._cpus = cpus
        self._nodes: list[Any] = []
        self._cluster = Cluster()
        try:
            self._cluster.add_node(
                num_cpus=0,
                object_store_memory=OBJECT_STORE_BYTES,
                temp_dir=str(self._folder),
                include_dashboard=False,
                include_log_monitor=False,
                no_monitor=True,
                _system_config=HEALTH_CHECKS,
            )
            for _ in range(nodes):
                self.add_node()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Raylets:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def address(self) -> str:
        """For RAY_ADDRESS. Drivers on this machine attach to the head, which is never killed."""
        return str(self._cluster.gcs_address)

    @property
    def num_nodes(self) -> int:
        """Nodes that were not killed, the head apart."""
        return len(self._nodes)

    def add_node(self, *, gpus: int = 0, labels: dict[str, str] | None = None) -> None:
        """One more node; returns when Ray lists it."""
        more: dict[str, Any] = {"num_gpus": gpus} if gpus else {}
        if labels:
            more["labels"] = labels
        node = self._cluster.add_node(
            num_cpus=self._cpus, object_store_memory=OBJECT_STORE_BYTES, **more
        )
        self._nodes.append(node)

    @property
    def node_ids(self) -> list[str]:
        """Ray's ids of the nodes that were not killed, in the order of `kill_node`."""
        return [str(node.node_id) for node in self._nodes]

    def index_of(self, worker: int) -> int:
        """The index of the node whose raylet has started a worker process."""
        parent = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
        return [raylet_of(node).pid for node in self._nodes].index(parent)

    def kill_node(self, index: int) -> None:
        """SIGKILL a raylet. Its workers end by themselves, as nothing else of it is killed here."""
        node = self._nodes.pop(index)
        self._cluster.worker_nodes.discard(node)  # or Ray's own shutdown complains
        raylet = raylet_of(node)
        raylet.kill()
        raylet.wait()

    def workers(self) -> list[int]:
        """Process ids of quantize workers that have started, ascending."""
        return self.processes(f"ray::{QuantizeWorker.__name__}")

    def processes(self, name: str) -> list[int]:
        """Process ids of this cluster whose title begins with a name, ascending."""
        return sorted(pid for pid in holders(self._folder) if title(pid).startswith(name))

    def close(self) -> None:
        """End everything. Idle agents of killed nodes, which take a minute to notice, too."""
        self._cluster.shutdown()
        end(self._folder)
        shutil.rmtree(self._folder)


def raylet_of(node: Any) -> subprocess.Popen[bytes]:
    """The process of a node that is no head."""
    ((raylet,),) = node.all_processes.values()
    process: subprocess.Popen[bytes] = raylet.process
    return process


def end(folder: Path) -> None:
    """SIGKILL what still holds a file in a cluster's folder, and wait until it has ended."""
    deadline = time.monotonic() + 30
    while left := holders(folder):
        assert time.monotonic() < deadline, [title(pid) for pid in left]
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def holders(folder: Path) -> list[int]:
    """Processes with an open file under `folder`: all of a cluster, whatever their parents and
    titles are by now, for each writes its log there."""
    return [pid for pid in _processes() if any(_is_in(link, folder) for link in _open_files(pid))]


def _processes() -> Iterator[int]:
    for path in Path("/proc").iterdir():
        if path.name.isdecimal() and int(path.name) != os.getpid():
            yield int(path.name)


def _open_files(pid: int) -> Iterator[str]:
    try:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            yield os.readlink(link)
    except OSError:  # it ended meanwhile
        return


def _is_in(link: str, folder: Path) -> bool:
    return link.startswith(f"{folder}/")


def title(pid: int) -> str:
    """What `ps` shows; empty for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return ""
