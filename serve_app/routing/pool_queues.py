"""A fair queue for each pool, and the order in which they get places.

A request waits in the queue of its home, so that what waits for one pool holds up nobody who asks
for another, also of the same key. Keys share each pool's tokens. Where a request may spill over, it
gets what the other pool's own requests of its band have left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from serve_app.routing.admission_stats import QueuedOfKey
from serve_app.routing.fair_queue import FairQueue
from serve_app.routing.visits import Sequence, Visit

#: Gets a sequence, whether it is the head of its key, and the pools to try; whether it has a place.
TryPlace = Callable[[Sequence, bool, tuple[str, ...]], bool]
#: Whether any of these pools has room for anything of a band.
HasRoom = Callable[[float, Iterable[str]], bool]


class PoolQueues:
    """All that wait for their first place, by the pool that is their home."""

    def __init__(self) -> None:
        self.by_pool: dict[str, FairQueue] = {}

    def of(self, pool: str) -> FairQueue:
        """The queue of a pool."""
        if (queue := self.by_pool.get(pool)) is None:
            queue = self.by_pool[pool] = FairQueue()
        return queue

    @property
    def sequences(self) -> int:
        """Sequences that wait in all."""
        return sum(queue.sequences for queue in self.by_pool.values())

    def add(self, visit: Visit) -> None:
        """Queue the visit, whose `waiting` is filled."""
        self.of(visit.home).add(visit)

    def remove(self, sequence: Sequence) -> None:
        """The sequence waits no more."""
        self.of(sequence.visit.home).remove(sequence)

    def charge(self, visit: Visit, tokens: float) -> None:
        """The visit's key was granted `tokens` of its home's share, in whichever pool."""
        self.of(visit.home).charge(visit, tokens)

    def place(
        self,
        try_place: TryPlace,
        has_room: HasRoom,
        pinned: Callable[[float], Iterable[Sequence]],
    ) -> None:
        """One round of placing, band by band: those that a replica is set aside for (`pinned`),
        then each pool's own requests at home, then those that may spill over."""
        for priority in sorted({band for queue in self.by_pool.values() for band in queue.bands}):
            for sequence in pinned(priority):
                try_place(sequence, True, sequence.ask.pools)
            for home, queue in self.by_pool.items():
                if queue.sequences:
                    _place_at_home(home, queue, priority, try_place, has_room)
            for queue in self.by_pool.values():
                if queue.spilling:
                    _spill(queue, priority, try_place, has_room)

    def stats(self) -> Iterator[QueuedOfKey]:
        """What waits, by pool, band and key."""
        for pool in sorted(self.by_pool):
            yield from self.by_pool[pool].stats(pool)

    def prune(self) -> None:
        """Forget what waits for nothing and owes nothing."""
        for pool, queue in list(self.by_pool.items()):
            queue.prune()
            if not queue.bands and not queue.sequences:
                del self.by_pool[pool]


def _place_at_home(
    home: str, queue: FairQueue, priority: int, try_place: TryPlace, has_room: HasRoom
) -> None:
    """Nothing is set aside for who may yet spill over."""

    def at_home(sequence: Sequence, is_head: bool) -> bool:
        pools = sequence.ask.pools
        if len(pools) == 1:
            return try_place(sequence, is_head, pools)
        return try_place(sequence, is_head and not has_room(priority, pools[1:]), pools[:1])

    queue.place(priority, at_home, lambda: has_room(priority, (home,)))


def _spill(queue: FairQueue, priority: int, try_place: TryPlace, has_room: HasRoom) -> None:
    def anywhere(sequence: Sequence, is_head: bool) -> bool:
        return try_place(sequence, is_head, sequence.ask.pools)

    queue.place(priority, anywhere, lambda: has_room(priority, queue.spilling))
