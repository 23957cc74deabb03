"""Requests that wait for places in one pool: who is next.

Bands go strictly by priority. Within a band API keys share tokens by deficit round robin
(M. Shreedhar and G. Varghese, Efficient Fair Queuing using Deficit Round Robin, SIGCOMM 1995), in
the form in which a key may overdraw once and pays with its next rounds (surplus round robin,
H. Adiseshu, G. Parulkar, G. Varghese, SIGCOMM 1996): a quantum need not be as large as the largest
request, so that keys alternate request by request. Rounds in which a key would only pay are not
walked through but counted, and keys lie in a heap by their next round: a decision takes O(log keys)
whatever the sizes.

Between two keys that always have something waiting, the tokens granted per weight never differ by
more than a quantum and one request of each. A key that has nothing waiting keeps no credit; what it
overdrew, one request at most, it still pays.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush

from serve_app.routing.admission_stats import QueuedOfKey
from serve_app.routing.visits import Sequence, Visit

#: Tokens of a key of weight 1 per round: about one chat request. Smaller ones make no finer shares,
#: since a request is never cut; larger ones make longer bursts.
QUANTUM = 1024
#: Rounds that a key can be behind, or have credit for, after its head was blocked or much of what
#: it reserved came back. What a single sequence gives back is always kept whole.
MAX_LAG = 64
#: Requests of a key behind its blocked head that are looked at in one round of placing.
LOOK_PAST = 8

#: (rank, visit); ranks of a flow are unique.
_Entry = tuple[tuple[int, float, float, int], Visit]


class Flow:
    """What one key has waiting in one band."""

    def __init__(self, name: str, priority: int) -> None:
        self.name = name
        self.priority = priority
        self.weight = 1.0
        self.entries: list[_Entry] = []  # by rank
        self.arrivals: dict[str, Visit] = {}  # by order of arrival
        self.tokens = 0  # KV tokens of the sequences that wait
        self.deficit = 0.0  # tokens that it may still be granted in `round`
        self.round = 0
        self.turn = -1  # its place among the flows of a round; -1 while nothing waits

    @property
    def quantum(self) -> float:
        return QUANTUM * self.weight

    @property
    def burden(self) -> float:
        """Waiting tokens for its weight: who has most gives way when the queue is full."""
        return self.tokens / self.weight


class Band:
    """The flows of one priority, in rounds."""

    def __init__(self) -> None:
        self.flows: dict[str, Flow] = {}
        self.heap: list[tuple[int, int, Flow]] = []  # (round, turn, flow); stale if turn differs
        self.round = 0
        self._turns = 0

    def activate(self, flow: Flow) -> None:
        """Something waits in a flow in which nothing waited."""
        flow.round = max(flow.round, self.round)
        flow.deficit = min(flow.deficit, flow.quantum)
        self._settle(flow)

    def charge(self, flow: Flow, tokens: float) -> None:
        """The flow was granted `tokens`. Negative ones are given back."""
        if tokens > 0:
            self.round = max(self.round, flow.round)
            if flow.round < self.round - MAX_LAG:
                flow.round = self.round - MAX_LAG
        flow.deficit -= tokens
        if tokens < 0:
            limit = max(MAX_LAG * flow.quantum, -tokens)
            back = min(math.ceil(flow.deficit / flow.quantum) - 1, flow.round - self.round)
            if back > 0:
                flow.round -= back
                flow.deficit -= back * flow.quantum
            flow.deficit = min(flow.deficit, limit if flow.turn >= 0 else flow.quantum)
            if back > 0 and flow.turn >= 0:
                self._enter(flow)
        if flow.deficit <= 0:
            self._settle(flow)

    def _settle(self, flow: Flow) -> None:
        """Move the flow on to the round in which it is next granted anything."""
        if flow.deficit <= 0:
            rounds = math.floor(-flow.deficit / flow.quantum) + 1
            flow.round += rounds
            flow.deficit += rounds * flow.quantum
        if flow.entries:
            self._enter(flow)

    def _enter(self, flow: Flow) -> None:
        self._turns += 1
        flow.turn = self._turns
        heappush(self.heap, (flow.round, flow.turn, flow))
        if len(self.heap) > 2 * len(self.flows) + 16:
            self.heap = [item for item in self.heap if item[1] == item[2].turn]
            heapify(self.heap)

    def first(self) -> Flow | None:
        """The flow whose turn it is."""
        while self.heap and self.heap[0][1] != self.heap[0][2].turn:
            heappop(self.heap)
        return self.heap[0][2] if self.heap else None


class FairQueue:
    """All that wait for their first place in one pool. `sequences` and `tokens` are what waits in
    all; `spilling` says how many of the sequences may run in each other pool, too."""

    def __init__(self) -> None:
        self.bands: dict[int, Band] = {}
        self.sequences = 0
        self.tokens = 0
        self.spilling: Counter[str] = Counter()

    def _flow(self, visit: Visit) -> tuple[Band, Flow]:
        priority, name = visit.terms.priority, visit.terms.name
        if (band := self.bands.get(priority)) is None:
            band = self.bands[priority] = Band()
        if (flow := band.flows.get(name)) is None:
            flow = band.flows[name] = Flow(name, priority)
        return band, flow

    def add(self, visit: Visit) -> None:
        """Queue the visit, whose `waiting` is filled."""
        band, flow = self._flow(visit)
        flow.weight = visit.terms.weight
        # Deadlines that clients set go first, the earliest of them before all; then by arrival.
        deadline = (0, visit.deadline) if visit.own_deadline else (1, 0.0)
        visit.rank = (*deadline, visit.entered, visit.order)
        was_empty = not flow.entries
        insort(flow.entries, (visit.rank, visit))
        flow.arrivals[visit.request_id] = visit
        flow.tokens += visit.waiting_tokens
        self.tokens += visit.waiting_tokens
        self.sequences += len(visit.waiting)
        for pool in visit.pools[1:]:
            self.spilling[pool] += len(visit.waiting)
        if was_empty:
            band.activate(flow)

    def remove(self, sequence: Sequence) -> None:
        """The sequence waits no more. Whether it was granted anything is `charge`'s to say."""
        visit = sequence.visit
        if visit.waiting.pop(sequence.sequence_id, None) is None:
            return
        _, flow = self._flow(visit)
        flow.tokens -= sequence.tokens
        self.tokens -= sequence.tokens
        self.sequences -= 1
        for pool in visit.pools[1:]:
            self.spilling[pool] -= 1
            if not self.spilling[pool]:
                del self.spilling[pool]
        if not visit.waiting:
            del flow.entries[bisect_left(flow.entries, (visit.rank,))]
            del flow.arrivals[visit.request_id]
            if not flow.entries:
                flow.turn = -1
                flow.deficit = min(flow.deficit, flow.quantum)

    def charge(self, visit: Visit, tokens: float) -> None:
        """The visit's key was granted `tokens`; negative ones have come back unused."""
        band, flow = self._flow(visit)
        band.charge(flow, tokens)

    def place(
        self,
        priority: int,
        try_place: Callable[[Sequence, bool], bool],
        has_room: Callable[[], bool],
    ) -> None:
        """One round of placing in one band: offer sequences in order to `try_place`, while there is
        room for them. `try_place` removes and charges what it places. It is told which sequences
        are the heads of their keys, and has a replica set aside for those that it cannot place.

        A key whose head is blocked keeps its turn. A few requests behind the head are tried
        meanwhile, and the other keys.
        """
        if (band := self.bands.get(priority)) is None:
            return
        blocked: list[Flow] = []
        while has_room() and (flow := band.first()) is not None:
            if not self._place_one(flow, try_place):
                heappop(band.heap)
                blocked.append(flow)
        for flow in blocked:
            heappush(band.heap, (flow.round, flow.turn, flow))

    @staticmethod
    def _place_one(flow: Flow, try_place: Callable[[Sequence, bool], bool]) -> bool:
        """Place the first sequence of the flow that can be; returns whether there was one."""
        is_head = True
        for _, visit in flow.entries[: LOOK_PAST + 1]:
            if try_place(next(iter(visit.waiting.values())), is_head):
                return True
            is_head = False
        return False

    def gives_way(self, newcomer: Visit) -> Iterator[Visit]:
        """The visits that give way to the newcomer, which is in the queue, one after the other.

        Lower bands first, the lowest before all. Then the key of its own band with most waiting
        for its weight, if that is more than the newcomer's key has with it, or if the newcomer's
        key has nothing else waiting and the other more than one request. Of a key the newest
        request goes that has no place yet for any sequence.
        """
        out: set[str] = set()
        left: dict[Flow, tuple[int, int]] = {}  # what remains: tokens, requests
        _, own = self._flow(newcomer)
        alone = len(own.arrivals) == 1
        for priority in sorted(self.bands, reverse=True):
            if priority < newcomer.terms.priority:
                return
            flows = [flow for flow in self.bands[priority].flows.values() if flow.entries]
            for flow in flows:
                left[flow] = (flow.tokens, len(flow.arrivals))
            same = priority == newcomer.terms.priority
            while True:
                if same:
                    flows = [
                        flow
                        for flow in flows
                        if flow is not own
                        and (
                            left[flow][0] / flow.weight > own.burden
                            or (alone and left[flow][1] > 1)
                        )
                    ]
                if not flows:
                    break
                flow = max(flows, key=lambda f: left[f][0] / f.weight)
                tokens, requests = left[flow]
                victim = next(
                    (
                        visit
                        for visit in reversed(flow.arrivals.values())
                        if not visit.placed and visit.request_id not in out
                    ),
                    None,
                )
                if victim is None:
                    flows.remove(flow)
                    continue
                out.add(victim.request_id)
                left[flow] = (tokens - victim.waiting_tokens, requests - 1)
                yield victim

    def ahead_of(self, priority: int) -> int:
        """Waiting tokens of this band and of those before it."""
        return sum(
            flow.tokens
            for band, item in self.bands.items()
            if band <= priority
            for flow in item.flows.values()
        )

    def stats(self, pool: str) -> Iterator[QueuedOfKey]:
        """What waits, by band and key; `pool` is the one whose queue this is."""
        for priority in sorted(self.bands):
            for name, flow in sorted(self.bands[priority].flows.items()):
                if flow.entries:
                    yield QueuedOfKey(
                        key=name,
                        priority=priority,
                        pool=pool,
                        requests=len(flow.entries),
                        sequences=sum(len(visit.waiting) for _, visit in flow.entries),
                        kv_tokens=flow.tokens,
                    )

    def prune(self) -> None:
        """Forget flows in which nothing waits and that have nothing to pay, and empty bands."""
        for priority, band in list(self.bands.items()):
            for name, flow in list(band.flows.items()):
                if not flow.entries and flow.round <= band.round:
                    del band.flows[name]
            if not any(flow.entries for flow in band.flows.values()):
                band.flows.clear()  # nobody to share with, so nothing to pay
            if not band.flows:
                del self.bands[priority]
