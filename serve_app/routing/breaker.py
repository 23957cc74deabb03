"""A replica that fails again and again is left alone for a while, then tried with one sequence.

closed -> (3 failures in a row) -> open for 10 s -> half-open -> a probe succeeds -> closed
                                     ^                |
                                     +-- it fails: twice as long as before, 120 s at most

Clocks are not read here: every method is told what time it is.
"""

from __future__ import annotations

from typing import Literal

#: Failures in a row that open it.
FAILURES = 3
#: Seconds that it stays open at first, and at most.
OPEN_S, MAX_OPEN_S = 10.0, 120.0
#: A probe that has run so long without failing has succeeded: a long generation takes minutes, and
#: its replica would be idle meanwhile. A replica that hangs is found out sooner.
PROVEN_S = 30.0

State = Literal["closed", "open", "half_open"]


class Breaker:
    """Of one replica. Sequences that were there before it opened say nothing about it any more."""

    def __init__(self) -> None:
        self._failures = 0
        self._open_s = OPEN_S
        #: When it becomes half-open; None while it is closed.
        self.open_until: float | None = None
        self._probe: tuple[str, float] | None = None  # the sequence, and since when it runs

    def state(self, now: float) -> State:
        if self.open_until is None:
            return "closed"
        return "half_open" if now >= self.open_until else "open"

    def takes(self, now: float) -> bool:
        """Whether a sequence may be sent: always while closed, one at a time while half-open."""
        if self.open_until is None:
            return True
        return now >= self.open_until and self._probe is None

    def half_open(self, now: float) -> None:
        """Let a probe through before its time, because there is no other replica."""
        if self.open_until is not None:
            self.open_until = min(self.open_until, now)

    def sent(self, sequence_id: str, now: float) -> None:
        """A sequence was sent to the replica."""
        if self.open_until is not None and self._probe is None and now >= self.open_until:
            self._probe = (sequence_id, now)

    def failed(self, sequence_id: str, now: float) -> None:
        """The replica is to blame for the end of a sequence."""
        if self.open_until is None:
            self._failures += 1
            if self._failures >= FAILURES:
                self.open_until = now + self._open_s
        elif self._is_probe(sequence_id):
            self._open_s = min(2 * self._open_s, MAX_OPEN_S)
            self.open_until = now + self._open_s
            self._probe = None

    def succeeded(self, sequence_id: str) -> None:
        """The replica has worked on a sequence as it should."""
        if self.open_until is None:
            self._failures = 0
        elif self._is_probe(sequence_id):
            self._close()

    def ended(self, sequence_id: str) -> None:
        """A sequence has ended in a way that says nothing about the replica."""
        if self._is_probe(sequence_id):
            self._probe = None

    def tick(self, now: float) -> bool:
        """Close when the probe has proven itself by running; returns whether it did."""
        if self._probe is None or now - self._probe[1] < PROVEN_S:
            return False
        self._close()
        return True

    def _is_probe(self, sequence_id: str) -> bool:
        return self._probe is not None and self._probe[0] == sequence_id

    def _close(self) -> None:
        self._failures, self._open_s, self.open_until, self._probe = 0, OPEN_S, None, None
