"""A Ray cluster whose nodes have networks of their own, so that a link between them can be cut.

Every node is in a network namespace of its own; a bridge in one more namespace joins them, each by
a pair of virtual links. This host's own network is neither used nor changed. Files are shared, as
on a cluster with common storage, except Ray's folder, of which every node has its own. Needs root.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from support.raylets import HEALTH_CHECKS, OBJECT_STORE_BYTES, title

from deepseek.files import canonical_json
from quant_jobs.workers.actor import QuantizeWorker

PORT = 6379


class NotPermitted(Exception):
    """Network namespaces cannot be made here; says why."""


class Network:
    """A head without CPUs, which is node 0, and `nodes` nodes of one CPU, which are 1 and up. To be
    closed: a context.

    Raises:
        NotPermitted: this process may not do that here.
    """

    def __init__(self, nodes: int) -> None:
        self._name = f"intserve-{os.getpid()}"
        self._nodes = range(nodes + 1)
        self._folder = Path(tempfile.mkdtemp(prefix="network-", dir="/tmp"))  # sockets: short names
        self._rays = self._folder / "ray"
        self._rays.mkdir()
        # A token of this cluster's own: Ray may have made one for other clusters on this host.
        self._environment = {
            **os.environ,
            "RAY_ADDRESS": f"{address_of(0)}:{PORT}",
            "RAY_TMPDIR": str(self._rays),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
        }
        self._processes: list[subprocess.Popen[str]] = []
        try:
            self._wire()
            for node in self._nodes:
                self._start_ray(node)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, node: int, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """A process on a node, with RAY_ADDRESS; its output is appended to `log`."""
        with log.open("ab") as stream:
            return subprocess.Popen(
                self._on(node, command), env=self._environment, stdout=stream, stderr=stream
            )

    def workers(self, node: int) -> list[int]:
        """Process ids of the quantize workers of a node."""
        name = f"ray::{QuantizeWorker.__name__}"
        return [pid for pid in self._pids(node) if title(pid).startswith(name)]

    def cut(self, node: int) -> None:
        """Cut a node's link: whatever runs there goes on and reaches nobody."""
        ip("-n", self._hub, "link", "set", f"link{node}", "down")

    def close(self) -> None:
        """End every process on every node, and take the network away."""
        spaces = [self._space(node) for node in self._nodes]
        deadline = time.monotonic() + 30
        while left := [pid for node in self._nodes for pid in self._pids(node)]:
            assert time.monotonic() < deadline, [title(pid) for pid in left]
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        for process in self._processes:
            process.communicate()
        for space in [*spaces, self._hub]:
            subprocess.run(["ip", "netns", "delete", space], capture_output=True, check=False)
        shutil.rmtree(self._folder)

    @property
    def _hub(self) -> str:
        return f"{self._name}-hub"

    def _space(self, node: int) -> str:
        return f"{self._name}-{node}"

    def _wire(self) -> None:
        ip("netns", "add", self._hub)
        ip("-n", self._hub, "link", "add", "bridge", "type", "bridge")
        ip("-n", self._hub, "link", "set", "bridge", "up")
        for node in self._nodes:
            space = self._space(node)
            ip("netns", "add", space)
            ip("-n", self._hub, "link", "add", f"link{node}", "type", "veth",
               "peer", "name", "eth0", "netns", space)  # fmt: skip
            ip("-n", self._hub, "link", "set", f"link{node}", "master", "bridge", "up")
            ip("-n", space, "address", "add", f"{address_of(node)}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "eth0", "up")
            ip("-n", space, "link", "set", "lo", "up")

    def _start_ray(self, node: int) -> None:
        """Returns when the node has joined."""
        (self._folder / f"node-{node}").mkdir()
        words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
        words += [f"--node-ip-address={address_of(node)}", f"--num-cpus={min(node, 1)}"]
        words += [f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats"]
        if node == 0:
            words += ["--head", f"--port={PORT}", "--include-dashboard=false"]
            words += [f"--system-config={canonical_json(HEALTH_CHECKS).decode()}"]
        else:
            words += [f"--address={address_of(0)}:{PORT}"]
        process = subprocess.Popen(
            self._on(node, words),
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._processes.append(process)
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            if "Ray runtime started" in line:
                return
        raise AssertionError(f"node {node} did not start: {''.join(said)}")

    def _on(self, node: int, command: Sequence[str]) -> list[str]:
        """The command in a node's network; and, in its view of the files, that node's own folder
        in the place of Ray's."""
        mount = f'mount --bind {self._folder}/node-{node} {self._rays} && exec "$@"'
        return ["ip", "netns", "exec", self._space(node), "sh", "-c", mount, "sh", *command]

    def _pids(self, node: int) -> list[int]:
        listed = subprocess.run(
            ["ip", "netns", "pids", self._space(node)], capture_output=True, text=True, check=False
        )
        return [int(pid) for pid in listed.stdout.split()]


def address_of(node: int) -> str:
    return f"10.77.0.{node + 1}"


def ip(*words: str) -> None:
    """`ip WORDS`; raises NotPermitted when it fails."""
    try:
        subprocess.run(["ip", *words], capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise NotPermitted("the command `ip` is not installed") from None
    except subprocess.CalledProcessError as error:
        raise NotPermitted(f"ip {' '.join(words)}: {error.stderr.strip()}") from None
