"""What one ingress holds and waits for, so that a new owner of admission can be told all of it.

The client (admission_client.py) writes down here what its requests ask and what the owner answers,
and awaits the futures of it. Pure bookkeeping: it sends nothing. `join` is the whole state in one
message; the owner that gets it knows of this ingress what this file knows.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from serve_app.errors import ApiError
from serve_app.routing.tickets import Ask, Enter, Held, Join, Leave, Move, Spent, Terms

#: Seconds for which spending is remembered: the rates are per minute.
_MINUTE_S = 60.0
#: Spending of one key within this many seconds is one entry.
_BUCKET_S = 1.0


@dataclass(slots=True, eq=False)
class _Bucket:
    """What one key was charged in about a second."""

    moment: float
    requests: int = 0
    tokens: int = 0


@dataclass(slots=True, eq=False)
class Visit:
    """A request that has entered. `decided` gets None once the owner has queued it or given it a
    place, or the error with which it is refused."""

    enter: Enter
    arrived: float
    deadline: float
    bucket: _Bucket
    decided: asyncio.Future[ApiError | None]
    placed: bool = False


@dataclass(slots=True, eq=False)
class Tracked:
    """One sequence. It has a place once `outcome` is a replica's id, or None: any replica; an error
    refuses it. `since` is when it began to wait, and `until` when that must end; `lost` is its
    move, while that is undecided."""

    visit: Visit
    ask: Ask
    since: float
    until: float
    outcome: asyncio.Future[str | ApiError | None]
    lost: Move | None = None

    @property
    def waits(self) -> bool:
        return not self.outcome.done()

    @property
    def refused(self) -> bool:
        return self.outcome.done() and isinstance(self.outcome.result(), ApiError)


@dataclass(slots=True, eq=False)
class _Spending:
    """What the keys of this ingress were charged in the last minute."""

    clock: Callable[[], float]
    _keys: dict[str, tuple[Terms, deque[_Bucket]]] = field(default_factory=dict)

    def charge(self, terms: Terms, tokens: int) -> _Bucket:
        now = self.clock()
        known = self._keys.get(terms.name)
        buckets = known[1] if known is not None else deque()
        self._keys[terms.name] = (terms, buckets)
        while buckets and now - buckets[0].moment > _MINUTE_S:
            buckets.popleft()
        if not buckets or now - buckets[-1].moment > _BUCKET_S:
            buckets.append(_Bucket(now))
        buckets[-1].requests += 1
        buckets[-1].tokens += tokens
        return buckets[-1]

    def spent(self) -> tuple[Spent, ...]:
        now = self.clock()
        for name in [n for n, (_, b) in self._keys.items() if now - b[-1].moment > _MINUTE_S]:
            del self._keys[name]
        return tuple(
            Spent(
                terms=terms,
                age_s=now - bucket.moment,
                requests=bucket.requests,
                tokens=bucket.tokens,
            )
            for terms, buckets in self._keys.values()
            for bucket in buckets
            if now - bucket.moment <= _MINUTE_S and (bucket.requests or bucket.tokens)
        )


class Ledger:
    """The requests of one ingress. Methods that name an unknown sequence do nothing."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._sequences: dict[str, Tracked] = {}
        self._visits: dict[str, Visit] = {}
        self._spending = _Spending(clock)

    def __contains__(self, sequence_id: str) -> bool:
        return sequence_id in self._sequences

    def get(self, sequence_id: str) -> Tracked | None:
        return self._sequences.get(sequence_id)

    @property
    def any_waits(self) -> bool:
        """Whether there is a sequence without a place."""
        return any(tracked.waits for tracked in self._sequences.values())

    def enter(self, enter: Enter) -> Visit:
        """Write down a request that asks for places, and charge its key."""
        now, loop = self._clock(), asyncio.get_running_loop()
        visit = Visit(
            enter=enter,
            arrived=now - enter.waited_s,
            deadline=now + enter.seconds_left,
            bucket=self._spending.charge(enter.terms, sum(ask.charge for ask in enter.asks)),
            decided=loop.create_future(),
        )
        self._visits[enter.request_id] = visit
        for ask in enter.asks:
            self._sequences[ask.sequence_id] = Tracked(
                visit, ask, now, visit.deadline, loop.create_future()
            )
        return visit

    def acknowledge(self, request_id: str) -> None:
        """The owner knows of this request, and has not refused it whole."""
        visit = self._visits.pop(request_id, None)
        if visit is not None and not visit.decided.done():
            visit.decided.set_result(None)

    def grant(self, sequence_id: str, replica_id: str | None) -> None:
        """The sequence has a place: in this replica, or in any (None)."""
        tracked = self._sequences.get(sequence_id)
        if tracked is not None and tracked.waits:
            tracked.outcome.set_result(replica_id)
            tracked.lost = None
            tracked.visit.placed = True

    def refuse(self, sequence_ids: Iterable[str], error: ApiError) -> None:
        """These sequences get no place. What they were charged is given back, except to one that
        has run before. Those of a request that never entered are forgotten; the others stay until
        they leave, for `place` to tell."""
        for sequence_id in sequence_ids:
            tracked = self._sequences.get(sequence_id)
            if tracked is None or not tracked.waits:
                continue
            visit = tracked.visit
            if tracked.lost is None:
                visit.bucket.tokens -= tracked.ask.charge
            tracked.outcome.set_result(error)
            if not visit.placed and not visit.decided.done():
                visit.decided.set_result(error)
                visit.bucket.requests -= 1
                self._visits.pop(visit.enter.request_id, None)
            if visit.decided.done() and not visit.decided.cancelled() and visit.decided.result():
                del self._sequences[sequence_id]

    def move(self, move: Move) -> Tracked | None:
        """The sequence has lost its place and waits for another."""
        tracked = self._sequences.get(move.sequence_id)
        if tracked is not None:
            tracked.lost, tracked.since = move, self._clock()
            tracked.until = tracked.since + move.seconds_left
            tracked.outcome = asyncio.get_running_loop().create_future()
        return tracked

    def landed(self, sequence_id: str, replica_id: str) -> bool:
        """The sequence runs in this replica; says whether it is known."""
        tracked = self._sequences.get(sequence_id)
        if tracked is None:
            return False
        if tracked.waits:  # whoever awaits it must not wait for ever
            self.grant(sequence_id, replica_id)
        else:
            tracked.outcome = asyncio.get_running_loop().create_future()
            tracked.outcome.set_result(replica_id)
        return True

    def leave(self, leave: Leave) -> bool:
        """Forget the sequence and give back what it did not use; says whether the owner knows it
        as well."""
        tracked = self._sequences.pop(leave.sequence_id, None)
        if tracked is None or tracked.refused:
            return False
        tracked.visit.bucket.tokens -= max(0, tracked.ask.charge - leave.used_tokens)
        if not any(a.sequence_id in self._sequences for a in tracked.visit.enter.asks):
            self._visits.pop(tracked.visit.enter.request_id, None)
        return True

    def waiting(self) -> Iterator[tuple[str, Tracked]]:
        """The sequences without a place."""
        return ((name, tracked) for name, tracked in self._sequences.items() if tracked.waits)

    def join(self) -> Join:
        """All of it, for an owner that knows nothing. Times are as of now."""
        now = self._clock()
        held: list[Held] = []
        moving: list[tuple[Held, Move]] = []
        asking: dict[str, tuple[Visit, list[Ask]]] = {}
        for tracked in self._sequences.values():
            visit, left = tracked.visit, tracked.visit.deadline - now
            if tracked.refused:
                continue
            if tracked.lost is not None:
                moving.append(
                    (
                        self._held(tracked, tracked.lost.lost, left),
                        replace(tracked.lost, seconds_left=tracked.until - now),
                    )
                )
            elif tracked.waits:
                asking.setdefault(visit.enter.request_id, (visit, []))[1].append(tracked.ask)
            else:
                replica_id = tracked.outcome.result()
                assert not isinstance(replica_id, ApiError)
                held.append(self._held(tracked, replica_id or "", left))
        waiting = [
            replace(
                visit.enter,
                asks=tuple(asks),
                seconds_left=visit.deadline - now,
                waited_s=now - visit.arrived,
                placed=visit.placed,
            )
            for visit, asks in asking.values()
        ]
        return Join(
            held=tuple(held),
            waiting=tuple(waiting),
            moving=tuple(moving),
            spent=self._spending.spent(),
        )

    @staticmethod
    def _held(tracked: Tracked, replica_id: str, seconds_left: float) -> Held:
        return Held(
            request_id=tracked.visit.enter.request_id,
            terms=tracked.visit.enter.terms,
            ask=tracked.ask,
            replica_id=replica_id,
            seconds_left=seconds_left,
        )
