"""The places of all engine replicas: who holds one, where there is room, what is set aside.

A replica has room for so many sequences and so many KV tokens. What sequences hold is counted here
from grants, not from heartbeats, which are late. Heartbeats say which replicas there are, how large
they are, and which sequences run there that nobody here holds: *ghosts*, of an ingress that has
died or of another owner. Those occupy places for as long as they are reported.

A sequence looks for room in its pools in order, and in a pool first in the replica that had its
session last, unless that is much fuller than the emptiest one.

A sequence that fits nowhere now *pins* the replica that will have room for it soonest: sequences of
its band and below get nothing there until it has its place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

from serve_app.engines.protocol import ReplicaStatus
from serve_app.routing.admission_stats import ReplicaUse
from serve_app.routing.replica_room import FORGET_S, Replica
from serve_app.routing.sessions import Sessions
from serve_app.routing.visits import Sequence, State

#: Seconds that a replica may go on reporting a sequence that has left, before it is a ghost.
LEAVING_S = 3.0


class Places:
    """All replicas of all pools. `max_ongoing_requests` are the places of one replica, by pool;
    `slack` is how much fuller than the emptiest the replica of a session may be. Which replicas
    may be used is set for one round of placing by `begin`."""

    def __init__(self, max_ongoing_requests: Mapping[str, int], slack: float = 0.0) -> None:
        self._max_ongoing = dict(max_ongoing_requests)
        self._configured = set(max_ongoing_requests)
        self._slack = slack
        self.sessions = Sessions()
        self.replicas: dict[str, Replica] = {}
        self._now = 0.0  # of this round
        self._usable: dict[str, list[Replica]] = {}
        self._rooms: dict[tuple[float, str], int] = {}  # `room`, until something changes

    # What is there.

    @property
    def pools(self) -> set[str]:
        """The pools that are configured or of which replicas have reported."""
        return self._configured | {r.pool for r in self.replicas.values() if r.pool}

    def configure(self, max_ongoing_requests: Mapping[str, int], slack: float) -> None:
        """Other numbers of places per replica. Who has one keeps it. A pool that is configured no
        more keeps its number for the replicas that still drain."""
        self._max_ongoing |= max_ongoing_requests
        self._configured = set(max_ongoing_requests)
        self._slack = slack
        for replica in self.replicas.values():
            self._size(replica)

    def _size(self, replica: Replica) -> None:
        if replica.reported > -math.inf:
            # A pool that this owner has not been told of yet is one that begins.
            most = self._max_ongoing.get(replica.pool, min(self._max_ongoing.values(), default=1))
            replica.places = int(min(most, replica.max_running))
        replica.count()

    def _get(self, replica_id: str, now: float) -> Replica:
        if (replica := self.replicas.get(replica_id)) is None:
            replica = self.replicas[replica_id] = Replica(replica_id, now)
        return replica

    def report(self, status: ReplicaStatus, age_s: float, now: float) -> None:
        """Take in a heartbeat, unless a newer one is known or the replica has said goodbye."""
        replica, at = self._get(status.replica_id, now), now - max(0.0, age_s)
        replica.forget_at = now + FORGET_S
        if replica.gone or at < replica.reported:
            return
        replica.reported = at
        replica.pool, info = status.pool, status.info
        replica.max_running = math.inf if info.max_running is None else info.max_running
        replica.max_model_len, replica.kv_total = info.max_model_len, info.kv_tokens_total
        left = replica.left
        for sequence_id in [i for i, moment in left.items() if moment + LEAVING_S < at]:
            del left[sequence_id]
        named = 0
        ghosts: dict[str, None] = {}
        for sequence_id in status.request_ids:
            if (kv := replica.held.get(sequence_id)) is not None:
                named += kv
            elif sequence_id not in left:
                ghosts[sequence_id] = None
        replica.ghosts = ghosts
        replica.kv_ghosts = max(0, status.load.kv_tokens_used - named) if ghosts else 0
        self._size(replica)

    def route(
        self, ingress_id: str, heard: Iterable[str], unrouted: Iterable[str], now: float
    ) -> None:
        """Of the replicas that this ingress hears, Serve does not route its requests to some."""
        for replica_id in heard:
            self._get(replica_id, now).unrouted.pop(ingress_id, None)
        for replica_id in unrouted:
            replica = self._get(replica_id, now)
            replica.unrouted[ingress_id] = now
            self._unpin(replica)

    def goodbye(self, replica_id: str, now: float) -> None:
        """The replica takes nothing more. Who is held there stays until its ingress moves it."""
        replica = self._get(replica_id, now)
        replica.gone, replica.forget_at = True, now + FORGET_S
        self._unpin(replica)

    def tick(self, now: float) -> None:
        """Forget replicas that are gone, close breakers whose probe has proven itself."""
        for replica in list(self.replicas.values()):
            replica.breaker.tick(now)
            if not replica.held and now >= replica.forget_at:
                self._unpin(replica)
                del self.replicas[replica.replica_id]
        self.sessions.prune(now)

    def can_ever_hold(self, sequence: Sequence) -> bool:
        """Whether some known replica of its pools would hold it if nothing else were there; true
        while one of them has none that is known. A silent one counts: it may come back."""
        known = [r for r in self.replicas.values() if not r.gone and r.reported > -math.inf]
        empty = set(sequence.ask.pools) - {replica.pool for replica in known}
        return bool(empty) or any(
            replica.pool in sequence.ask.pools and replica.can_ever_hold(sequence)
            for replica in known
        )

    def ready(self, pools: Iterable[str], now: float) -> int:
        """The replicas of these pools that may get sequences."""
        names = set(pools)
        return sum(r.pool in names and r.is_fresh(now) for r in self.replicas.values())

    # Who holds what.

    def hold(self, sequence: Sequence, replica_id: str, now: float) -> None:
        """The sequence is in this replica, whether there was room or not."""
        replica, sequence_id = self._get(replica_id, now), sequence.sequence_id
        kv = replica.need(sequence) if replica.kv_total else sequence.tokens
        replica.held[sequence_id] = kv
        replica.kv_held += kv
        replica.left.pop(sequence_id, None)
        if replica.ghosts.pop(sequence_id, self) is None:  # it was a ghost; no longer
            replica.kv_ghosts = max(0, replica.kv_ghosts - kv) if replica.ghosts else 0
        replica.breaker.sent(sequence_id, now)
        usable = self._usable.get(replica.pool, [])
        if not replica.breaker.takes(now) and replica in usable:
            usable.remove(replica)  # it is being tried out with this one
        pool = replica.pool or sequence.ask.pools[0]
        self.sessions.note(sequence.ask.affinity, pool, replica_id, now)
        replica.count()
        self._rooms.clear()
        self.unpin(sequence)
        sequence.replica_id, sequence.state = replica_id, State.HELD

    def release(self, sequence: Sequence, now: float, *, runs_on: bool = False) -> Replica | None:
        """Take the sequence's place back; returns the replica it was in. `runs_on` says that it
        has not ended as far as anybody knows: it becomes a ghost."""
        replica_id, sequence.replica_id = sequence.replica_id, None
        replica = self.replicas.get(replica_id) if replica_id is not None else None
        if replica is None or (kv := replica.held.pop(sequence.sequence_id, None)) is None:
            return None
        replica.kv_held -= kv
        if runs_on:
            replica.ghosts[sequence.sequence_id] = None
            replica.kv_ghosts += kv
        else:
            replica.left[sequence.sequence_id] = now
        replica.forget_at = max(replica.forget_at, now)
        replica.count()
        return replica

    def pool_of(self, sequence: Sequence) -> str:
        """The pool of the replica that it is held in, empty where that is not known."""
        replica = self.replicas.get(sequence.replica_id or "")
        return replica.pool if replica is not None else ""

    # Placing.

    def begin(self, now: float) -> None:
        """Look which replicas may get sequences now. Called before `choose` and `pin`."""
        self._now = now
        usable: dict[str, list[Replica]] = {}
        broken: dict[str, list[Replica]] = {}
        for replica in self.replicas.values():
            if replica.is_fresh(now):
                takes = replica.breaker.open_until is None or replica.breaker.takes(now)
                (usable if takes else broken).setdefault(replica.pool, []).append(replica)
            elif replica.pin is not None:
                self._unpin(replica)
        for pool, failing in broken.items():
            for replica in failing:
                self._unpin(replica)
            if pool not in usable and all(r.breaker.state(now) == "open" for r in failing):
                probed = min(failing, key=lambda r: r.breaker.open_until or now)
                probed.breaker.half_open(now)
                usable[pool] = [probed]
        self._usable = usable
        self._rooms.clear()

    def _all_usable(self) -> Iterator[Replica]:
        return chain.from_iterable(self._usable.values())

    def has_places(self) -> bool:
        """Whether any replica has a place for anything at all."""
        return any(replica.free_places > 0 for replica in self._all_usable())

    def has_room(self, band: float, pools: Iterable[str] | None = None) -> bool:
        """Whether anything of this band could be placed in these pools, None: in any."""
        for pool in self._usable if pools is None else pools:  # often asked: `any` is slower
            if self.room(band, pool) >= 0:
                return True
        return False

    def room(self, band: float, pool: str) -> int:
        """The most KV tokens that are free in one replica of the pool which takes something of this
        band; -1 where there is none."""
        if (room := self._rooms.get((band, pool))) is None:
            room = -1
            for replica in self._usable.get(pool, ()):
                if replica.free_places > 0 and replica.pin_band > band and replica.free_kv > room:
                    room = max(0, replica.free_kv)
            self._rooms[band, pool] = room
        return room

    def choose(self, sequence: Sequence, pools: Iterable[str] | None = None) -> Replica | None:
        """The replica for the sequence, of the first of these pools (None: all of its own, in
        order) that has room: the one of its session, else the least used."""
        for pool in sequence.ask.pools if pools is None else pools:
            if (best := self._least_used(sequence, pool)) is not None:
                return self._of_session(sequence, best) or best
        return None

    @staticmethod
    def _takes(replica: Replica, sequence: Sequence, tokens: int, band: float) -> bool:
        """Whether there is room for the sequence, which needs so many KV tokens and is placed with
        this band, now, and nothing else is to get it."""
        if replica.free_places <= 0 or replica.free_kv < min(tokens, replica.kv_total):
            return False
        if replica.pin_band <= band and replica.pin is not sequence:
            return False
        return replica.can_ever_hold(sequence)

    def _least_used(self, sequence: Sequence, pool: str) -> Replica | None:
        """The replica with room for the sequence whose used share is least; ties go to the fewest
        held, then to the lowest id. A replica that is being tried out is a moving sequence's last
        choice: it has lost one already."""
        ask, band, best, best_rank = sequence.ask, sequence.band, None, None
        tokens = ask.kv_tokens
        if sequence.pinned is None and min(tokens, ask.charge) > self.room(band, pool):
            return None  # most are told so: rounds of placing end with those that do not fit
        for replica in self._usable.get(pool, ()):
            if not self._takes(replica, sequence, tokens, band):
                continue
            doubtful = _is_doubtful(replica, sequence)
            rank = (doubtful, replica.used_share(), len(replica.held), replica.replica_id)
            if best_rank is None or rank < best_rank:
                best, best_rank = replica, rank
        return best

    def _of_session(self, sequence: Sequence, best: Replica) -> Replica | None:
        """The replica of the pool of `best` that had the sequence's session last, if it may have
        this one, too."""
        if not sequence.ask.affinity:
            return None
        found = self.sessions.find(sequence.ask.affinity, best.pool, self._now)
        for replica in self._usable.get(best.pool, ()) if found is not None else ():
            if replica.replica_id == found:
                fuller = replica.used_share() - best.used_share()
                if fuller > self._slack or _is_doubtful(replica, sequence):
                    return None
                tokens, band = sequence.ask.kv_tokens, sequence.band
                return replica if self._takes(replica, sequence, tokens, band) else None
        return None

    def pin(self, sequence: Sequence) -> bool:
        """Set the replica aside that will fit the sequence soonest, of those that are not set aside
        for its band or a higher one; returns whether there was one. It is one of its home, or of
        the first other pool that can hold it where the home has none."""
        band = sequence.band
        for pool in sequence.ask.pools:
            able = [r for r in self._usable.get(pool, ()) if r.can_ever_hold(sequence)]
            if able:
                break
        else:
            return False
        free = [replica for replica in able if replica.pin_band > band]
        if not free:
            return False
        replica = min(free, key=lambda r: (r.departures(sequence), r.replica_id))
        self._unpin(replica)
        replica.pin, replica.pin_band = sequence, band
        self._rooms.clear()
        sequence.pinned = replica.replica_id
        return True

    def pinned(self, band: float) -> list[Sequence]:
        """The sequences of this band that a replica is set aside for, and that now fit there or
        perhaps elsewhere."""
        found = []
        for replica in self._all_usable():
            pin = replica.pin
            if pin is None or replica.pin_band != band:
                continue
            room = self.room(band, pin.ask.pools[0])
            for pool in pin.ask.pools[1:]:
                room = max(room, self.room(band, pool))
            if min(pin.ask.kv_tokens, pin.ask.charge) <= room or replica.fits(pin):
                found.append(pin)
        return found

    def has_pin(self, sequence: Sequence) -> bool:
        """Whether a replica is set aside for the sequence, or for another one of its key that
        waits in its band for its pool: one is enough, lest a key of long prompts hold it up."""
        if sequence.pinned is not None:
            return True
        if sequence.state is State.MOVING:
            return False
        terms = sequence.visit.terms
        return any(
            replica.pin is not None
            and replica.pin_band == terms.priority
            and replica.pin.visit.terms.name == terms.name
            and replica.pin.visit.home == sequence.visit.home
            for replica in self._all_usable()
        )

    def unpin(self, sequence: Sequence) -> None:
        """Nothing is set aside for this sequence any more."""
        if sequence.pinned is not None:
            self._unpin(self.replicas[sequence.pinned])

    def _unpin(self, replica: Replica) -> None:
        self._rooms.clear()
        if replica.pin is not None:
            replica.pin.pinned = None
        replica.pin, replica.pin_band = None, math.inf

    def stats(self, now: float) -> list[ReplicaUse]:
        """What is taken, by replica, of those that have reported."""
        return [
            ReplicaUse(
                replica_id=replica.replica_id,
                pool=replica.pool,
                fresh=replica.is_fresh(now),
                held=len(replica.held),
                ghosts=len(replica.ghosts),
                places=replica.places,
                kv_tokens_held=replica.kv_held,
                kv_tokens_ghosts=replica.kv_ghosts,
                kv_tokens_total=replica.kv_total,
                breaker=replica.breaker.state(now),
                reserved=replica.pin is not None,
            )
            for _, replica in sorted(self.replicas.items())
            if replica.reported > -math.inf
        ]


def _is_doubtful(replica: Replica, sequence: Sequence) -> bool:
    """Whether a sequence that has lost a replica should rather not try this one out."""
    return sequence.state is State.MOVING and replica.breaker.open_until is not None
