"""A Ray head with a dashboard, to which configurations are deployed as `serve deploy` does it.

What `python -m serve_app` cannot show: a rolling update, other numbers of replicas, light changes.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from support.ports import free_port
from support.processes import named

ROOT = Path(__file__).resolve().parents[2]
APP = "intserve"


def _of_a_node(folder: Path, token: str) -> dict[str, str]:
    """What cluster/ray-env.sh makes of the environment, with ports and folders of its own."""
    inherited = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    ports = ("HAPROXY_METRICS_PORT", "HAPROXY_STATS_PORT", "FALLBACK_PROXY_HTTP_PORT")
    given = {
        **inherited,
        **{f"RAY_SERVE_{name}": str(free_port()) for name in ports},
        "INTSERVE_PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_TOKEN": token,
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "10",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(ROOT / "serve_app" / "haproxy_wrapper.py"),
        "RAY_TMPDIR": str(folder),
        "RAY_worker_niceness": "0",
    }
    command = f". {ROOT / 'cluster' / 'ray-env.sh'} && env -0"
    made = subprocess.run(["bash", "-c", command], env=given, capture_output=True, check=True)
    lines = (line.partition("=") for line in made.stdout.decode().split("\0") if line)
    return {name: value for name, _, value in lines}


class Deployed:
    """A cluster of one node for `serve deploy`, with the proxy of production. To be closed: a
    context."""

    def __init__(self, environment: dict[str, str] | None = None, cpus: int = 8) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._dashboard = free_port()
        self._token = secrets.token_hex(32)
        self._folder = Path(tempfile.mkdtemp(prefix="r-", dir=os.environ.get("RAY_TMPDIR", "/tmp")))
        self._environment = _of_a_node(self._folder, self._token) | (environment or {})
        ports = {name: free_port() for name in ("port", "dashboard-agent-listen-port")}
        arguments = [f"--{name}={number}" for name, number in ports.items()]
        self._log = (self._folder / "head.log").open("wb")
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
                *arguments,
                f"--dashboard-port={self._dashboard}",
                "--include-dashboard=true",
                f"--num-cpus={cpus}",
                f"--temp-dir={self._folder}",
                "--node-ip-address=127.0.0.1",
            ],
            cwd=ROOT,
            env=self._environment,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._client = httpx.Client(
            base_url=f"http://127.0.0.1:{self._dashboard}",
            headers={"authorization": f"Bearer {self._token}"},
            timeout=30,
        )
        self._wait(lambda: self._client.get("/api/version").status_code == 200, 60)

    @property
    def pid(self) -> int:
        """The process that all others descend from."""
        return self._process.pid

    def __enter__(self) -> Deployed:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def deploy(
        self,
        args: dict[str, Any],
        deployments: list[dict[str, Any]] | None = None,
        *,
        timeout_s: float = 120,
    ) -> None:
        """Put this configuration in place of what is deployed, and wait until Serve says that it
        runs. `deployments` are Serve's own overrides, such as `user_config`."""
        application: dict[str, Any] = {
            "name": APP,
            "import_path": "serve_app.app:build",
            "route_prefix": "/",
            "args": args,
            "deployments": deployments or [],
        }
        config = {
            "proxy_location": "HeadOnly",
            "http_options": {"host": "127.0.0.1", "port": self.port},
            "logging_config": {"log_level": "WARNING", "enable_access_log": False},
            "applications": [application],
        }
        self._client.put("/api/serve/applications/", json=config).raise_for_status()
        time.sleep(0.5)
        self._wait(lambda: self.status()["status"] == "RUNNING", timeout_s)

    def status(self) -> dict[str, Any]:
        """Serve's account of the application."""
        applications = self._client.get("/api/serve/applications/").json()["applications"]
        found: dict[str, Any] = applications.get(APP, {"status": "ABSENT"})
        if found["status"] in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise RuntimeError(found.get("message"))
        return found

    def replicas(self, deployment: str) -> list[int]:
        """Processes of a deployment's replicas."""
        return named(self.pid, f"ServeReplica:{APP}:{deployment}")

    def close(self) -> None:
        self._client.close()
        try:
            os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._log.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _wait(self, condition: Any, timeout_s: float) -> None:
        end = time.monotonic() + timeout_s
        while True:
            try:
                if condition():
                    return
            except httpx.HTTPError:
                pass
            if time.monotonic() > end or self._process.poll() is not None:
                raise RuntimeError((self._folder / "head.log").read_text()[-2000:])
            time.sleep(0.2)
