"""The places of all engine replicas: who holds one, where there is room, what is set aside.

A replica has room for so many sequences and so many KV tokens. What sequences hold is counted here
from grants, not from heartbeats, which are late. Heartbeats say which replicas there are, how large
they are, and which sequences run there that nobody here holds: *ghosts*, of an ingress that has
died or of another owner. Those occupy places for as long as they are reported.

A sequence that fits nowhere now *pins* the replica that will have room for it soonest: sequences of
its band and below get nothing there until it has its place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from serve_app.engines.protocol import ReplicaStatus
from serve_app.routing.admission_stats import ReplicaUse
from serve_app.routing.breaker import Breaker
from serve_app.routing.visits import Sequence, State

#: Age in seconds of its status at which a replica gets nothing more.
MAX_AGE_S = 5.0
#: Seconds that a replica may go on reporting a sequence that has left, before it is a ghost.
LEAVING_S = 3.0
#: Seconds for which a silent replica, and that one has said goodbye, is remembered.
FORGET_S = 60.0
#: Seconds for which an ingress is believed that Serve does not route to a replica: it says so
#: every second while that is so.
UNROUTED_S = 2.5


class Replica:
    """One replica. Known by name alone until its first status arrives."""

    def __init__(self, replica_id: str, now: float) -> None:
        self.replica_id = replica_id
        self.reported = -math.inf  # when its newest status was true
        self.gone = False
        self.unrouted: dict[str, float] = {}  # ingress that says so -> when
        self.forget_at = now + FORGET_S
        self.places = 0
        self.max_running: float = math.inf
        self.max_model_len = 0
        self.kv_total = 0
        self.held: dict[str, int] = {}  # sequence -> KV tokens
        self.kv_held = 0
        self.ghosts: dict[str, None] = {}
        self.kv_ghosts = 0
        self.left: dict[str, float] = {}  # sequence -> when it left
        self.free_places = 0
        self.free_kv = 0
        self.breaker = Breaker()
        self.pin: Sequence | None = None
        self.pin_band = math.inf

    def count(self) -> None:
        """Compute what is free from what is held."""
        self.free_places = self.places - len(self.held) - len(self.ghosts)
        self.free_kv = self.kv_total - self.kv_held - self.kv_ghosts

    def is_fresh(self, now: float) -> bool:
        if self.gone or now - self.reported > MAX_AGE_S:
            return False
        return not self.unrouted or all(
            now - moment > UNROUTED_S for moment in self.unrouted.values()
        )

    def can_ever_hold(self, sequence: Sequence) -> bool:
        """Whether it would fit if nothing else were there."""
        limit = min(self.max_model_len, self.kv_total)
        return sequence.ask.charge <= limit and sequence.avoid != self.replica_id

    def need(self, sequence: Sequence) -> int:
        """KV tokens that the sequence takes here: whole pages, but never more than all."""
        return min(sequence.tokens, self.kv_total)

    def fits(self, sequence: Sequence) -> bool:
        room = self.free_places > 0 and self.need(sequence) <= self.free_kv
        return room and self.can_ever_hold(sequence)

    def used_share(self) -> float:
        """The larger of the shares of KV and of places that are taken."""
        return 1.0 - min(self.free_kv / self.kv_total, self.free_places / self.places)

    def departures(self, sequence: Sequence) -> float:
        """How long until the sequence fits, in units of one sequence's stay: the sequences that
        must leave first, of all that are there."""
        there = max(1, len(self.held) + len(self.ghosts))
        mean = max(1.0, (self.kv_held + self.kv_ghosts) / there)
        missing = math.ceil((self.need(sequence) - self.free_kv) / mean)
        return max(missing, 1 - self.free_places) / there


class Places:
    """All replicas. `usable` is set for one round of placing by `begin`."""

    def __init__(self, max_ongoing_requests: int) -> None:
        self._max_ongoing = max_ongoing_requests
        self.replicas: dict[str, Replica] = {}
        self._usable: list[Replica] = []
        self._rooms: dict[float, int] = {}  # `room` of each band, until something changes

    # What is there.

    def configure(self, max_ongoing_requests: int) -> None:
        """Another number of places per replica. Who has one keeps it."""
        self._max_ongoing = max_ongoing_requests
        for replica in self.replicas.values():
            self._size(replica)

    def _size(self, replica: Replica) -> None:
        if replica.reported > -math.inf:
            replica.places = int(min(self._max_ongoing, replica.max_running))
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
        info = status.info
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

    def can_ever_hold(self, sequence: Sequence) -> bool:
        """Whether some known replica would hold it if nothing else were there; true while none is
        known. A silent one counts: it may come back."""
        known = [r for r in self.replicas.values() if not r.gone and r.reported > -math.inf]
        return not known or any(replica.can_ever_hold(sequence) for replica in known)

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
        if not replica.breaker.takes(now) and replica in self._usable:
            self._usable.remove(replica)  # it is being tried out with this one
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

    # Placing.

    def begin(self, now: float) -> None:
        """Look which replicas may get sequences now. Called before `choose` and `pin`."""
        usable: list[Replica] = []
        broken: list[Replica] = []
        for replica in self.replicas.values():
            if replica.is_fresh(now):
                closed = replica.breaker.open_until is None
                (usable if closed or replica.breaker.takes(now) else broken).append(replica)
            elif replica.pin is not None:
                self._unpin(replica)
        for replica in broken:
            self._unpin(replica)
        if not usable and broken and all(r.breaker.state(now) == "open" for r in broken):
            probed = min(broken, key=lambda r: r.breaker.open_until or now)
            probed.breaker.half_open(now)
            usable = [probed]
        self._usable = usable
        self._rooms.clear()

    def has_places(self) -> bool:
        """Whether any replica has a place for anything at all."""
        return any(replica.free_places > 0 for replica in self._usable)

    def has_room(self, band: float) -> bool:
        """Whether anything of this band could be placed."""
        return self.room(band) >= 0

    def room(self, band: float) -> int:
        """The most KV tokens that are free in one replica which takes something of this band; -1
        where there is none."""
        if (room := self._rooms.get(band)) is None:
            room = -1
            for replica in self._usable:
                if replica.free_places > 0 and replica.pin_band > band and replica.free_kv > room:
                    room = max(0, replica.free_kv)
            self._rooms[band] = room
        return room

    def choose(self, sequence: Sequence) -> Replica | None:
        """The replica with room for the sequence whose used share is least; ties go to the fewest
        held, then to the lowest id. A replica that is being tried out is a moving sequence's last
        choice: it has lost one already."""
        ask, band, best, best_rank = sequence.ask, sequence.band, None, None
        moving, tokens = sequence.state is State.MOVING, ask.kv_tokens
        if sequence.pinned is None and min(tokens, ask.charge) > self.room(band):
            return None  # most are told so: rounds of placing end with those that do not fit
        for replica in self._usable:
            if replica.free_places <= 0 or replica.free_kv < min(tokens, replica.kv_total):
                continue
            if replica.pin_band <= band and replica.pin is not sequence:
                continue
            if not replica.can_ever_hold(sequence):
                continue
            doubtful = moving and replica.breaker.open_until is not None
            rank = (doubtful, replica.used_share(), len(replica.held), replica.replica_id)
            if best_rank is None or rank < best_rank:
                best, best_rank = replica, rank
        return best

    def pin(self, sequence: Sequence) -> bool:
        """Set the replica aside that will fit the sequence soonest, of those that are not set aside
        for its band or a higher one; returns whether there was one."""
        band = sequence.band
        free = [r for r in self._usable if r.pin_band > band and r.can_ever_hold(sequence)]
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
        room, found = self.room(band), []
        for replica in self._usable:
            pin = replica.pin
            if pin is None or replica.pin_band != band:
                continue
            if min(pin.ask.kv_tokens, pin.ask.charge) <= room or replica.fits(pin):
                found.append(pin)
        return found

    def has_pin(self, sequence: Sequence) -> bool:
        """Whether a replica is set aside for the sequence, or for another one of its key that
        waits in its band: one is enough, lest a key of long prompts hold up the fleet."""
        if sequence.pinned is not None:
            return True
        if sequence.state is State.MOVING:
            return False
        terms = sequence.visit.terms
        return any(
            replica.pin is not None
            and replica.pin_band == terms.priority
            and replica.pin.visit.terms.name == terms.name
            for replica in self._usable
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
