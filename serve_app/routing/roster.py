"""All visits that the owner of admission knows of, by ingress, and what they hold: kept consistent.

A visit's sequences are in `sequences`; each of them waits in the queue, holds a place, or moves.
What becomes of them is admission.py's to decide.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from serve_app.routing.agenda import Agenda
from serve_app.routing.places import Places
from serve_app.routing.pool_queues import PoolQueues
from serve_app.routing.quotas import Quotas
from serve_app.routing.refusals import Refused
from serve_app.routing.replica_room import Replica
from serve_app.routing.tickets import Answer, Enter, Held, Join, Move, Refusal, Terms
from serve_app.routing.visits import Sequence, State, Visit


@dataclass(slots=True)
class Ingress:
    """One ingress: when it was last heard, its visits, and the answers that it has not got yet."""

    seen: float
    visits: dict[str, Visit] = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)  # by (first) sequence


class Roster:
    """`places` are changed with it: what leaves gives its place back."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.queue = PoolQueues()
        self.quotas = Quotas()
        self.ingresses: dict[str, Ingress] = {}
        self.met: dict[str, float] = {}  # ingress -> when it was last heard
        self.sequences: dict[str, Sequence] = {}
        self.moving: dict[str, Sequence] = {}  # in the order of their moves
        self.waits: Agenda[Visit] = Agenda(lambda v: bool(v.waiting) and not v.placed)
        self.deadlines: Agenda[Visit] = Agenda(_is_waiting)
        self.refused: Counter[str] = Counter()  # sequences, by code
        self._order = 0

    def find(self, ingress_id: str, sequence_id: str) -> Sequence | None:
        """The sequence, if it is this ingress's."""
        sequence = self.sequences.get(sequence_id)
        return sequence if sequence and sequence.visit.ingress_id == ingress_id else None

    # Visits.

    def visit_of(self, ingress_id: str, enter: Enter, now: float) -> Visit:
        """The visit of an `Enter`, with its sequences, which nothing knows of yet."""
        visit = self._new_visit(
            ingress_id, enter.request_id, enter.terms, now - enter.waited_s, enter.seconds_left, now
        )
        visit.pools = enter.asks[0].pools if enter.asks else visit.pools
        visit.own_deadline = enter.own_deadline
        for ask in enter.asks:
            visit.waiting[ask.sequence_id] = Sequence(ask, visit)
        visit.sequences.update(visit.waiting)
        return visit

    def _new_visit(
        self,
        ingress_id: str,
        request_id: str,
        terms: Terms,
        entered: float,
        seconds_left: float,
        now: float,
    ) -> Visit:
        self._order += 1
        return Visit(
            request_id=request_id,
            ingress_id=ingress_id,
            key=self.quotas.key(terms, now),
            terms=terms,
            entered=entered,
            deadline=now + seconds_left,
            own_deadline=False,
            order=self._order,
        )

    def enqueue(self, visit: Visit) -> None:
        """Count the visit's waiting sequences in, and queue them."""
        self.ingresses[visit.ingress_id].visits[visit.request_id] = visit
        self.sequences.update(visit.waiting)
        visit.key.sequences += len(visit.waiting)
        self.queue.add(visit)
        self.waits.add(visit.entered, visit)
        self.deadlines.add(visit.deadline, visit)

    def unwait(self, sequence: Sequence) -> None:
        """Take the sequence out of wherever it waits."""
        self.queue.remove(sequence)
        self.moving.pop(sequence.sequence_id, None)
        self.places.unpin(sequence)

    def drop(self, sequence: Sequence, now: float, *, runs_on: bool = False) -> Replica | None:
        """Forget a sequence and its answers; returns the replica that held it."""
        visit = sequence.visit
        ingress = self.ingresses[visit.ingress_id]
        self.unwait(sequence)
        replica = self.places.release(sequence, now, runs_on=runs_on)
        ingress.answers.pop(sequence.sequence_id, None)
        del self.sequences[sequence.sequence_id]
        del visit.sequences[sequence.sequence_id]
        visit.key.sequences -= 1
        visit.key.idle_since = now
        if not visit.sequences:
            del ingress.visits[visit.request_id]
        return replica

    def blame(self, move: Move, replica: Replica | None, now: float) -> None:
        """Tell the breaker of the replica that held it why a sequence moves."""
        if replica is None:
            return
        if move.blame and replica.replica_id == move.lost:
            replica.breaker.failed(move.sequence_id, now)
        else:
            replica.breaker.ended(move.sequence_id)

    def start_moving(self, sequence: Sequence, move: Move, now: float) -> None:
        """From now on the sequence, which holds no place, waits for another before all others."""
        visit = sequence.visit
        self.ingresses[visit.ingress_id].answers.pop(move.sequence_id, None)
        self.unwait(sequence)
        visit.placed = True
        sequence.state, sequence.avoid = State.MOVING, move.lost
        visit.deadline = now + move.seconds_left
        self.moving[sequence.sequence_id] = sequence
        self.deadlines.add(visit.deadline, visit)

    # Answers.

    def refuse(self, ingress_id: str, ids: tuple[str, ...], refused: Refused) -> None:
        """Put a refusal among the answers of the ingress."""
        self.refused[refused.code] += len(ids)
        self.ingresses[ingress_id].answers[ids[0]] = Refusal(
            sequence_ids=ids,
            code=refused.code,
            message=refused.message,
            retry_after_s=refused.retry_after_s,
        )

    # Ingresses that come and go.

    def forget(self, ingress_id: str, now: float, *, run_on: bool) -> None:
        """Drop everything of an ingress. `run_on`: what it held may go on in the engines."""
        for visit in list(self.ingresses[ingress_id].visits.values()):
            for sequence in list(visit.sequences.values()):
                if (replica := self.drop(sequence, now, runs_on=run_on)) is not None:
                    replica.breaker.ended(sequence.sequence_id)

    def join(self, ingress_id: str, join: Join, now: float) -> None:
        """What the ingress says replaces all that was known of it. It was let in before, so that
        no limit keeps it out now."""
        if ingress_id in self.ingresses:
            self.forget(ingress_id, now, run_on=False)
        is_new = ingress_id not in self.met
        self.met[ingress_id] = now
        self.ingresses[ingress_id] = Ingress(now)
        if is_new:  # else the buckets have it already
            for spent in join.spent:
                self.quotas.key(spent.terms, now).carry(spent, now)
        for held in join.held:
            self.places.hold(self._rejoin(ingress_id, held, now), held.replica_id, now)
        for held, move in join.moving:
            sequence = self._rejoin(ingress_id, held, now)
            if is_new:
                self.blame(move, self.places.replicas.get(move.lost), now)
            self.start_moving(sequence, move, now)
        for enter in join.waiting:
            for ask in enter.asks:
                self._drop_double(ask.sequence_id, now)
            visit = self.visit_of(ingress_id, enter, now)
            visit.placed = enter.placed
            if (known := self.ingresses[ingress_id].visits.get(enter.request_id)) is not None:
                known.placed |= enter.placed
                for sequence in visit.waiting.values():
                    sequence.visit = known
                known.waiting, visit = visit.waiting, known
                visit.sequences.update(visit.waiting)
                visit.entered, visit.own_deadline = now - enter.waited_s, enter.own_deadline
            self.enqueue(visit)

    def _rejoin(self, ingress_id: str, held: Held, now: float) -> Sequence:
        """A sequence that has, or has had, a place under another owner."""
        self._drop_double(held.ask.sequence_id, now)
        visits = self.ingresses[ingress_id].visits
        if (visit := visits.get(held.request_id)) is None:
            visit = visits[held.request_id] = self._new_visit(
                ingress_id, held.request_id, held.terms, now, held.seconds_left, now
            )
            visit.pools = held.ask.pools
        visit.placed = True
        visit.key.sequences += 1
        sequence = Sequence(held.ask, visit)
        visit.sequences[sequence.sequence_id] = self.sequences[sequence.sequence_id] = sequence
        return sequence

    def _drop_double(self, sequence_id: str, now: float) -> None:
        """Of a sequence that two ingresses claim the last word counts."""
        if (old := self.sequences.get(sequence_id)) is not None:
            self.drop(old, now)


def _is_waiting(visit: Visit) -> bool:
    return any(sequence.state is not State.HELD for sequence in visit.sequences.values())
