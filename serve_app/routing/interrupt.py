"""Ends from outside what one request is waiting for: an engine's next message, or its own body.

The client of the replicas interrupts the streams of a replica that has fallen silent, and all
streams when the service stops; the drain interrupts bodies that are still arriving. It costs an
await a few microseconds, not a task.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from serve_app.errors import ApiError

T = TypeVar("T")


class Interrupt:
    """Belongs to one request: after `trip`, its current and its later awaits raise the error."""

    def __init__(self) -> None:
        #: What `run` raises; None until `trip`.
        self.error: ApiError | None = None
        self._scope: asyncio.Timeout | None = None

    def trip(self, error: ApiError) -> None:
        """Make `run` raise `error`, now or when it is next called. Only the first call counts."""
        if self.error is not None:
            return
        self.error = error
        if self._scope is not None:
            self._scope.reschedule(asyncio.get_running_loop().time())

    async def run(self, start: Callable[[], Awaitable[T]]) -> T:
        """Await what `start` returns. One call at a time.

        Raises:
            ApiError: the request was interrupted.
        """
        if self.error is not None:
            raise self.error
        try:
            async with asyncio.timeout(None) as self._scope:
                return await start()
        except TimeoutError:
            if self.error is None:
                raise  # what was awaited had a time limit of its own
            raise self.error from None
        finally:
            self._scope = None
