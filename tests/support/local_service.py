"""Our own service over HTTP in this process: uvicorn in a thread, one engine, no Ray."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from support.configs import make_config
from support.ports import free_port
from support.serving import LocalEngines, wait_for

from serve_app.engines.embedded import EmbeddedEngine
from serve_app.openai.ingress import load_tokenizer
from serve_app.openai.routes import make_app
from serve_app.openai.service import Service
from serve_app.telemetry.tracing import Telemetry


@contextmanager
def serving_engine(engine_dir: Path, **settings: Any) -> Iterator[str]:
    """The address of a service of this engine directory; `settings` are those of `make_config`."""
    config = make_config(**{"engine": engine_dir, "allow_ungated": True, **settings})
    engines = LocalEngines(EmbeddedEngine(config.pool.engine))
    service = Service(config, load_tokenizer(config), engines, Telemetry(None))
    port = free_port()
    server = uvicorn.Server(
        uvicorn.Config(make_app(service), host="127.0.0.1", port=port, log_level="error")
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
