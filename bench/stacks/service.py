"""`python -m serve_app` as a benchmark starts it: its own settings file and process group."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from support.configs import nest
from support.ports import free_port
from support.processes import named

ROOT = Path(__file__).resolve().parents[2]
KEYS = ("key-of-team-a", "key-of-team-b")


@dataclass(frozen=True)
class Running:
    """`url` without `/v1`; `pid` is the process that all others of the service descend from."""

    url: str
    pid: int
    log: Path

    def replicas(self, deployment: str) -> list[int]:
        """The processes of a deployment's replicas."""
        return named(self.pid, f"ServeReplica:intserve:{deployment}")

    def owner(self) -> list[int]:
        """The process that decides on admission."""
        return named(self.pid, "AdmissionActor")

    def controller(self) -> list[int]:
        return named(self.pid, "ServeController")


@contextmanager
def started(
    command: Sequence[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    *,
    root: Path = ROOT,
) -> Iterator[int]:
    """The process of `python COMMAND` in a checkout, once it has said that it serves; ended by
    SIGTERM. It leads a process group of its own.

    Raises:
        SystemExit: it does not serve; with the end of its log.
    """
    inherited = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with log.open("ab") as stderr:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=root,
            env=inherited | {"PYTHONPATH": str(root)} | dict(environment or {}),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
    try:
        assert process.stdout is not None
        if not process.stdout.readline().startswith("serving"):
            raise SystemExit(f"bench: {command[1]} did not start: {log.read_text()[-2000:]}")
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def service(
    folder: Path, environment: Mapping[str, str] | None = None, **settings: Any
) -> Iterator[Running]:
    """`python -m serve_app` with these settings (keywords of `nest`); as `started`."""
    port = free_port()
    config, log = folder / "serve.yaml", folder / "serve.log"
    config.write_text(yaml.safe_dump(nest(**{"port": port, "api_keys": KEYS, **settings})))
    with started(["-m", "serve_app", "--config", str(config)], log, environment) as pid:
        yield Running(f"http://127.0.0.1:{port}", pid, log)
