"""What the requests of the last seconds met, by pool: latencies, and that nobody was there.

The autoscaler reads it (`PoolStats`). Clocks are not read here.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque

#: Seconds for which it is remembered.
WINDOW_S = 45.0
#: Samples of one kind and pool at most: the newest ones.
MAX_SAMPLES = 4096


class Recent:
    """Samples by kind (`ttft`, `itl`, `turned_away`) and pool, each with its moment."""

    def __init__(self) -> None:
        self._samples: defaultdict[tuple[str, str], deque[tuple[float, float]]] = defaultdict(
            lambda: deque(maxlen=MAX_SAMPLES)
        )

    def note(self, kind: str, pool: str, value: float | None, now: float) -> None:
        """Remember a sample; None is none."""
        if value is not None and math.isfinite(value):
            self._samples[kind, pool].append((now, value))

    def count(self, kind: str, pool: str, now: float) -> int:
        """How many there are."""
        return len(self._fresh(kind, pool, now))

    def p90(self, kind: str, pool: str, now: float) -> float | None:
        """The smallest value that nine of ten samples do not exceed; None where there are none."""
        values = sorted(value for _, value in self._fresh(kind, pool, now))
        return values[math.ceil(0.9 * len(values)) - 1] if values else None

    def _fresh(self, kind: str, pool: str, now: float) -> deque[tuple[float, float]]:
        samples = self._samples[kind, pool]
        while samples and now - samples[0][0] > WINDOW_S:
            samples.popleft()
        return samples
