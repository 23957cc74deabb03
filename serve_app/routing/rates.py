"""Rates of admission: token buckets of keys, and how fast the queue drains.

Clocks are not read here: every method is told what time it is, in seconds of one monotonic clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

#: What a `Retry-After` says at least and at most, in seconds. SDKs of OpenAI pay no heed to more.
MIN_RETRY_S, MAX_RETRY_S = 1, 60
#: Seconds of waiting over which the drain rate is averaged.
WINDOW_S = 30.0


def retry_after(seconds: float | None, default_s: float = 5.0) -> int:
    """Whole seconds for a `Retry-After`; None, where nothing is known, is `default_s`."""
    value = default_s if seconds is None or math.isnan(seconds) else seconds
    return math.ceil(min(max(value, MIN_RETRY_S), MAX_RETRY_S))


class TokenBucket:
    """Holds the amount of a minute, starts full, and refills continuously.

    An amount above the capacity passes when the bucket is full and leaves a debt: it would never
    pass otherwise. The debt is refilled before anything else passes.
    """

    def __init__(self, per_minute: float, now: float) -> None:
        self.capacity = float(per_minute)
        self._level = self.capacity
        self._filled_at = now

    def level(self, now: float) -> float:
        """What is in it; negative while there is debt."""
        if now > self._filled_at:
            refill = (now - self._filled_at) * self.capacity / 60.0
            self._level = min(self._level + refill, self.capacity)
            self._filled_at = now
        return self._level

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until `amount` passes, 0 if it does now."""
        missing = min(amount, self.capacity) - self.level(now)
        # What is missing by rounding alone is there.
        return missing * 60.0 / self.capacity if missing > 1e-9 * self.capacity else 0.0

    def take(self, amount: float, now: float) -> None:
        """Take `amount` out, whether it is there or not; a negative amount is put back."""
        self._level = min(self.level(now) - amount, self.capacity)

    def resize(self, per_minute: float, now: float) -> None:
        """Another rate. What has been taken from the old amount is taken from the new one."""
        taken = self.capacity - self.level(now)
        self.capacity = float(per_minute)
        self._level = self.capacity - taken


def missing_after(per_minute: float, takes: Iterable[tuple[float, float]]) -> float:
    """How much a bucket lacks that was full a minute ago, after `takes`: (age in seconds, amount).
    The order of `takes` does not matter."""
    rate = per_minute / 60.0
    missing, last = 0.0, math.inf
    for age, amount in sorted(takes, reverse=True):
        refill = rate * (last - age) if last < math.inf else math.inf
        missing = max(0.0, missing - refill) + amount
        last = age
    return max(0.0, missing - rate * last) if last < math.inf else 0.0


class DrainMeter:
    """Tokens per second that leave the queue while something waits in it.

    Time in which nothing waits does not count: the rate is what the engines can take, not what
    clients happen to send. So it is still known after a quiet night, and a lull does not lower it.
    Older time fades out over `WINDOW_S` of waiting.
    """

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self._last: float | None = None

    def advance(self, now: float, waiting: bool) -> None:
        """Time has passed; `waiting` says whether something waited since the last call."""
        if self._last is not None and waiting and now > self._last:
            passed = now - self._last
            kept = math.exp(-passed / WINDOW_S)
            self._tokens *= kept
            self._seconds = self._seconds * kept + WINDOW_S * (1.0 - kept)
        self._last = now

    def drained(self, tokens: int) -> None:
        """Something that waited has got its place."""
        self._tokens += tokens

    def rate(self) -> float | None:
        """Tokens per second; None while less than a second of waiting was seen, or nothing that
        waited got a place."""
        return self._tokens / self._seconds if self._seconds >= 1.0 and self._tokens > 0 else None
