"""For how long has an engine had work and finished no step?

An event loop that answers proves nothing about the thread or the process that computes; a token
that comes proves something, but a long queue or prefill yields none for long. What is watched is
the step. An adapter owns one `StallClock` and feeds it from both sides of its inbox; its replica
(replica/watchdog.py) asks how long the engine has stalled, and replaces it beyond a limit.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class StallClock:
    """Thread-safe: the event loop says what it hands over, the engine's thread what it does.

    Work is pending from `submitted` until a later `stepped(has_work=False)`, taken from an inbox or
    not: a thread that no longer reads its inbox stalls too.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._untaken = 0
        self._has_work = False
        self._since = 0.0  # of the last progress, or of the work that ended an idle time

    def submitted(self) -> None:
        """A command was put into the engine's inbox."""
        with self._lock:
            if not (self._untaken or self._has_work):
                self._since = self._clock()
            self._untaken += 1

    def taken(self) -> None:
        """The engine's thread took one command out, and is about to execute it."""
        with self._lock:
            self._untaken -= 1
            self._has_work = True
            self._since = self._clock()

    def stepped(self, *, has_work: bool) -> None:
        """A step ended, or a look at an empty inbox; says whether the engine has work left."""
        with self._lock:
            self._has_work = has_work
            self._since = self._clock()

    def stalled_s(self) -> float:
        """Seconds since the last progress; 0.0 without work."""
        with self._lock:
            if not (self._untaken or self._has_work):
                return 0.0
            return max(0.0, self._clock() - self._since)
