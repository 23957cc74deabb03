"""Notices that Serve is stopping this replica, and says when its streams must end.

Serve tells a replica that it stops only after its last request has ended; until then it merely
routes nothing more to it. The ingresses see that (routing/candidates.py) and say so in their
answers to the heartbeats. The streams then have `drain_s` seconds to end by themselves; those that
are left are ended by the replica, so that their ingresses go on with them elsewhere, before Serve
ends the process. replica.py asks; it knows no Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable


class Departure:
    """Belongs to one replica; `note` is called after every heartbeat."""

    def __init__(self, drain_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._drain_s = drain_s
        self._clock = clock
        self._was_routed = False
        self._since_s: float | None = None

    def note(self, answers: Iterable[object]) -> None:
        """Take in the ingresses' answers to one heartbeat: whether Serve routes to this replica as
        they know it. Anything but a bool says nothing."""
        known = [answer for answer in answers if isinstance(answer, bool)]
        if any(known):
            self._was_routed, self._since_s = True, None
        elif known and self._was_routed and self._since_s is None:
            self._since_s = self._clock()

    @property
    def draining(self) -> bool:
        """Whether newcomers are sent elsewhere. Not before the first ones may come."""
        return self._since_s is not None

    @property
    def overdue(self) -> bool:
        """Whether the streams that are left must end now."""
        return self._since_s is not None and self._clock() - self._since_s >= self._drain_s
