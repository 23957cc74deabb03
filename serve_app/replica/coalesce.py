"""Several events as one message: what is ready when a flush is due goes out together.

A message costs about a millisecond of CPU on its way from the replica to the socket (actor hop,
ingress, proxy), whatever it holds. A replica therefore spends a fixed budget of messages per second
and shares it among its streams: one stream gets every token at once, a hundred get theirs in
groups. The first flush of a stream is never delayed, nor is its end.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from serve_app.engines.protocol import Done, Event, Tokens

#: A reader does not notice pauses up to about this.
MAX_INTERVAL_S = 0.1


def flush_interval(num_streams: int, max_flushes_per_s: float | None) -> float:
    """Seconds between two flushes of one stream, so that all together keep to the budget."""
    if max_flushes_per_s is None:
        return 0.0
    return min(MAX_INTERVAL_S, num_streams / max_flushes_per_s)


async def coalesce(
    events: AsyncGenerator[Event, None], interval_s: Callable[[], float]
) -> AsyncGenerator[tuple[Event, ...], None]:
    """Everything that is ready, as at most one `Tokens` and one `Done` per item.

    Two flushes with tokens only are at least `interval_s()` apart; `Done` does not wait. Closing it
    closes `events`.
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
            if not ended and (pause_s := interval_s()) > 0.0:
                await asyncio.wait({task}, timeout=pause_s)
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
