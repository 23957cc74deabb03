"""The ingress deployment: routes.py inside Serve, with a handle to the engine replicas.

app.py deploys it. Serve builds the ASGI application once the replica exists
(`__serve_build_asgi_app__`), so the application is never pickled and can hold the replica's own
objects. Engine replicas report their status here (`note_status`, `note_goodbye`), and whoever stops
the service drains every ingress first (`drain`, `cut`; local.py).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from starlette.types import ASGIApp

from serve_app.config import ServeConfig
from serve_app.engines.protocol import LoadingReplica, ReplicaStatus
from serve_app.live import LiveSettings
from serve_app.one_model import admit_pools
from serve_app.openai.drain import Drain
from serve_app.openai.routes import make_app
from serve_app.openai.service import Service
from serve_app.openai.tokenizer import ByteTokenizer, HfTokenizer, Tokenizer
from serve_app.proxy_environment import addresses_known
from serve_app.routing.admission_client import AdmissionClient
from serve_app.routing.candidates import candidates, engine_deployment, on_change
from serve_app.routing.fleet import Fleet
from serve_app.routing.owner import OwnerChannel
from serve_app.routing.owner_settings import OwnerSettings
from serve_app.routing.replica_client import ReplicaClient, StatusBoard
from serve_app.routing.sightings import Sightings
from serve_app.telemetry.tracing import Telemetry

#: Seconds for the ingresses of the application to say who they are.
_LISTED_S = 2.0


def load_tokenizer(config: ServeConfig) -> Tokenizer:
    """The tokenizer that goes with the configured engines, which must be admitted (`gating.py`).

    Raises:
        ArtifactError: one is not admitted, or has no tokenizer, or they are of different models.
    """
    admitted = admit_pools(config)
    directory = config.pool.directory
    if directory is None:
        return ByteTokenizer()
    return HfTokenizer(directory, next(iter(admitted.values())).documents)


def _routed(pool: str) -> frozenset[str] | None:
    """The replicas of a pool that Serve routes to, None where that is not known here."""
    return candidates(engine_deployment(pool))


class Ingress:
    """One HTTP server process of the application, with its metrics and its board of statuses."""

    # Serve awaits a constructor that is a coroutine; mypy does not know such constructors.
    async def __init__(  # type: ignore[misc]
        self, config: ServeConfig, engines: Mapping[str, Any]
    ) -> None:
        """`engines` are the handles of the engine deployments, by pool."""
        self._config = config
        self._context = serve.get_replica_context()
        self._board = StatusBoard()
        client = ReplicaClient(engines, self._board, pool_of=self._pool_of)
        self._sightings = Sightings(_routed)
        self._channel = OwnerChannel(self._context.app_name, OwnerSettings.of(config, config.live))
        self._admission = AdmissionClient(
            self._channel,
            self._context.replica_id.unique_id,
            self._sightings.seen,
            count=lambda name, amount: self._service.metrics.count(name, amount),
        )
        self._sightings.changed = self._admission.replicas_changed
        # Serve's router may run in a thread of its own.
        loop = asyncio.get_running_loop()
        self._end_looks = on_change(lambda: loop.call_soon_threadsafe(self._sightings.look))
        self._fleet = Fleet(
            client,
            self._admission,
            config.resume,
            self._count_resume,
            hopeless=self._is_hopeless,
            pool_of=self._pool_of,
        )
        self._drain = Drain(client.close)
        self._tasks = [
            asyncio.create_task(client.watch()),
            asyncio.create_task(client.ask(self.note_status)),
            asyncio.create_task(self._admission.run()),
        ]
        self._service = Service(
            config,
            load_tokenizer(config),
            self._fleet,
            Telemetry.from_environment(),
            admission=self._admission,
            addresses_known=addresses_known(os.environ),
            ingress=self._context.replica_id.unique_id,
        )
        self._service.admission_stats = self._channel.stats
        self._service.loading = self._board.loading
        self._key_watch = self._service.watch_keys()
        self._live = LiveSettings(self._context.deployment, config.live)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take in what Serve says of the sections that change while it serves (live.py)."""
        if self._live.reconfigure(user_config):
            live = self._live.current
            self._service.reconfigure(live)
            self._fleet.settings = live.resume
            self._channel.configure(OwnerSettings.of(self._config, live))

    def _count_resume(self, outcome: str) -> None:
        self._service.count_resume(outcome)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return make_app(self._service, self._all_snapshots, self._drain)

    async def note_status(self, status: ReplicaStatus) -> bool | None:
        """Take in an engine replica's heartbeat. Says whether Serve routes to it, None where that
        is not known here."""
        self._board.note(status)
        self._sightings.note(status)
        routed = _routed(status.pool)
        return None if routed is None else status.replica_id in routed

    async def note_loading(self, report: LoadingReplica) -> None:
        """Take in how far an engine replica is that does not serve yet."""
        self._board.note_loading(report)

    async def loading(self) -> list[LoadingReplica]:
        """The engine replicas that load, as this ingress knows."""
        return self._board.loading.reports()

    async def note_goodbye(self, replica_id: str) -> None:
        """An engine replica ends, or gives up its engine: it answers nothing more."""
        self._board.remove(replica_id)
        self._sightings.goodbye(replica_id)

    async def drain(self) -> int:
        """Refuse newcomers from now on; says how many requests are in flight. Idempotent."""
        return self._drain.start()

    async def cut(self) -> int:
        """Tell the clients of all requests in flight that they end here; says how many."""
        return self._drain.cut()

    async def metrics_snapshot(self) -> tuple[str, str]:
        """This replica's id and metrics text."""
        return self._context.replica_id.unique_id, self._service.metrics.snapshot()

    async def identify(self) -> str:
        """This replica's id."""
        return self._context.replica_id.unique_id

    def _pool_of(self, replica_id: str) -> str | None:
        """The pool of a replica, as its heartbeats say, or Serve before the first of them."""
        heard = self._board.pool_of(replica_id)
        listed = (pool for pool in self._config.pools if replica_id in (_routed(pool) or ()))
        return heard or next(listed, None)

    async def _is_hopeless(self) -> bool:
        """Whether no engine will come for what waits here: Serve has taken this ingress off its
        list, which it says in no other way, and there is no engine left either."""
        if any(_routed(pool) for pool in self._config.pools):
            return False
        peers = serve.get_deployment_handle(self._context.deployment, self._context.app_name)
        try:
            async with asyncio.timeout(_LISTED_S):
                call = peers.broadcast("identify")
                listed = await call.results_async(return_exceptions=True)
        except DeploymentUnavailableError:
            return True
        except (RayServeException, RayError, TimeoutError):
            return False  # nothing was learned
        return self._context.replica_id.unique_id not in listed

    async def _all_snapshots(self) -> dict[str, str]:
        if self._service.config.ingress.replicas == 1:
            return dict([await self.metrics_snapshot()])
        peers = serve.get_deployment_handle(self._context.deployment, self._context.app_name)
        answers = await peers.broadcast("metrics_snapshot").results_async(return_exceptions=True)
        return dict([a for a in answers if isinstance(a, tuple)])

    async def __del__(self) -> None:
        for task in getattr(self, "_tasks", ()):
            task.cancel()
        if (key_watch := getattr(self, "_key_watch", None)) is not None:
            key_watch.cancel()
        if hasattr(self, "_end_looks"):
            self._end_looks()
        if hasattr(self, "_service"):
            self._service.close()
