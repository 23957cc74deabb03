"""The actor hop as the ingress sees it: a handle of Serve's on one side, our words on the other.

Requests go through the handle; Ray's exceptions are translated to ours. What the replicas say of
themselves comes the other way, as a heartbeat that each sends to every ingress: asking them would
queue behind the requests that they work on, so that a full service could not tell its own health.
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

#: Seconds between heartbeats, and the age at which a replica that sends none counts as gone.
HEARTBEAT_S = 1.0
MAX_AGE_S = 5.0
#: How long a request waits for the first heartbeat of a service that has just started.
PATIENCE_S = 10.0


class StatusBoard:
    """The newest status of each engine replica, by id."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._noted: dict[str, tuple[float, ReplicaStatus]] = {}
        self._news = asyncio.Event()

    def note(self, status: ReplicaStatus) -> None:
        self._noted[status.replica_id] = (self._clock(), status)
        self._news.set()

    def fresh(self) -> list[ReplicaStatus]:
        """Of the replicas that have been heard of lately; the others are forgotten."""
        oldest = self._clock() - MAX_AGE_S
        self._noted = {name: item for name, item in self._noted.items() if item[0] >= oldest}
        return [status for _, status in self._noted.values()]

    async def first(self) -> ReplicaStatus:
        """Any fresh status, waiting a little for one. Raises EngineUnavailable."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not (fresh := self.fresh()):
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            raise EngineUnavailable("no engine replica is ready; retry later") from None
        return fresh[0]


class ReplicaClient:
    """`EngineClient` over a Serve deployment handle."""

    def __init__(self, handle: Any, board: StatusBoard) -> None:
        self._stream = handle.options(stream=True, method_name="generate")
        self._board = board
        self._info: EngineInfo | None = None

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        response = self._stream.remote(request)
        over = False
        try:
            async for batch in response:
                for event in batch:
                    yield event
            over = True
        except Exception as error:
            over = True
            raise translate(error) from error
        finally:
            if not over:  # cancelling what Serve refused raises the refusal a second time
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
    """Ray's exceptions as ours; an exception of the replica's own code is unwrapped."""
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
