"""A fleet in one process: engines behind a fake Serve handle, the real board, client and Fleet.

A replica here can die, hang, wake, be drained and fail, as a process does under Serve; nothing of
the service is faked above the handle. Time for heartbeats is a clock of the test's (`pass_time`),
so that ten seconds of silence take none.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import ray.exceptions
from ray.serve.exceptions import RayServeException

from serve_app.config import EchoOptions
from serve_app.engines.echo import EchoEngine
from serve_app.engines.protocol import (
    Done,
    Engine,
    EngineInfo,
    Event,
    GenerateRequest,
    Placed,
    ReplicaStatus,
    Tokens,
)
from serve_app.errors import EngineUnavailable
from serve_app.routing.admission_client import Admission, OpenAdmission
from serve_app.routing.fleet import Fleet
from serve_app.routing.replica_client import HEARTBEAT_S, ReplicaClient, StatusBoard
from serve_app.routing.tickets import Leave, Move
from serve_app.sections import ResumeSection
from serve_app.setting_types import POOL

#: What a stream raises when its replica's process is gone: over Ray's own calls, and over gRPC.
GONE: tuple[Callable[[], Exception], ...] = (
    ray.exceptions.ActorDiedError,
    lambda: ray.exceptions.ActorUnavailableError("The actor is unavailable", None),
)


class LocalReplica:
    """One engine as a replica's process: `streams` are the responses that read from it."""

    def __init__(self, replica_id: str, engine: Engine, pool: str = POOL) -> None:
        self.replica_id = replica_id
        self.pool = pool
        self.engine = engine
        self.info: EngineInfo | None = None
        self.streams: set[LocalStream] = set()
        #: Listed by Serve: newcomers may come.
        self.listed = True
        self.draining = False
        self.alive = True
        #: Cleared while it hangs: it neither sends nor hears anything.
        self.awake = asyncio.Event()
        self.awake.set()
        #: Ids of all requests that it was sent, and of those that were cancelled.
        self.received: list[GenerateRequest] = []
        self.cancelled: list[str] = []

    def status(self) -> ReplicaStatus:
        assert self.info is not None
        return ReplicaStatus(
            replica_id=self.replica_id,
            info=self.info,
            load=self.engine.load(),
            gated=True,
            request_ids=tuple(stream.request.request_id for stream in self.streams),
            pool=self.pool,
        )


class LocalStream:
    """What `ReplicaClient` uses of a Serve response; each event is a message."""

    def __init__(self, replicas: LocalFleet, request: GenerateRequest, pool: str) -> None:
        self.request = request
        self._pool = pool
        self.num_tokens = len(request.output_ids)
        self._fleet = replicas
        self._replica: LocalReplica | None = None
        self._messages: asyncio.Queue[tuple[Event, ...] | Exception] = asyncio.Queue()
        self._task = asyncio.create_task(self._run())
        self._ended = self._placed = False

    async def __anext__(self) -> tuple[Event, ...]:
        message = await self._messages.get()
        if isinstance(message, Exception):
            raise message
        return message

    def cancel(self) -> None:
        self._task.cancel()

    def end(self, error: Exception) -> None:
        """Nothing more comes from the engine; the reader gets `error` after what was sent."""
        if not self._ended:
            self._ended = True
            self._messages.put_nowait(error)
            self._task.cancel()

    async def _run(self) -> None:
        replica = self._replica = await self._fleet.route(self.request, self._pool)
        replica.streams.add(self)
        replica.received.append(self.request)
        try:
            await replica.awake.wait()
            await self._send(replica)
            self._put(StopAsyncIteration())
        except asyncio.CancelledError:
            if not self._ended:
                replica.cancelled.append(self.request.request_id)
            raise
        except Exception as error:
            self._put(raised_by_replica(error))
        finally:
            replica.streams.discard(self)

    async def _send(self, replica: LocalReplica) -> None:
        events = replica.engine.generate(self.request)
        try:
            async for event in events:
                await replica.awake.wait()
                self._fleet.before_message(replica, self, event)
                await replica.awake.wait()
                await asyncio.sleep(0)  # a switch that was thrown just now comes first
                if isinstance(event, Tokens):
                    self.num_tokens += len(event.token_ids)
                self._put((*self._place(replica), event))
        finally:
            await events.aclose()

    def sign(self) -> None:
        """The message of a stream that has been quiet for a while."""
        assert self._replica is not None
        self._put(self._place(self._replica))

    def _place(self, replica: LocalReplica) -> tuple[Event, ...]:
        placed = () if self._placed else (Placed(replica.replica_id, pool=replica.pool),)
        self._placed = True
        return placed

    def _put(self, message: tuple[Event, ...] | Exception) -> None:
        if not self._ended:
            self._ended = isinstance(message, Exception)
            self._messages.put_nowait(message)


class LocalBroadcast:
    """What `ReplicaClient` uses of a broadcast: the statuses of those that can answer."""

    def __init__(self, replicas: list[LocalReplica]) -> None:
        self._replicas = [one for one in replicas if one.listed and one.awake.is_set()]

    async def results_async(self, return_exceptions: bool) -> list[object]:
        if not self._replicas:
            raise RayServeException("no replica")
        return [one.status() for one in self._replicas]


class LocalHandle:
    """What `ReplicaClient` uses of the handle of one pool's deployment."""

    def __init__(self, replicas: LocalFleet, pool: str) -> None:
        self._fleet = replicas
        self._pool = pool

    def options(self, **_: Any) -> LocalHandle:
        return self

    def remote(self, request: GenerateRequest) -> LocalStream:
        return LocalStream(self._fleet, request, self._pool)

    def broadcast(self, method: str) -> LocalBroadcast:
        assert method == "report"
        return LocalBroadcast(self._fleet.of_pool(self._pool))


class LocalFleet:
    """N replicas, and `fleet` over them. `pools` says which replicas are of which pool; all others
    are of the default one.

    `before_message` may be replaced: it is called with the replica, the stream and the event before
    each message leaves, and may throw a switch. `stream.num_tokens` counts the sequence's tokens
    that have left by then, those of earlier replicas included.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        *,
        admission: Admission | None = None,
        settings: ResumeSection | None = None,
        pools: Mapping[str, str] | None = None,
        **fleet_options: Any,
    ) -> None:
        self.now = 1000.0
        of = pools or {}
        self.replicas = {
            name: LocalReplica(name, engine, of.get(name, POOL)) for name, engine in engines.items()
        }
        handles = {pool: LocalHandle(self, pool) for pool in {POOL, *of.values()}}
        self.board = StatusBoard(clock=lambda: self.now)
        self.client = ReplicaClient(handles, self.board, clock=lambda: self.now)
        self.admission = admission or OpenAdmission()
        self.fleet = Fleet(
            self.client,
            self.admission,
            settings or ResumeSection(),
            pool_of=self.board.pool_of,
            **fleet_options,
        )
        self.before_message: Callable[[LocalReplica, LocalStream, Event], None] = (
            lambda replica, stream, event: None
        )
        self._changed = asyncio.Event()

    def of_pool(self, pool: str) -> list[LocalReplica]:
        return [one for one in self.replicas.values() if one.pool == pool]

    async def route(self, request: GenerateRequest, pool: str) -> LocalReplica:
        """As the router of the service: the named replica, else the least busy of those that are
        not avoided, else any; waits while none is listed."""
        while not (listed := [one for one in self.of_pool(pool) if one.listed]):
            self._changed.clear()
            await self._changed.wait()
        for ranked in (
            [one for one in listed if one.replica_id == request.replica_id],
            [one for one in listed if one.replica_id not in request.avoid],
            listed,
        ):
            if ranked:
                return min(ranked, key=lambda one: len(one.streams))
        raise AssertionError("unreachable")

    # Switches.

    async def start(self) -> None:
        """Start the engines, each once, and hear of every replica."""
        for replica in self.replicas.values():
            if replica.info is None:
                known = [one.info for one in self.replicas.values() if one.engine is replica.engine]
                infos = [info for info in known if info is not None]
                replica.info = infos[0] if infos else await replica.engine.start()
        self.beat()

    async def add(self, replica_id: str, engine: Engine) -> None:
        """A replica more, as Serve starts one in place of another. `engine` may be the one of a
        replica that is lost: nothing of it is kept but the weights."""
        self.replicas[replica_id] = LocalReplica(replica_id, engine)
        await self.start()
        self._changed.set()

    def die(self, replica_id: str, error: Callable[[], Exception] = GONE[0]) -> None:
        """SIGKILL: its streams raise what Ray raises."""
        replica = self.replicas[replica_id]
        replica.listed = replica.alive = False
        for stream in list(replica.streams):
            stream.end(error())

    def hang(self, replica_id: str) -> None:
        """SIGSTOP: no message and no heartbeat; Serve has noticed nothing yet."""
        self.replicas[replica_id].awake.clear()

    def unlist(self, replica_id: str) -> None:
        """Serve sends it no newcomers any more."""
        self.replicas[replica_id].listed = False

    def wake(self, replica_id: str) -> None:
        """SIGCONT: everything that it held back goes out."""
        self.replicas[replica_id].awake.set()

    def drain(self, replica_id: str) -> None:
        """Serve stops it: no newcomers, and its streams go on until `cut`."""
        self.replicas[replica_id].draining = True
        self.unlist(replica_id)

    def cut(self, replica_id: str, error: Exception | None = None) -> None:
        """The time to drain is over: the replica ends its streams itself, then its process."""
        replica = self.replicas[replica_id]
        replica.listed = replica.alive = False
        ended = error or EngineUnavailable("the engine that held this request is stopping; retry")
        for stream in list(replica.streams):
            stream.end(raised_by_replica(ended))
        self.board.remove(replica_id)

    def fail(self, replica_id: str, error: str = "the engine failed; retry") -> None:
        """Its step fails: every stream ends in an error event; the process lives on for a moment
        and is listed until Serve replaces it."""
        replica = self.replicas[replica_id]
        for stream in list(replica.streams):
            prompt_tokens = len(stream.request.prompt_ids)
            done = Done("error", prompt_tokens, stream.num_tokens, error=error, retryable=True)
            stream._put((done,))
            stream.end(StopAsyncIteration())

    # Time.

    def beat(self) -> None:
        """A heartbeat of each replica that can send one, and its streams' signs of life."""
        for replica in self.replicas.values():
            if replica.alive and replica.awake.is_set() and replica.info is not None:
                self.board.note(replica.status())
                for stream in replica.streams:
                    stream.sign()

    async def pass_time(self, seconds: float) -> None:
        """Let `seconds` pass on the board's clock: heartbeats, and what the client's watch does."""
        end = self.now + seconds
        while self.now < end:
            self.now += HEARTBEAT_S
            await settle()
            self.beat()
            self.client.end_lost_streams()
        await settle()


class NotedAdmission(OpenAdmission):
    """Lets everybody in and notes what it was told. `grants` are the places that it names, in
    order, then None; one that is an exception is raised."""

    def __init__(self, *grants: str | Exception | None) -> None:
        self.grants = list(grants)
        self.moves: list[Move] = []
        self.landings: list[tuple[str, str]] = []
        self.leaves: list[Leave] = []

    async def place(self, sequence_id: str) -> str | None:
        grant = self.grants.pop(0) if self.grants else None
        if isinstance(grant, Exception):
            raise grant
        return grant

    async def move(self, move: Move) -> str | None:
        self.moves.append(move)
        return await self.place(move.sequence_id)

    def landed(self, sequence_id: str, replica_id: str) -> None:
        self.landings.append((sequence_id, replica_id))

    def leave(self, leave: Leave) -> None:
        self.leaves.append(leave)


@asynccontextmanager
async def echo_fleet(
    num_replicas: int = 2, options: EchoOptions | None = None, **settings: Any
) -> AsyncGenerator[LocalFleet, None]:
    """A started fleet of echo engines `a`, `b`, ...; `settings` are those of `LocalFleet`."""
    names = "abcdefgh"[:num_replicas]
    fleet = LocalFleet({name: EchoEngine(options or EchoOptions()) for name in names}, **settings)
    await fleet.start()
    yield fleet


async def settle() -> None:
    """Let everything run that is ready."""
    for _ in range(20):
        await asyncio.sleep(0)


async def read(fleet: Fleet, request: GenerateRequest) -> list[Event]:
    """All events of one sequence."""
    return [event async for event in fleet.generate(request)]


def raised_by_replica(error: Exception) -> Exception:
    """The error as it arrives from a replica that raised it; a refusal of Serve's own is raised on
    the way there."""
    if isinstance(error, StopAsyncIteration | RayServeException):
        return error
    wrapped: Exception = ray.exceptions.RayTaskError("generate", "", error).as_instanceof_cause()
    return wrapped


# What tests of a fleet do and ask.

Switch = Callable[[LocalFleet, str], None]


def after(num_tokens: int, fleet: LocalFleet, switch: Switch, *, times: int = 1) -> None:
    """Throw the switch of a replica once a sequence has so many tokens, for the first `times`."""
    thrown = 0

    def look(replica: LocalReplica, stream: LocalStream, event: Event) -> None:
        nonlocal thrown
        if stream.num_tokens >= num_tokens and thrown < times:
            thrown += 1
            switch(fleet, replica.replica_id)

    fleet.before_message = look


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Tokens))


def places(events: list[Event]) -> list[tuple[str, int]]:
    return [(one.replica_id, one.attempt) for one in events if isinstance(one, Placed)]


def done_of(events: list[Event]) -> Done:
    (done,) = [event for event in events if isinstance(event, Done)]
    return done
