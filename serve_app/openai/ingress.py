"""The ingress deployment: routes.py inside Serve, with a handle to the engine replicas.

app.py deploys it. Serve builds the ASGI application once the replica exists
(`__serve_build_asgi_app__`), so the application is never pickled and can hold the replica's own
objects. Engine replicas report their status here (`note_status`, `note_goodbye`), and whoever stops
the service drains every ingress first (`drain`, `cut`; local.py).
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

from ray import serve
from starlette.types import ASGIApp

from serve_app.config import ServeConfig
from serve_app.engines.protocol import ReplicaStatus
from serve_app.gating import admit
from serve_app.live import LiveSettings
from serve_app.openai.drain import Drain
from serve_app.openai.routes import make_app
from serve_app.openai.service import Service
from serve_app.openai.tokenizer import ByteTokenizer, HfTokenizer, Tokenizer
from serve_app.proxy_environment import addresses_known
from serve_app.routing.admission_client import Admission, OpenAdmission
from serve_app.routing.fleet import Fleet
from serve_app.routing.replica_client import ReplicaClient, StatusBoard
from serve_app.telemetry.tracing import Telemetry


def load_tokenizer(config: ServeConfig) -> Tokenizer:
    """The tokenizer that goes with the configured engine, which must be admitted (`gating.py`).

    Raises:
        ArtifactError: it is not admitted, or has no tokenizer.
    """
    pool = config.pool
    if pool.directory is None:
        return ByteTokenizer()
    admitted = admit(
        pool.directory,
        kv_cache=pool.kv_cache,
        allow_ungated=pool.gate.allow_ungated,
        require_signature=pool.gate.require_signature,
    )
    return HfTokenizer(pool.directory, admitted.documents)


class Ingress:
    """One HTTP server process of the application, with its metrics and its board of statuses."""

    # Serve awaits a constructor that is a coroutine; mypy does not know such constructors.
    async def __init__(self, config: ServeConfig, engines: Any) -> None:  # type: ignore[misc]
        self._board = StatusBoard()
        client = ReplicaClient(engines, self._board)
        self._admission: Admission = OpenAdmission()
        self._fleet = Fleet(client, self._admission, config.resume)
        self._drain = Drain(client.close)
        self._watch = asyncio.create_task(client.watch())
        self._service = Service(
            config,
            load_tokenizer(config),
            self._fleet,
            Telemetry.from_environment(),
            admission=self._admission,
            addresses_known=addresses_known(os.environ),
        )
        self._key_watch = self._service.watch_keys()
        self._context = serve.get_replica_context()
        self._live = LiveSettings(self._context.deployment, config.live)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take in what Serve says of the sections that change while it serves (live.py)."""
        if self._live.reconfigure(user_config):
            live = self._live.current
            self._service.reconfigure(live)
            self._fleet.settings = live.resume

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return make_app(self._service, self._all_snapshots, self._drain)

    async def note_status(self, status: ReplicaStatus) -> None:
        """Take in an engine replica's heartbeat."""
        self._board.note(status)

    async def note_goodbye(self, replica_id: str) -> None:
        """An engine replica ends, or gives up its engine: it answers nothing more."""
        self._board.remove(replica_id)

    async def drain(self) -> int:
        """Refuse newcomers from now on; says how many requests are in flight. Idempotent."""
        return self._drain.start()

    async def cut(self) -> int:
        """Tell the clients of all requests in flight that they end here; says how many."""
        return self._drain.cut()

    async def metrics_snapshot(self) -> tuple[str, str]:
        """This replica's id and metrics text."""
        return self._context.replica_id.unique_id, self._service.metrics.snapshot()

    async def _all_snapshots(self) -> dict[str, str]:
        if self._service.config.ingress.replicas == 1:
            return dict([await self.metrics_snapshot()])
        peers = serve.get_deployment_handle(self._context.deployment, self._context.app_name)
        answers = await peers.broadcast("metrics_snapshot").results_async(return_exceptions=True)
        return dict([a for a in answers if isinstance(a, tuple)])

    async def __del__(self) -> None:
        if hasattr(self, "_watch"):
            self._watch.cancel()
        if (key_watch := getattr(self, "_key_watch", None)) is not None:
            key_watch.cancel()
        if hasattr(self, "_service"):
            self._service.telemetry.shutdown()
