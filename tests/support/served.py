"""`python -m serve_app` as a user starts it, for clients that are processes of their own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml
from support.configs import nest
from support.ports import free_port
from support.processes import holding
from support.serving import metric

ROOT = Path(__file__).resolve().parents[2]
KEY = "a-key-of-this-test"


@dataclass(frozen=True)
class Served:
    """A running service: `url` is its address without `/v1`, `key` what it asks for, and `pid` the
    process that SIGTERM drains."""

    url: str
    model: str
    pid: int
    key: str = KEY

    @property
    def base(self) -> str:
        """What OpenAI's clients call the base URL."""
        return f"{self.url}/v1"

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        """The answer to a raw request, with which a client's is compared.

        Raises:
            HTTPStatusError: it is refused.
        """
        answer = httpx.post(
            f"{self.url}{path}",
            json={"model": self.model, **body},
            headers={"authorization": f"Bearer {self.key}"},
            timeout=120,
        )
        return dict(answer.raise_for_status().json())

    def metrics(self) -> str:
        """What /metrics says."""
        headers = {"authorization": f"Bearer {self.key}"}
        return httpx.get(f"{self.url}/metrics", headers=headers, timeout=30).text

    def generated_tokens(self) -> int:
        """What the service counted since it started."""
        return int(metric(self.metrics(), "intserve_tokens_total", kind="output"))

    def running(self) -> dict[str, int]:
        """Requests in the batch of each replica that has said so lately."""
        line = re.compile(r'intserve_engine_requests_running\{.*replica="(\w+)".*\} ([0-9.]+)')
        found = map(line.fullmatch, self.metrics().splitlines())
        return {match[1]: int(float(match[2])) for match in found if match}

    def replica_process(self, replica: str, pool: str = "default") -> int:
        """The process of an engine replica."""
        [pid] = holding(self.pid, f"replica_intserve_engine-{pool}_{replica}.log")
        return pid


@contextlib.contextmanager
def serving_command(folder: Path, settings: Mapping[str, Any]) -> Iterator[Served]:
    """Start the service with these settings (keywords of `nest`) and wait for its one line; SIGINT
    ends it. `folder` keeps its configuration and what it writes to stderr.

    Raises:
        AssertionError: it ended before it served; with what it said.
    """
    config = folder / "serve.yaml"
    keyed = {"port": free_port(), "api_keys": [KEY], **settings}
    config.write_text(yaml.safe_dump(nest(**keyed)))
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with (folder / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "serve_app", "--config", config],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    assert process.stdout is not None
    try:
        with process.stdout:
            line = process.stdout.readline()  # empty once the process has ended
        assert line.startswith("serving "), (folder / "serve.log").read_text()[-3000:]
        model, _, base = line.strip().removeprefix("serving ").rpartition(" at ")
        yield Served(base.removesuffix("/v1"), model, process.pid)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
