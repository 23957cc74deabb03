"""Tells whoever waits in a terminal how far the engines are: a line for each phase, and now and
then.

Serve says nothing while constructors run, and for 356 GB they run for minutes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType

from serve_app.engines.protocol import LoadingReplica
from serve_app.routing.loading_board import describe

log = logging.getLogger(__name__)

#: Seconds between two looks, and between two lines about a phase that goes on.
LOOK_S = 1.0
AGAIN_S = 10.0
#: Seconds of loading that need no words.
SHORT_S = 5.0


class LoadWatch:
    """A context. Within, `ask` is called every `LOOK_S` seconds in a thread, and `report` gets
    lines. An `ask` that fails says nothing: there is nobody yet to be asked."""

    def __init__(
        self,
        ask: Callable[[], Sequence[LoadingReplica]],
        report: Callable[[str], None],
        *,
        look_s: float = LOOK_S,
        again_s: float = AGAIN_S,
        first_s: float = SHORT_S,
    ) -> None:
        """The first look is after `first_s` seconds: before there is nothing to tell, and who asks
        takes time from the start."""
        self._ask, self._report = ask, report
        self._look_s, self._again_s, self._first_s = look_s, again_s, first_s
        self._told: dict[str, tuple[str, float]] = {}  # replica -> phase, when
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load-watch", daemon=True)

    def __enter__(self) -> LoadWatch:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()

    def _run(self) -> None:
        pause_s = self._first_s
        while not self._over.wait(pause_s):
            pause_s = self._look_s
            try:
                replicas = self._ask()
            except Exception as error:  # whatever Ray and Serve raise while they start or stop
                log.debug("nothing is known of the engines: %s", error)
                continue
            if not self._over.is_set():
                self.tell(replicas, time.monotonic())

    def tell(self, replicas: Sequence[LoadingReplica], now: float) -> None:
        """Report what is new of these, or has not been told for a while; of a start that takes a
        moment nothing."""
        for replica in replicas:
            if replica.elapsed_s < SHORT_S:
                continue
            phase, when = self._told.get(replica.replica_id, ("", 0.0))
            if replica.progress.phase == phase and now - when < self._again_s:
                continue
            self._told[replica.replica_id] = replica.progress.phase, now
            self._report(f"loading: pool {replica.pool}, {replica.replica_id}: {describe(replica)}")
