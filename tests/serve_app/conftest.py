"""One Ray Serve instance and one OTLP receiver, shared by the tests that need real ones."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from support.configs import make_config
from support.otlp import OtlpReceiver
from support.ports import free_port

from serve_app.engine_sections import EchoOptions


@pytest.fixture(scope="session")
def otlp() -> Iterator[OtlpReceiver]:
    receiver = OtlpReceiver()
    yield receiver
    receiver.server.shutdown()
    receiver.server.server_close()


@pytest.fixture(scope="session")
def serve_url() -> Iterator[str]:
    """Base URL of a running Serve behind the default proxy; tests deploy applications under their
    own prefixes."""
    from serve_app.local import serve_running  # imports Ray, which not every run needs

    # An ingress that an update stops stays reachable until HAProxy knows: that takes seconds. On a
    # cluster it is half a minute.
    os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "8")
    config = make_config(echo=EchoOptions(), port=free_port())
    with serve_running(config, num_cpus=4):  # logical: replicas ask for fractions, and mostly idle
        yield f"http://127.0.0.1:{config.http.port}"
