"""The engine deployment: a replica owns one engine and answers for it across the actor hop.

It checks the gate before it makes the engine, limits how many requests wait, sends the events of a
request in messages (coalesce.py), and reports its status to every ingress. When the engine fails or
hangs (watchdog.py) it tells its clients at once and ends its process, which nothing can hold up;
Serve starts another. When Serve stops it (departure.py) it ends the streams that take too long, for
their ingresses to go on with elsewhere. app.py deploys it, routing/replica_client.py calls it. It
knows the engine protocol and no adapter.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from deepseek.text import printable
from serve_app.engines.protocol import (
    Engine,
    EngineInfo,
    Event,
    GenerateRequest,
    LoadProgress,
    Placed,
    ReplicaStatus,
)
from serve_app.errors import ApiError, EngineUnavailable, Overloaded, ReplicaLost
from serve_app.gating import Admitted
from serve_app.live import LiveSettings
from serve_app.replica.coalesce import coalesce, flush_interval
from serve_app.replica.departure import Departure
from serve_app.replica.loading import Loading
from serve_app.replica.staged import admit_for_loading, engine_at
from serve_app.replica.watchdog import Watchdog, guard_event_loop
from serve_app.routing.candidates import INGRESS, engine_deployment
from serve_app.routing.replica_client import HEARTBEAT_S, QUIET_S
from serve_app.sections import ReplicaLimits
from serve_app.setting_types import POOL
from serve_app.telemetry.tracing import Telemetry

log = logging.getLogger("ray.serve")

EngineFactory = Callable[[], Engine]

#: Seconds for the last messages of a replica that gives up its engine to leave it, and for its
#: spans. Then the process ends.
_TELL_S = 2.0
_FLUSH_S = 2.0

#: Seconds that this replica's event loop may be held up, beyond the limit of a step.
_BLOCK_S = 10.0

#: What a call of the ingresses may raise: they are starting or stopping.
_NO_INGRESS = (RayServeException, RayError, TimeoutError, ApiError)


class EngineReplica:
    """Owns one engine. Serve calls `check_health`, `reconfigure` and `__del__`.

    The constructor raises ArtifactError when `engine_dir` has not passed its accuracy gate and
    `allow_ungated` does not override that, when the gate judged other KV pages than those of the
    format `kv_cache` (None: as built), or when the verdict is not signed with the key of the file
    `require_signature`. `engine_dir` None serves no artifact (echo): it has nothing to gate.
    `staged` is where the nodes may have copies of that directory (staged.py). `served_name` is the
    model's name in the API; `max_step_s` the longest that a step may take;
    `drain_s` what streams have to end when Serve stops the replica, less than Serve gives it;
    `limits` are those of the configuration, which Serve may change; `pool` is the one it belongs
    to.
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
        staged: Path | None = None,
        max_step_s: float = 60.0,
        drain_s: float = 600.0,
        limits: ReplicaLimits | None = None,
        pool: str = POOL,
    ) -> None:
        self._gated, self._emulated = True, False
        self._telemetry = Telemetry.from_environment()
        self._pool = pool
        self._limits = LiveSettings(engine_deployment(pool), limits or ReplicaLimits())
        self._request_ids: set[str] = set()
        self._replica_id = serve.get_replica_context().replica_id.unique_id
        node = ray.get_runtime_context().get_node_id()
        loading = Loading(self._replica_id, pool=pool, node=node)
        async with loading.told(partial(self._tell_ingresses, "note_loading"), self._load_progress):
            admitted = None
            if engine_dir is not None:
                # Before an engine exists, so that no adapter has to know of gates; in a thread,
                # because it may read hundreds of gigabytes.
                admitted, chosen = await asyncio.to_thread(
                    admit_for_loading,
                    engine_dir,
                    staged,
                    node=node,
                    kv_cache=kv_cache,
                    allow_ungated=allow_ungated,
                    require_signature=require_signature,
                    progress=loading.note,
                )
                self._gated, self._emulated = admitted.gated, admitted.emulated
                make_engine = engine_at(make_engine, chosen)
            self._engine = make_engine()
            self._info = await self._start_engine(engine_dir, admitted)
        if not self._gated:  # once more, below everything that the engine logged while it loaded
            log.warning("UNGATED: %s has not passed its accuracy gate", printable(served_name))
        self._watchdog = Watchdog(self._engine, max_step_s=max_step_s)
        self._departure = Departure(drain_s)
        #: What ends every stream and refuses every newcomer, once it is set.
        self._given_up: asyncio.Future[EngineUnavailable] = asyncio.Future()
        self._tasks = [
            asyncio.create_task(self._send_heartbeats(guard_event_loop(max_step_s + _BLOCK_S))),
            asyncio.create_task(self._watchdog.run(self._give_up)),
        ]

    async def _start_engine(self, engine_dir: Path | None, admitted: Admitted | None) -> EngineInfo:
        """Start the engine, and check that it is the one that was admitted. What does not start
        leaves nothing behind."""
        try:
            info = await self._engine.start()
            if engine_dir is not None and admitted is not None:
                admitted.check_started(
                    engine_dir,
                    engine_digest=info.engine_digest,
                    arithmetic=info.engine,
                    kv_cache=info.kv_cache,
                )
            return info
        except BaseException:
            await self._engine.shutdown()
            raise

    def _load_progress(self) -> LoadProgress | None:
        """What the engine says of its start; None before there is one."""
        return self._engine.loading() if hasattr(self, "_engine") else None

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take in what Serve says of the limits that change while it serves (live.py)."""
        self._limits.reconfigure(user_config)

    async def check_health(self) -> None:
        await self._watchdog.check()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[tuple[Event, ...], None]:
        """Yield the request's messages: one or more events each, in order.

        Raises:
            Overloaded: too many requests wait in the engine; raised before the first message.
            EngineUnavailable: the engine has failed or hangs, or the replica is stopping.
        """
        if self._watchdog.failure is not None:
            raise self._watchdog.failure
        if self._given_up.done():
            raise self._given_up.result()
        waiting, limit = self._engine.load().waiting, self._limits.current.max_waiting_requests
        if limit is not None and waiting > limit:
            raise Overloaded(f"{waiting} requests are waiting for this engine; retry later")
        self._request_ids.add(request.request_id)
        try:
            with self._telemetry.generation(request, self._status()) as span:
                events = coalesce(
                    self._engine.generate(request),
                    self._flush_interval_s,
                    self._given_up,
                    quiet_s=QUIET_S,
                )
                placed: tuple[Event, ...] = (Placed(self._replica_id, pool=self._pool),)
                async with aclosing(events):
                    async for batch in events:
                        span.note(batch)
                        yield placed + batch
                        placed = ()
        finally:
            self._request_ids.discard(request.request_id)

    async def report(self) -> ReplicaStatus:
        """The status, for an ingress that gets no heartbeats."""
        return self._status()

    def _flush_interval_s(self) -> float:
        return flush_interval(len(self._request_ids), self._limits.current.max_flushes_per_s)

    def _status(self) -> ReplicaStatus:
        return ReplicaStatus(
            replica_id=self._replica_id,
            info=self._info,
            load=self._engine.load(),
            gated=self._gated,
            emulated=self._emulated,
            request_ids=tuple(self._request_ids),
            pool=self._pool,
        )

    async def _send_heartbeats(self, still_running: Callable[[], None]) -> None:
        """Report the status to every ingress until the engine is given up. `still_running` is
        called each time."""
        while self._watchdog.failure is None:
            still_running()
            self._departure.note(await self._tell_ingresses("note_status", self._status()))
            if self._departure.overdue and not self._given_up.done():
                self._end_streams()
            await asyncio.sleep(HEARTBEAT_S)

    async def _tell_ingresses(self, method: str, value: Any) -> list[object]:
        """Returns what those that were reached answer."""
        context = serve.get_replica_context()
        try:
            async with asyncio.timeout(HEARTBEAT_S):
                ingress = serve.get_deployment_handle(INGRESS, context.app_name)
                call = ingress.broadcast(method, value)
                return list(await call.results_async(return_exceptions=True))
        except _NO_INGRESS as error:
            log.debug("%s not delivered: %s", method, error)
            return []

    def _end_streams(self) -> None:
        """The time to drain is over: what still runs goes on in other replicas."""
        log.warning("ending %d streams: this replica is stopping", len(self._request_ids))
        self._given_up.set_result(
            ReplicaLost("the engine that held this request is stopping; retry", blame=False)
        )

    async def _give_up(self, failure: EngineUnavailable) -> None:
        """Tell the clients, and end this process: a step that hangs can be ended in no other way,
        and Serve replaces a process that is gone sooner than one that fails its checks."""
        if not self._given_up.done():
            self._given_up.set_result(failure)
        await self._tell_ingresses("note_goodbye", self._replica_id)
        end = asyncio.get_running_loop().time() + _TELL_S
        while self._request_ids and asyncio.get_running_loop().time() < end:
            await asyncio.sleep(0.05)
        await asyncio.sleep(0.2)  # the last messages are handed over, not yet sent
        await asyncio.wait(
            {asyncio.create_task(asyncio.to_thread(self._telemetry.shutdown))}, timeout=_FLUSH_S
        )
        logging.shutdown()
        os._exit(1)

    async def __del__(self) -> None:
        for task in getattr(self, "_tasks", ()):
            task.cancel()
        if hasattr(self, "_tasks"):
            faulthandler.cancel_dump_traceback_later()
            await self._tell_ingresses("note_goodbye", self._replica_id)
        if hasattr(self, "_engine"):
            await self._engine.shutdown()
        if hasattr(self, "_telemetry"):
            self._telemetry.shutdown()
