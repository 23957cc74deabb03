"""The engine deployment: a replica owns one engine and answers for it across the actor hop.

It checks the gate before it makes the engine, limits how many requests wait, sends the events of a
request in messages (coalesce.py), and reports its status to every ingress. app.py deploys it,
routing/replica_client.py calls it. It knows the engine protocol and no adapter.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from deepseek.errors import ArtifactError
from deepseek.text import printable
from serve_app.config import ReplicaLimits
from serve_app.engines.protocol import Engine, Event, GenerateRequest, ReplicaStatus
from serve_app.errors import ApiError, Overloaded
from serve_app.gating import admit
from serve_app.replica.coalesce import coalesce, flush_interval
from serve_app.routing.replica_client import HEARTBEAT_S
from serve_app.telemetry.tracing import Telemetry

log = logging.getLogger("ray.serve")

EngineFactory = Callable[[], Engine]

#: The name of the deployment that receives the heartbeats.
INGRESS = "ingress"

#: What a heartbeat may raise: the ingress is starting or stopping, or the engine has failed.
_NO_INGRESS = (RayServeException, RayError, TimeoutError, ApiError)


class EngineReplica:
    """Owns one engine. Serve calls `check_health`, `reconfigure` and `__del__`.

    The constructor raises ArtifactError when `engine_dir` has not passed its accuracy gate and
    `allow_ungated` does not override that, when the gate judged other KV pages than those of the
    format `kv_cache` (None: as built), or when the verdict is not signed with the key of the file
    `require_signature`. `engine_dir` None serves no artifact (echo): it has nothing to gate.
    `served_name` is the model's name in the API.
    """

    # Serve awaits a constructor that is a coroutine; mypy does not know such constructors.
    async def __init__(  # type: ignore[misc]
        self,
        make_engine: EngineFactory,
        engine_dir: Path | None,
        *,
        served_name: str,
        kv_cache: str | None,
        allow_ungated: bool,
        require_signature: Path | None = None,
    ) -> None:
        # Before an engine exists, so that no adapter has to know of gates.
        admitted, self._gated = None, True
        if engine_dir is not None:
            admitted = admit(
                engine_dir,
                kv_cache=kv_cache,
                allow_ungated=allow_ungated,
                require_signature=require_signature,
            )
            self._gated = admitted.gated
        self._telemetry = Telemetry.from_environment()
        self._limits = ReplicaLimits()
        self._num_streams = 0
        self._replica_id = serve.get_replica_context().replica_id.unique_id
        self._engine = make_engine()
        self._info = await self._engine.start()
        if engine_dir is not None and admitted is not None:
            try:
                admitted.check_started(
                    engine_dir,
                    engine_digest=self._info.engine_digest,
                    arithmetic=self._info.engine,
                    kv_cache=self._info.kv_cache,
                )
            except ArtifactError:
                await self._engine.shutdown()
                raise
        if not self._gated:  # once more, below everything that the engine logged while it loaded
            log.warning("UNGATED: %s has not passed its accuracy gate", printable(served_name))
        self._heartbeat = asyncio.create_task(self._send_heartbeats())

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Apply limits that may change while serving; other settings need a new deployment."""
        self._limits = ReplicaLimits.model_validate(user_config)

    async def check_health(self) -> None:
        await self._engine.check()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[tuple[Event, ...], None]:
        """Yield the request's messages: one or more events each, in order.

        Raises:
            Overloaded: too many requests wait in the engine; raised before the first message.
        """
        waiting, limit = self._engine.load().waiting, self._limits.max_waiting_requests
        if limit is not None and waiting > limit:
            raise Overloaded(f"{waiting} requests are waiting for this engine; retry later")
        self._num_streams += 1
        try:
            with self._telemetry.generation(request) as span:
                events = coalesce(self._engine.generate(request), self._flush_interval_s)
                async with aclosing(events):
                    async for batch in events:
                        span.note(batch)
                        yield batch
        finally:
            self._num_streams -= 1

    def _flush_interval_s(self) -> float:
        return flush_interval(self._num_streams, self._limits.max_flushes_per_s)

    def _status(self) -> ReplicaStatus:
        return ReplicaStatus(
            replica_id=self._replica_id,
            info=self._info,
            load=self._engine.load(),
            gated=self._gated,
        )

    async def _send_heartbeats(self) -> None:
        """Report the status to every ingress, for as long as the engine's check passes."""
        context = serve.get_replica_context()
        ingress = serve.get_deployment_handle(INGRESS, context.app_name)
        while True:
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    await self._engine.check()
                    beat = ingress.broadcast("note_status", self._status())
                    await beat.results_async(return_exceptions=True)
            except _NO_INGRESS as error:
                log.debug("heartbeat not delivered: %s", error)
            await asyncio.sleep(HEARTBEAT_S)

    async def __del__(self) -> None:
        if hasattr(self, "_heartbeat"):
            self._heartbeat.cancel()
        if hasattr(self, "_engine"):
            await self._engine.shutdown()
        if hasattr(self, "_telemetry"):
            self._telemetry.shutdown()
