"""The client of the engine replicas: the actor hop as the ingress sees it.

A request goes through the Serve deployment handle of its pool, which picks a replica; Ray's
exceptions become ours. Status comes the other way: every replica sends a heartbeat to every
ingress. Asking a replica for it would queue behind the requests that it works on, and a full
service could not report its own health. The ingress (openai/ingress.py) makes the client;
replica/replica.py is the other side.

Whether a stream is alive is never judged by its tokens: a queued request or the prefill of a long
prompt is silent for long. A replica sends an empty message meanwhile, so that a stream without any
has lost it: a process that is stopped or cut off says nothing, and neither does the connection to
it. A stream that has had no message yet may not have reached a replica at all, and is judged by
the heartbeats, which name the requests that a replica works on. What ends here is not listened to
any more. Serve delivers no heartbeats to an ingress that it is stopping, whose requests go on and
may need another replica: one that hears nothing asks.

A stream whose replica has gone, fails or stops ends in `ReplicaLost`, which fleet.py answers with
another replica; one that no replica took for lack of room in `Overloaded`.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray.exceptions
from ray.serve import exceptions as serve_exceptions

from deepseek.errors import RequestError
from serve_app.engines.protocol import (
    EngineInfo,
    Event,
    GenerateRequest,
    LoadingReplica,
    ReplicaStatus,
)
from serve_app.errors import ApiError, EngineUnavailable, Overloaded, ReplicaLost
from serve_app.routing.interrupt import Interrupt
from serve_app.routing.loading_board import LoadingBoard

#: Seconds between heartbeats, and the age in seconds at which a silent replica counts as gone.
HEARTBEAT_S = 1.0
MAX_AGE_S = 5.0
#: Seconds without a token after which a replica sends a stream's empty message.
QUIET_S = 3.0
#: Seconds without any message after which a stream is given up; for one that has had none, the age
#: of its replica's last heartbeat. Longer than MAX_AGE_S: to be left out of /health for a moment
#: costs nothing, a lost stream does.
SILENT_S = 10.0
#: Seconds that Serve may go on sending requests to a replica that has fallen silent: it trusts what
#: it last heard of a replica's queue for ten seconds.
_ROUTED_S = 15.0
#: Seconds that a request waits for the first heartbeat of a service that has just started.
PATIENCE_S = 10.0


class StatusBoard:
    """The newest status of each engine replica, by id."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._statuses: dict[str, tuple[float, ReplicaStatus]] = {}  # id -> arrival time, status
        #: What each pool serves, as was heard last; kept when its replicas go.
        self.infos: dict[str, EngineInfo] = {}
        #: The replicas that do not serve yet.
        self.loading = LoadingBoard(clock)
        self._arrived = asyncio.Event()

    def note(self, status: ReplicaStatus) -> None:
        """Take in a heartbeat. One of an older version, without a pool, is an AttributeError: its
        replica is in no deployment that there is a handle to."""
        self.infos[status.pool] = status.info
        self._statuses[status.replica_id] = (self._clock(), status)
        self.loading.ready(status.replica_id, status.pool)
        self._arrived.set()

    def note_loading(self, report: LoadingReplica) -> None:
        """Take in how far a replica is that loads; what comes after its heartbeats is late."""
        if report.replica_id not in self._statuses:
            self.loading.note(report)

    def remove(self, replica_id: str) -> None:
        """Forget a replica that says goodbye; it has no streams, or has ended them itself."""
        self._statuses.pop(replica_id, None)
        self.loading.gone(replica_id)

    def pool_of(self, replica_id: str) -> str | None:
        """The pool of a replica, None where it is not known any more."""
        known = self._statuses.get(replica_id)
        return None if known is None else known[1].pool

    def fresh(self) -> list[ReplicaStatus]:
        """The statuses that are at most MAX_AGE_S old."""
        return self._younger_than(MAX_AGE_S)

    def lost(self, sent: dict[str, float]) -> list[str]:
        """Which of these requests, by id and time of sending, a silent replica holds: no other
        replica names them although it had the time to. None while every replica is heard."""
        now = self._clock()
        self._statuses = {
            replica_id: item
            for replica_id, item in self._statuses.items()
            if now - item[0] <= SILENT_S + _ROUTED_S
        }
        heard = self._younger_than(SILENT_S)
        if len(heard) == len(self._statuses):
            return []
        held = {request_id for status in heard for request_id in status.request_ids}
        return [
            request_id
            for request_id, moment in sent.items()
            if request_id not in held and now - moment > SILENT_S
        ]

    @property
    def unheard_s(self) -> float:
        """Seconds since the newest heartbeat of any replica."""
        newest = max((arrived for arrived, _ in self._statuses.values()), default=-math.inf)
        return self._clock() - newest

    def _younger_than(self, age_s: float) -> list[ReplicaStatus]:
        oldest = self._clock() - age_s
        return [status for arrived, status in self._statuses.values() if arrived >= oldest]

    async def first(self) -> None:
        """Wait up to PATIENCE_S until any pool is known. Raises EngineUnavailable."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not self.infos:
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            raise self.loading.unavailable() from None


@dataclass(slots=True)
class _Stream:
    """One open stream: its hook, since when its next message is awaited (None while it is being
    read), and whether there was one."""

    interrupt: Interrupt
    since_s: float | None
    heard: bool = False


class ReplicaClient:
    """Implements `EngineClient` over Serve's deployment handles, by pool. `watch` must run beside
    it."""

    def __init__(
        self,
        handles: Mapping[str, Any],
        board: StatusBoard,
        clock: Callable[[], float] = time.monotonic,
        *,
        pool_of: Callable[[str], str | None] | None = None,
    ) -> None:
        """`pool_of` gives the pool of a replica, None where it is not known; by default the board
        does."""
        self._pool_of = pool_of or board.pool_of
        self._handles = handles
        self._generate = {
            pool: handle.options(stream=True, method_name="generate")
            for pool, handle in handles.items()
        }
        self._board = board
        self._clock = clock
        self._streams: dict[str, _Stream] = {}
        self._closed: ApiError | None = None

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        if self._closed is not None:
            raise self._closed
        interrupt = Interrupt()
        stream = self._streams[request.request_id] = _Stream(interrupt, self._clock())
        # In a context of its own: Serve gives all calls that are made for one HTTP request one id,
        # and its router forgets all but the first of those that it has not answered yet.
        generate = self._generate[self._pool_for(request)]
        response = contextvars.Context().run(generate.remote, request)
        ended = False
        try:
            while True:
                batch = await interrupt.run(lambda: anext(response, None))
                if batch is None:
                    break
                stream.since_s, stream.heard = None, True
                for event in batch:
                    yield event
                stream.since_s = self._clock()
            ended = True
        except Exception as error:
            if error is interrupt.error:
                raise  # the replica may still work on it: cancelled below
            ended = True
            raise translate(error) from error
        finally:
            del self._streams[request.request_id]
            if not ended:  # cancelling a request that Serve refused raises the refusal again
                response.cancel()

    def _pool_for(self, request: GenerateRequest) -> str:
        """The pool of the replica that admission chose; where it chose none, or that is gone, the
        first of the request's own with a replica."""
        chosen = None if request.replica_id is None else self._pool_of(request.replica_id)
        if chosen in self._generate:
            return chosen
        ready = {status.pool for status in self._board.fresh()}
        return next((pool for pool in request.pools if pool in ready), request.pools[0])

    def close(self, error: ApiError) -> None:
        """End every stream with `error`, and those that are still to come."""
        self._closed = error
        for stream in self._streams.values():
            stream.interrupt.trip(error)

    async def watch(self) -> None:
        """Give up the streams of replicas that have fallen silent. Runs until it is cancelled."""
        checked = self._clock()
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            late = self._clock() - checked > 2 * HEARTBEAT_S
            checked = self._clock()
            # This loop itself was held up, and heartbeats wait unread: they are read first.
            if not late:
                self.end_lost_streams()

    def end_lost_streams(self) -> None:
        """End the streams that have been silent for too long, and those that `StatusBoard.lost`
        names."""
        now = self._clock()
        awaited = {
            name: (stream.since_s, stream.heard)
            for name, stream in self._streams.items()
            if stream.since_s is not None
        }
        silent = [
            name for name, (since_s, heard) in awaited.items() if heard and now - since_s > SILENT_S
        ]
        unheard = {name: since_s for name, (since_s, heard) in awaited.items() if not heard}
        for request_id in silent + self._board.lost(unheard):
            self._streams[request_id].interrupt.trip(
                ReplicaLost("the engine that held this request has fallen silent; retry")
            )

    async def ask(
        self, note: Callable[[ReplicaStatus], Awaitable[object]], every_s: float = HEARTBEAT_S
    ) -> None:
        """Ask all replicas for their statuses while none sends one. Runs until it is cancelled."""
        while True:
            await asyncio.sleep(every_s)
            if self._board.unheard_s <= 2 * HEARTBEAT_S:
                continue
            await asyncio.gather(*(_ask_one(handle, note) for handle in self._handles.values()))

    async def statuses(self) -> list[ReplicaStatus]:
        if not (fresh := self._board.fresh()):
            raise self._board.loading.unavailable()
        return fresh

    async def infos(self, *, wait: bool = True) -> Mapping[str, EngineInfo]:
        if wait:
            await self._board.first()
        return self._board.infos


async def _ask_one(handle: Any, note: Callable[[ReplicaStatus], Awaitable[object]]) -> None:
    """Ask the replicas of one pool for their statuses."""
    try:
        async with asyncio.timeout(HEARTBEAT_S):
            call = handle.broadcast("report")
            answers = await call.results_async(return_exceptions=True)
    except (serve_exceptions.RayServeException, ray.exceptions.RayError, TimeoutError):
        return
    for answer in answers:
        if isinstance(answer, ReplicaStatus):
            await note(answer)


def translate(error: Exception) -> Exception:
    """The error of ours for an exception of Ray's; one that the replica raised is unwrapped."""
    if isinstance(error, ray.exceptions.RayTaskError):
        cause = error.cause
        if type(cause) is EngineUnavailable:
            return ReplicaLost(str(cause))
        if isinstance(cause, ApiError | RequestError):
            return cause
        return error
    if isinstance(error, serve_exceptions.BackPressureError):
        return Overloaded("all engines are busy and the queue is full; retry later")
    gone = (
        ray.exceptions.RayActorError,
        ray.exceptions.TaskCancelledError,
        serve_exceptions.ReplicaUnavailableError,
    )
    if isinstance(error, gone):
        return ReplicaLost("the engine that held this request has gone; retry")
    if isinstance(error, serve_exceptions.DeploymentUnavailableError):  # nor will there be one
        return EngineUnavailable("no engine replica can be started; retry later")
    return error
