"""What is to be looked at when its time has come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

T = TypeVar("T")


class Agenda(Generic[T]):
    """A heap of items by time. Items that `is_alive` denies are dropped, at the latest when they
    are more than half of all."""

    def __init__(self, is_alive: Callable[[T], bool]) -> None:
        self._is_alive = is_alive
        self._heap: list[tuple[float, int, T]] = []
        self._count = 0
        self._limit = 64  # items at which dead ones are looked for

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, moment: float, item: T) -> None:
        self._count += 1
        heappush(self._heap, (moment, self._count, item))
        if len(self._heap) > self._limit:
            self._heap = [entry for entry in self._heap if self._is_alive(entry[2])]
            heapify(self._heap)
            self._limit = max(64, 2 * len(self._heap))

    def due(self, now: float) -> Iterator[T]:
        """Take out the items whose time has come, the earliest first."""
        while self._heap and self._heap[0][0] <= now:
            item = heappop(self._heap)[2]
            if self._is_alive(item):
                yield item
