"""The actor hop as the ingress sees it: a handle of Serve's on one side, our words on the other.

It translates Ray's exceptions to ours; nothing behind it knows Ray. Status calls are broadcast,
which bypasses the queues: a full service still answers for its health and its metrics.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import ray.exceptions
from ray.serve import exceptions as serve_exceptions

from deepseek.errors import RequestError
from serve_app.engines.protocol import EngineInfo, Event, GenerateRequest, ReplicaStatus
from serve_app.errors import ApiError, EngineUnavailable, Overloaded


class ReplicaClient:
    """`EngineClient` over a Serve deployment handle."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._stream = handle.options(stream=True, method_name="generate")
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

    async def statuses(self, timeout_s: float) -> list[ReplicaStatus]:
        try:
            async with asyncio.timeout(timeout_s):
                response = self._handle.broadcast("status")
                found = await response.results_async(return_exceptions=True)
        except Exception as error:
            raise EngineUnavailable("no engine replica is ready; retry later") from error
        ready = [status for status in found if isinstance(status, ReplicaStatus)]
        if not ready:
            raise EngineUnavailable("no engine replica is ready; retry later")
        return ready

    async def info(self) -> EngineInfo:
        if self._info is None:
            self._info = (await self.statuses(timeout_s=10.0))[0].info
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
