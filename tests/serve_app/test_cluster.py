"""The service on a cluster of several raylets in token mode, and what those without it reach."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from support.configs import make_config
from support.foreground import answers_without_a_token
from support.ports import free_port
from support.raylets import Raylets

from serve_app.engine_sections import EchoOptions
from serve_app.proxy_environment import proxy_environment

pytestmark = pytest.mark.ray


#: Where Serve lets ingresses listen for HAProxy.
INGRESS_PORTS = range(30_000, 31_001)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Raylets]:
    """Raylets with the environment of the default proxy, as ray-env.sh gives it to nodes."""
    config = make_config(echo=EchoOptions(), port=free_port())
    with proxy_environment(config), Raylets(2, cpus=2) as raylets:
        yield raylets


def listening(pid: int) -> set[int]:
    import psutil  # Ray brings it along

    found = psutil.Process(pid).net_connections("tcp")
    return {place.laddr.port for place in found if place.status == psutil.CONN_LISTEN}


@pytest.mark.heavy
@pytest.mark.slow
def test_a_service_on_several_raylets_answers_and_its_replicas_answer_nobody_without_the_token(
    cluster: Raylets, root: Path
) -> None:
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "serve_app", "--echo", "--port", str(port)],
        cwd=root,
        env={**os.environ, "RAY_ADDRESS": cluster.address},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == f"serving echo at http://127.0.0.1:{port}/v1\n"
        body = {"model": "echo", "prompt": "over raylets"}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=30)
        assert answer.json()["choices"][0]["text"] == "over raylets"

        replicas = cluster.processes("ray::ServeReplica")
        assert len(replicas) == 3, "one engine, two ingresses"
        for replica in replicas:
            ports = listening(replica)
            behind_haproxy = ports & set(INGRESS_PORTS)
            assert len(ports - behind_haproxy) == 2, "Ray's own port, and Serve's"
            for each in ports - behind_haproxy:
                assert answers_without_a_token(each) == ["UNAUTHENTICATED", "UNIMPLEMENTED"]
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate()
