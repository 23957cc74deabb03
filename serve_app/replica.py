"""The engine deployment: one replica is one engine behind the actor hop.

Events are coalesced: what is ready goes out as one message, so that the cost per token falls as
load rises, and `flush_interval_s` can bound the messages of each stream further. The first flush of
a stream is never delayed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

from ray import serve

from serve_app.engines.protocol import (
    Done,
    Engine,
    Event,
    GenerateRequest,
    ReplicaStatus,
    Tokens,
)
from serve_app.errors import Overloaded
from serve_app.telemetry import Telemetry

log = logging.getLogger("ray.serve")

EngineFactory = Callable[[], Engine]


class EngineReplica:
    """Wraps one engine. Serve calls `check_health`, `reconfigure` and `__del__`."""

    async def __init__(self, make_engine: EngineFactory, flush_interval_s: float) -> None:
        self._telemetry = Telemetry.from_environment()
        self._flush_interval_s = flush_interval_s
        self._max_waiting: int | None = None
        self._replica_id = serve.get_replica_context().replica_id.unique_id
        self._engine = make_engine()
        self._info = await self._engine.start()
        if not self._info.gated:
            log.warning("UNGATED: %s has not passed its accuracy gate", self._info.model_id)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Limits that may change while serving; anything else needs a new deployment."""
        limits = dict(user_config)
        self._max_waiting = limits.pop("max_waiting_requests")
        assert not limits, f"unknown limits {sorted(limits)}"

    async def check_health(self) -> None:
        await self._engine.check()

    async def generate(self, request: GenerateRequest) -> AsyncIterator[tuple[Event, ...]]:
        """Events in order, several per message. Raises Overloaded before the first."""
        waiting = self._engine.load().waiting
        if self._max_waiting is not None and waiting > self._max_waiting:
            raise Overloaded(f"{waiting} requests are waiting for this engine; retry later")
        with self._telemetry.generation(request) as span:
            events = coalesce(self._engine.generate(request), self._flush_interval_s)
            async with aclosing(events):
                async for batch in events:
                    span.note(batch)
                    yield batch

    async def status(self) -> ReplicaStatus:
        return ReplicaStatus(self._replica_id, self._info, self._engine.load())

    async def __del__(self) -> None:
        if hasattr(self, "_engine"):
            await self._engine.shutdown()
        if hasattr(self, "_telemetry"):
            self._telemetry.shutdown()


async def coalesce(
    events: AsyncIterator[Event], interval_s: float
) -> AsyncIterator[tuple[Event, ...]]:
    """Everything that is ready, as at most one `Tokens` and one `Done` per item.

    Two flushes with tokens only are at least `interval_s` apart; `Done` does not wait. Closing it
    closes `events`.
    """
    ready: list[Event] = []
    arrived = asyncio.Event()
    failure: list[Exception] = []
    ended = False

    async def pump() -> None:
        nonlocal ended
        try:
            async with aclosing(events):  # type: ignore[type-var]
                async for event in events:
                    ready.append(event)
                    arrived.set()
                    if isinstance(event, Done):
                        break
        except Exception as error:
            failure.append(error)
        finally:
            ended = True
            arrived.set()

    task = asyncio.create_task(pump())
    try:
        while True:
            await arrived.wait()
            arrived.clear()
            batch, ready[:] = merge_events(ready), []
            if batch:
                yield batch
            if ended and not ready:
                break
            if interval_s and not ended:
                await asyncio.wait({task}, timeout=interval_s)
        if failure:
            raise failure[0]
    finally:
        task.cancel()


def merge_events(events: list[Event]) -> tuple[Event, ...]:
    """Neighboring `Tokens` as one; order kept."""
    merged: list[Event] = []
    run: list[Tokens] = []
    for event in events:
        if isinstance(event, Tokens):
            run.append(event)
            continue
        merged.extend(_joined(run))
        run = []
        merged.append(event)
    merged.extend(_joined(run))
    return tuple(merged)


def _joined(run: list[Tokens]) -> list[Event]:
    if len(run) < 2:
        return list(run)
    token_ids = tuple(token for tokens in run for token in tokens.token_ids)
    logprobs = tuple(item for tokens in run for item in tokens.logprobs)
    return [Tokens(token_ids, "".join(tokens.text for tokens in run), logprobs)]
