"""Joins the events of one stream into messages: a flush sends everything that is ready.

A message costs about a millisecond of CPU on its way from the replica to the socket (actor hop,
ingress, proxy), whatever it holds. A replica therefore has a fixed budget of messages per second
and shares it among its streams: a single stream sends every token at once, a hundred streams send
theirs in groups. The first message of a stream is never delayed, nor is its end. replica.py calls
it; it knows no Ray.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from serve_app.engines.events import merge_events
from serve_app.engines.protocol import Done, Event
from serve_app.errors import EngineUnavailable

#: Longest pause between two messages of a stream: six a second, and text appears faster than it is
#: read.
MAX_INTERVAL_S = 0.16


def flush_interval(num_streams: int, max_flushes_per_s: float | None) -> float:
    """Seconds between two messages of one stream that keep all streams within the budget."""
    if max_flushes_per_s is None:
        return 0.0
    return min(MAX_INTERVAL_S, num_streams / max_flushes_per_s)


async def coalesce(
    events: AsyncGenerator[Event, None],
    interval_s: Callable[[], float],
    given_up: asyncio.Future[EngineUnavailable] | None = None,
    quiet_s: float | None = None,
) -> AsyncGenerator[tuple[Event, ...], None]:
    """Yield everything that is ready, as at most one event of each kind per message.

    Two messages that hold tokens only are at least `interval_s()` apart; `Done` does not wait. When
    nothing has been ready for `quiet_s` seconds, an empty message says that the stream lives.
    Closing this iterator closes `events`. An exception of `events` follows what came before it; so
    does the result of `given_up`, the engine's failure, without waiting for `events` any more.
    """
    ready: list[Event] = []
    arrived = asyncio.Event()
    failure: list[Exception] = []
    ended = False

    async def pump() -> None:
        nonlocal ended
        try:
            async with aclosing(events):
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

    def give_up(future: asyncio.Future[EngineUnavailable]) -> None:
        nonlocal ended
        if not ended:
            failure.append(future.result())
            ended = True
            task.cancel()
            arrived.set()

    task = asyncio.create_task(pump())
    if given_up is not None:
        given_up.add_done_callback(give_up)
    try:
        while True:
            try:
                async with asyncio.timeout(quiet_s):
                    await arrived.wait()
            except TimeoutError:
                yield ()
                continue
            arrived.clear()
            batch, ready[:] = merge_events(ready), []
            if batch:
                yield batch
            if ended and not ready:
                break
            if not ended and (pause_s := interval_s()) > 0.0:
                await asyncio.wait({task}, timeout=pause_s)
        if failure:
            raise failure[0]
    finally:
        if given_up is not None:
            given_up.remove_done_callback(give_up)
        task.cancel()
