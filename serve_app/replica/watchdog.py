"""Decides when a replica gives up its engine: its check fails, or it has work and does no step.

It runs on the replica's event loop, for any adapter of the engine protocol. An event loop that
itself is held up (native code that keeps Python's lock) cannot decide anything: for that case the
interpreter's own watchdog, which needs no lock, ends the process.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable

from serve_app.engines.protocol import Engine
from serve_app.errors import EngineUnavailable

log = logging.getLogger("ray.serve")

#: Seconds between two looks at the engine, at most.
LOOK_S = 0.5
#: Seconds that `Engine.check` may take.
CHECK_S = 10.0


class Watchdog:
    """`failure` is set once the engine is given up; the replica refuses requests from then on.

    `max_step_s` is the longest that an engine with work may take for one step.
    """

    def __init__(self, engine: Engine, *, max_step_s: float) -> None:
        self._engine = engine
        self._max_step_s = max_step_s
        self.failure: EngineUnavailable | None = None

    async def check(self) -> None:
        """Raises EngineUnavailable or what the engine's own check raises: it must be replaced."""
        if self.failure is not None:
            raise self.failure
        stalled_s = self._engine.stalled_s()
        if stalled_s > self._max_step_s:
            raise EngineUnavailable(
                f"the engine has finished no step for {stalled_s:.0f} s and is being replaced; "
                "retry later"
            )
        async with asyncio.timeout(CHECK_S):
            await self._engine.check()

    async def run(self, give_up: Callable[[EngineUnavailable], Awaitable[None]]) -> None:
        """Look at the engine until it must be given up; then await `give_up` once."""
        while True:
            try:
                await self.check()
            except Exception as error:  # whatever an adapter's check raises means the same
                self.failure = _as_unavailable(error)
                log.error("giving up the engine: %s\n%s", error, _stacks(), exc_info=error)
                await give_up(self.failure)
                return
            await asyncio.sleep(min(LOOK_S, self._max_step_s / 4))


def _as_unavailable(error: Exception) -> EngineUnavailable:
    if isinstance(error, EngineUnavailable):
        return error
    return EngineUnavailable("the engine has failed and is being replaced; retry later")


def guard_event_loop(max_block_s: float) -> Callable[[], None]:
    """End this process, with all stacks on stderr, unless the returned function is called at
    least every `max_block_s` seconds. There is one such guard per process."""

    def rearm() -> None:
        faulthandler.dump_traceback_later(max_block_s, exit=True, file=2)

    rearm()
    return rearm


def _stacks() -> str:
    """Where each thread of this process is: what an engine hangs in."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )
