"""Ray's own configuration of HAProxy, and HAProxy with it, without Ray's processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from support.ports import free_ports
from support.serving import wait_for

from serve_app import haproxy_wrapper
from serve_app.haproxy_wrapper import HEAD_TIMEOUT_S

WRAPPER = Path(haproxy_wrapper.__file__)


def write_configuration(
    folder: Path,
    *,
    ports: tuple[int, int, int],
    server: int = 1,
    host: str = "127.0.0.1",
    **more: Any,
) -> Path:
    """The file that Ray writes for one application whose ingress listens on port `server`. `ports`
    are those of clients, metrics and statistics; `more` are settings of HAProxyConfig."""
    from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
    from ray.serve.config import HTTPOptions

    clients, metrics, stats = ports
    config = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=clients),
        metrics_port=metrics,
        stats_port=stats,
        socket_path=str(folder / "a"),
        metrics_socket_path=str(folder / "m"),
        server_state_base=str(folder),
        server_state_file=str(folder / "server-state"),
        has_received_routes=True,
        has_received_servers=True,
        is_head=True,
        **{"maxconn": 200, "nbthread": 1, **more},
    )
    ingress = ServerConfig(name="ingress", host="127.0.0.1", port=server)
    backend = BackendConfig(name="http-app", path_prefix="/", app_name="app", servers=[ingress])
    path = folder / "haproxy.cfg"
    HAProxyApi(config, {"http-app": backend}, str(path))._generate_config_file_internal()
    return path


def start_wrapped(
    path: Path, *flags: str, before: tuple[str, ...] = (), **variables: str
) -> subprocess.Popen[str]:
    """The wrapper, called as Ray calls HAProxy, by the command `before` if there is one."""
    environment = os.environ | {haproxy_wrapper.PYTHON: sys.executable} | variables
    return subprocess.Popen(
        [*before, str(WRAPPER), "-db", "-f", str(path), *flags],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


@dataclass(frozen=True)
class Running:
    """A HAProxy and its ports."""

    process: subprocess.Popen[str]
    port: int
    metrics_port: int
    stats_port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def haproxy(
    folder: Path, server: int, variables: dict[str, str], *, head_timeout_s: int, **more: Any
) -> Iterator[Running]:
    """HAProxy before an ASGI server, once it passes requests on; with another time for heads than
    the wrapper's."""
    clients, metrics, stats = free_ports(3)
    path = write_configuration(folder, ports=(clients, metrics, stats), server=server, **more)
    before, after = (f"timeout http-request {each}s" for each in (HEAD_TIMEOUT_S, head_timeout_s))
    text = haproxy_wrapper.narrowed(path.read_text(), variables)
    assert before in text
    path.write_text(text.replace(before, after))
    process = start_wrapped(path, **variables)
    try:
        wait_for(lambda: process.poll() is not None or _answers(clients))
        assert process.poll() is None, process.stderr and process.stderr.read()
        yield Running(process, clients, metrics, stats)
    finally:
        process.kill()
        process.communicate()


def _answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
