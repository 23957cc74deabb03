"""Several events as one message: what is ready when a flush is due goes out together.

The cost per token therefore falls as load rises, and an interval can bound the messages of each
stream further. The first flush of a stream is never delayed, nor is its end.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from serve_app.engines.protocol import Done, Event, Tokens


async def coalesce(
    events: AsyncGenerator[Event, None], interval_s: float
) -> AsyncGenerator[tuple[Event, ...], None]:
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
