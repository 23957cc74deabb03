"""One Ray Serve instance and one OTLP receiver, shared by the tests that need real ones."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from support.otlp import OtlpReceiver
from support.ports import free_port

from cluster.connect import connect
from serve_app.proxy_guard import CALLBACK, CALLBACK_VARIABLE


@pytest.fixture(scope="session")
def otlp() -> Iterator[OtlpReceiver]:
    receiver = OtlpReceiver()
    yield receiver
    receiver.server.shutdown()
    receiver.server.server_close()


@pytest.fixture(scope="session")
def serve_url() -> Iterator[str]:
    """Base URL of a running Serve instance; tests deploy applications under their own prefixes."""
    from ray import serve

    port = free_port()
    os.environ.setdefault(CALLBACK_VARIABLE, CALLBACK)
    with connect(num_cpus=4):  # logical: replicas ask for fractions, and most of them are idle
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": "127.0.0.1", "port": port},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
