"""The client of the engine replicas: the actor hop as the ingress sees it.

A request goes through a Serve deployment handle, which picks a replica; Ray's exceptions become
ours. Status comes the other way: every replica sends a heartbeat to every ingress. Asking a replica
for it would queue behind the requests that it works on, and a full service could not report its own
health. The ingress (openai/ingress.py) makes the client; replica/replica.py is the other side.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

import ray.exceptions
from ray.serve import exceptions as serve_exceptions

from deepseek.errors import RequestError
from serve_app.engines.protocol import EngineInfo, Event, GenerateRequest, ReplicaStatus
from serve_app.errors import ApiError, EngineUnavailable, Overloaded

#: Seconds between heartbeats, and the age in seconds at which a silent replica counts as gone.
HEARTBEAT_S = 1.0
MAX_AGE_S = 5.0
#: Seconds that a request waits for the first heartbeat of a service that has just started.
PATIENCE_S = 10.0


class StatusBoard:
    """The newest status of each engine replica, by id."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._statuses: dict[str, tuple[float, ReplicaStatus]] = {}  # id -> arrival time, status
        self._arrived = asyncio.Event()

    def note(self, status: ReplicaStatus) -> None:
        """Take in a heartbeat."""
        self._statuses[status.replica_id] = (self._clock(), status)
        self._arrived.set()

    def fresh(self) -> list[ReplicaStatus]:
        """The statuses that are at most MAX_AGE_S old; older ones are dropped."""
        oldest = self._clock() - MAX_AGE_S
        self._statuses = {name: item for name, item in self._statuses.items() if item[0] >= oldest}
        return [status for _, status in self._statuses.values()]

    async def first(self) -> ReplicaStatus:
        """Any fresh status; waits up to PATIENCE_S for one. Raises EngineUnavailable."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not (fresh := self.fresh()):
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            raise EngineUnavailable("no engine replica is ready; retry later") from None
        return fresh[0]


class ReplicaClient:
    """Implements `EngineClient` over a Serve deployment handle."""

    def __init__(self, handle: Any, board: StatusBoard) -> None:
        self._stream = handle.options(stream=True, method_name="generate")
        self._board = board
        self._info: EngineInfo | None = None

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        response = self._stream.remote(request)
        ended = False
        try:
            async for batch in response:
                for event in batch:
                    yield event
            ended = True
        except Exception as error:
            ended = True
            raise translate(error) from error
        finally:
            if not ended:  # cancelling a request that Serve refused raises the refusal again
                response.cancel()

    async def statuses(self) -> list[ReplicaStatus]:
        if not (fresh := self._board.fresh()):
            raise EngineUnavailable("no engine replica is ready; retry later")
        return fresh

    async def info(self) -> EngineInfo:
        if self._info is None:
            self._info = (await self._board.first()).info
        return self._info


def translate(error: Exception) -> Exception:
    """The error of ours for an exception of Ray's; one that the replica raised is unwrapped."""
    if isinstance(error, ray.exceptions.RayTaskError):
        cause = error.cause
        if isinstance(cause, ApiError | RequestError):
            return cause
        return error
    if isinstance(error, serve_exceptions.BackPressureError):
        return Overloaded("all engines are busy and the queue is full; retry later")
    gone = (
        ray.exceptions.RayActorError,
        ray.exceptions.TaskCancelledError,
        serve_exceptions.DeploymentUnavailableError,
        serve_exceptions.ReplicaUnavailableError,
    )
    if isinstance(error, gone):
        return EngineUnavailable("the engine that held this request has gone; retry")
    return error
