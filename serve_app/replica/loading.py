"""How far a replica is that does not serve yet: phase, bytes, seconds left.

Serve waits for a replica's constructor as long as it takes and asks it nothing meanwhile, so that a
load of minutes looks like one that hangs. The replica tells every ingress instead, once a second,
as it later sends heartbeats; and why, when it gives up.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from deepseek.errors import first_line
from serve_app.engines.protocol import LoadingReplica, LoadProgress

log = logging.getLogger("ray.serve")

#: Seconds between two reports.
REPORT_S = 1.0
#: Seconds of a phase before its speed says how long it takes.
_TELLING_S = 2.0
#: Characters of the sentence of a load that failed, at most.
_SENTENCE = 600


class Loading:
    """The progress of one replica. `note` may be called from any thread."""

    def __init__(
        self,
        replica_id: str,
        *,
        pool: str,
        node: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._replica_id, self._pool, self._node = replica_id, pool, node
        self._clock = clock
        self._lock = threading.Lock()
        self._began = clock()
        self._progress = LoadProgress("starting")
        self._phase_began, self._phase_done = self._began, 0
        self.failure: str | None = None

    def note(self, progress: LoadProgress) -> None:
        """Take in how far it is. A new phase, or more bytes than before in all, begins anew."""
        with self._lock:
            old, self._progress = self._progress, progress
            if progress.phase == old.phase and progress.total_bytes == old.total_bytes:
                return
            self._phase_began, self._phase_done = self._clock(), progress.done_bytes
            seconds = self._clock() - self._began
        if progress.phase != old.phase:
            log.info("loading after %.0f s: %s", seconds, progress.phase)

    def report(self) -> LoadingReplica:
        """All of it as of now."""
        with self._lock:
            now = self._clock()
            return LoadingReplica(
                replica_id=self._replica_id,
                progress=self._progress,
                elapsed_s=now - self._began,
                eta_s=self._eta_s(now),
                pool=self._pool,
                node=self._node,
                failure=self.failure,
            )

    def _eta_s(self, now: float) -> float | None:
        done, total = self._progress.done_bytes, self._progress.total_bytes
        seconds, read = now - self._phase_began, done - self._phase_done
        if total <= 0 or seconds < _TELLING_S or read <= 0:
            return None
        return max(0, total - done) * seconds / read

    @contextlib.asynccontextmanager
    async def told(
        self,
        tell: Callable[[LoadingReplica], Awaitable[object]],
        look: Callable[[], LoadProgress | None],
        every_s: float = REPORT_S,
    ) -> AsyncIterator[None]:
        """Within, `look` is asked for progress and `tell` gets a report every `every_s` seconds;
        and a last one, with the reason, when what is within raises."""
        task = asyncio.create_task(self._tell(tell, look, every_s))
        try:
            yield
        except Exception as error:
            self.failure = first_line(error)[:_SENTENCE]
            log.error("the engine did not load: %s", self.failure)
            raise
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            if self.failure is not None:
                await tell(self.report())

    async def _tell(
        self,
        tell: Callable[[LoadingReplica], Awaitable[object]],
        look: Callable[[], LoadProgress | None],
        every_s: float,
    ) -> None:
        while True:
            if (progress := look()) is not None:
                self.note(progress)
            await tell(self.report())
            await asyncio.sleep(every_s)
