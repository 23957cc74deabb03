"""Who gets a place in which engine replica, and when: the state of admission and its rules.

One `Admission` decides for all ingress replicas (owner.py serves it to them). It is a state machine
without Ray, threads or I/O: messages (tickets.py) go in, answers come out, and the clock is passed
in. The order of the queue is fair_queue.py's, room is places.py's, the limits of keys are
quotas.py's; docs/decisions/0016-admission.md says why.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from serve_app.routing.admission_stats import AdmissionStats
from serve_app.routing.agenda import Agenda
from serve_app.routing.fair_queue import FairQueue
from serve_app.routing.places import Places, Replica
from serve_app.routing.quotas import REMEMBER_S, Quotas
from serve_app.routing.rates import DrainMeter, retry_after
from serve_app.routing.refusals import (
    Refused,
    queue_full,
    too_late,
    too_long,
    unknown,
    waited_too_long,
)
from serve_app.routing.tickets import (
    Answer,
    Enter,
    Grant,
    Held,
    Join,
    Landed,
    Leave,
    Message,
    Move,
    Refusal,
    Seen,
    Terms,
)
from serve_app.routing.visits import Sequence as Waiter
from serve_app.routing.visits import State, Visit
from serve_app.sections import AdmissionSection

#: Seconds of silence after which an ingress is forgotten.
SILENT_S = 5.0


class UnknownIngress(Exception):
    """The ingress must `Join` first: this owner knows nothing of it."""


@dataclass(slots=True)
class _Ingress:
    seen: float
    visits: dict[str, Visit] = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)  # by (first) sequence


class Admission:
    """`clock` gives seconds of a monotonic clock."""

    def __init__(
        self,
        settings: AdmissionSection,
        max_ongoing_requests: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._places = Places(max_ongoing_requests)
        self._queue = FairQueue()
        self._quotas = Quotas()
        self._meter = DrainMeter()
        self._ingresses: dict[str, _Ingress] = {}
        self._met: dict[str, float] = {}  # ingress -> when it was last heard
        self._sequences: dict[str, Waiter] = {}
        self._moving: dict[str, Waiter] = {}  # in the order of their moves
        self._waits: Agenda[Visit] = Agenda(lambda v: bool(v.waiting) and not v.placed)
        self._deadlines: Agenda[Visit] = Agenda(_is_waiting)
        self._order = 0
        self._entering: Visit | None = None
        self._stale = False  # whether something has happened since the last round of placing
        self._granted = 0
        self._refused: Counter[str] = Counter()
        self._pruned_at = self._ticked_at = clock()

    def configure(self, settings: AdmissionSection, max_ongoing_requests: int) -> None:
        """Other settings. What has been let in stays; a smaller queue only lets less in."""
        self._settings = settings
        self._places.configure(max_ongoing_requests)
        self._place_all(self._now())

    # What ingresses say.

    def knows(self, ingress_id: str) -> bool:
        return ingress_id in self._ingresses

    def take(self, ingress_id: str, messages: Sequence[Message]) -> list[Answer]:
        """Handle what an ingress says, in order; returns its answers that are decided by then.
        Without messages it is a sign of life.

        Raises:
            UnknownIngress: it has not joined, or was forgotten; nothing was handled.
        """
        starts = bool(messages) and isinstance(messages[0], Join)
        if ingress_id not in self._ingresses and not starts:
            raise UnknownIngress(ingress_id)
        now = self._now()
        for message in messages:
            self._stale = True
            self._handle(ingress_id, message, now)
        self._ingresses[ingress_id].seen = self._met[ingress_id] = now
        if self._stale:
            self._place_all(now)
        return self.answers_for(ingress_id)

    def answers_for(self, ingress_id: str) -> list[Answer]:
        """The answers for an ingress that were not returned yet, each once."""
        ingress = self._ingresses.get(ingress_id)
        if ingress is None or not ingress.answers:
            return []
        answers = list(ingress.answers.values())
        ingress.answers.clear()
        return answers

    def pending_ingresses(self) -> set[str]:
        """The ingresses that `answers_for` has something for."""
        return {name for name, ingress in self._ingresses.items() if ingress.answers}

    def tick(self) -> None:
        """What time brings about: expired waits and deadlines, ingresses and replicas that have
        fallen silent, breakers that let a sequence through again. Call it every 0.1 to 0.2 s."""
        now = self._now()
        if (pause := now - self._ticked_at) > 1.0:
            # This process itself was held up, and what ingresses said meanwhile waits unread.
            for ingress in self._ingresses.values():
                ingress.seen += pause
        self._ticked_at = now
        for ingress_id in [i for i, g in self._ingresses.items() if now - g.seen > SILENT_S]:
            self._forget(ingress_id, now, run_on=True)
            del self._ingresses[ingress_id]
        for visit in self._deadlines.due(now):
            if visit.deadline <= now:
                self._refuse(visit, too_late(), now)
        for visit in self._waits.due(now - self._settings.max_wait_s):
            seconds = self._retry_after(visit)
            self._refuse(visit, waited_too_long(self._settings.max_wait_s, seconds), now)
        self._places.tick(now)
        if now - self._pruned_at >= REMEMBER_S:
            self._pruned_at = now
            self._queue.prune()
            self._quotas.prune(now)
            self._met = {i: heard for i, heard in self._met.items() if now - heard < REMEMBER_S}
        self._place_all(now)

    def stats(self) -> AdmissionStats:
        """A snapshot, for metrics."""
        now = self._clock()
        visits = [v for ingress in self._ingresses.values() for v in ingress.visits.values()]
        entered = [visit.entered for visit in visits if visit.waiting]
        return AdmissionStats(
            queued=tuple(self._queue.stats()),
            moving=len(self._moving),
            replicas=tuple(self._places.stats(now)),
            ingresses=len(self._ingresses),
            oldest_wait_s=max(0.0, now - min(entered, default=now)),
            drain_tokens_per_s=self._meter.rate(),
            granted=self._granted,
            refused=tuple(sorted(self._refused.items())),
        )

    def _now(self) -> float:
        now = self._clock()
        self._meter.advance(now, self._queue.sequences > 0)
        return now

    def _handle(self, ingress_id: str, message: Message, now: float) -> None:
        match message:
            case Enter():
                self._enter(ingress_id, message, now)
            case Leave():
                self._leave(ingress_id, message, now)
            case Move():
                self._move(ingress_id, message, now)
            case Landed():
                self._landed(ingress_id, message, now)
            case Seen():
                for status, age_s in message.statuses:
                    self._places.report(status, age_s, now)
                for replica_id in message.gone:
                    self._places.goodbye(replica_id, now)
                heard = [status.replica_id for status, _ in message.statuses]
                self._places.route(ingress_id, heard, message.unrouted, now)
            case Join():
                self._join(ingress_id, message, now)

    def _known(self, ingress_id: str, sequence_id: str) -> Waiter | None:
        sequence = self._sequences.get(sequence_id)
        return sequence if sequence and sequence.visit.ingress_id == ingress_id else None

    # Entering.

    def _enter(self, ingress_id: str, enter: Enter, now: float) -> None:
        if not enter.asks or any(ask.sequence_id in self._sequences for ask in enter.asks):
            return  # said twice
        tokens = sum(ask.charge for ask in enter.asks)
        visit = self._visit(ingress_id, enter, now)
        try:
            if enter.seconds_left <= 0:
                raise too_late()
            for sequence in visit.waiting.values():
                if not self._places.can_ever_hold(sequence):
                    raise too_long(sequence.ask.charge)
            visit.key.check(enter.asks, now)
            self._enqueue(visit)
            self._entering = visit
            self._place_all(now)
            self._entering = None
            if visit.waiting and not self._make_room(visit, now):
                refused = queue_full(self._retry_after(visit))
                self._take_back(visit, now)
                self._stale = True
                raise refused
        except Refused as refused:
            ids = tuple(ask.sequence_id for ask in enter.asks)
            self._answer_refusal(ingress_id, ids, refused)
        else:
            visit.key.charge(1, tokens, now)

    def _visit(self, ingress_id: str, enter: Enter, now: float) -> Visit:
        """The visit of an `Enter`, with its sequences, which nothing knows of yet."""
        visit = self._new_visit(
            ingress_id, enter.request_id, enter.terms, now - enter.waited_s, enter.seconds_left, now
        )
        visit.own_deadline = enter.own_deadline
        for ask in enter.asks:
            visit.waiting[ask.sequence_id] = Waiter(ask, visit)
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
            key=self._quotas.key(terms, now),
            terms=terms,
            entered=entered,
            deadline=now + seconds_left,
            own_deadline=False,
            order=self._order,
        )

    def _enqueue(self, visit: Visit) -> None:
        self._ingresses[visit.ingress_id].visits[visit.request_id] = visit
        self._sequences.update(visit.waiting)
        visit.key.sequences += len(visit.waiting)
        self._queue.add(visit)
        self._waits.add(visit.entered, visit)
        self._deadlines.add(visit.deadline, visit)

    def _make_room(self, visit: Visit, now: float) -> bool:
        """Whether what waits fits the queue; visits that give way to this one are refused."""
        settings, queue = self._settings, self._queue
        sequences = queue.sequences - settings.max_queued_requests
        tokens = 0
        # An empty queue takes one request whatever its tokens: it would never be let in otherwise.
        if settings.max_queued_tokens is not None and queue.sequences > len(visit.waiting):
            tokens = queue.tokens - settings.max_queued_tokens
        victims: list[Visit] = []
        candidates = queue.gives_way(visit)
        while sequences > 0 or tokens > 0:
            if (victim := next(candidates, None)) is None:
                return False
            victims.append(victim)
            sequences -= len(victim.waiting)
            tokens -= victim.waiting_tokens
        for victim in victims:
            self._stale = True
            self._refuse(victim, queue_full(self._retry_after(victim)), now)
        return True

    def _take_back(self, visit: Visit, now: float) -> None:
        """Undo everything for a visit that is not let in after all."""
        for sequence in list(visit.sequences.values()):
            held = sequence.state is State.HELD
            replica = self._drop(sequence, now)
            if held:
                self._granted -= 1
                self._queue.charge(visit, -sequence.tokens)
            if replica is not None:
                replica.breaker.ended(sequence.sequence_id)

    def _retry_after(self, visit: Visit) -> int:
        """Seconds until what waits before the visit has drained, and as much as it asks for."""
        rate = self._meter.rate()
        tokens = self._queue.ahead_of(visit.terms.priority)
        return retry_after(tokens / rate if rate else None)

    # Placing.

    def _place_all(self, now: float) -> None:
        """Place all that can be placed, in order: moving sequences, then the queue."""
        places, self._stale = self._places, False
        if not self._moving and not self._queue.sequences:
            return
        places.begin(now)
        if not places.has_places():
            return

        def try_place(sequence: Waiter, is_head: bool) -> bool:
            if (replica := places.choose(sequence)) is not None:
                self._grant(sequence, replica, now)
                return True
            if is_head and not places.has_pin(sequence):
                places.pin(sequence)
            return False

        for sequence in places.pinned(-math.inf):
            try_place(sequence, True)
        for sequence in list(self._moving.values()):
            if not places.has_room(-math.inf):
                break
            try_place(sequence, True)
        self._queue.place(try_place, places.has_room, places.pinned)

    def _grant(self, sequence: Waiter, replica: Replica, now: float) -> None:
        visit, waited = sequence.visit, sequence.state is State.WAITING
        self._unwait(sequence)
        self._places.hold(sequence, replica.replica_id, now)
        visit.placed = True
        self._granted += 1
        if waited:
            self._queue.charge(visit, sequence.tokens)
            if visit is not self._entering:
                self._meter.drained(sequence.tokens)
        grant = Grant(sequence_id=sequence.sequence_id, replica_id=replica.replica_id)
        self._ingresses[visit.ingress_id].answers[sequence.sequence_id] = grant

    def _unwait(self, sequence: Waiter) -> None:
        """Take the sequence out of wherever it waits."""
        self._queue.remove(sequence)
        self._moving.pop(sequence.sequence_id, None)
        self._places.unpin(sequence)

    # Running and leaving.

    def _move(self, ingress_id: str, move: Move, now: float) -> None:
        if (sequence := self._known(ingress_id, move.sequence_id)) is None:
            self._answer_refusal(ingress_id, (move.sequence_id,), unknown())
            return
        if sequence.state is State.MOVING and sequence.avoid == move.lost:
            return  # said twice
        self._blame(move, self._places.release(sequence, now), now)
        self._start_moving(sequence, move, now)

    def _blame(self, move: Move, replica: Replica | None, now: float) -> None:
        if replica is None:
            return
        if move.blame and replica.replica_id == move.lost:
            replica.breaker.failed(move.sequence_id, now)
        else:
            replica.breaker.ended(move.sequence_id)

    def _start_moving(self, sequence: Waiter, move: Move, now: float) -> None:
        visit = sequence.visit
        self._ingresses[visit.ingress_id].answers.pop(move.sequence_id, None)
        self._unwait(sequence)
        visit.placed = True
        sequence.state, sequence.avoid = State.MOVING, move.lost
        visit.deadline = now + move.seconds_left
        self._moving[sequence.sequence_id] = sequence
        self._deadlines.add(visit.deadline, visit)

    def _landed(self, ingress_id: str, landed: Landed, now: float) -> None:
        sequence = self._known(ingress_id, landed.sequence_id)
        if sequence is None or sequence.replica_id == landed.replica_id:
            return
        self._ingresses[ingress_id].answers.pop(landed.sequence_id, None)
        if (granted := self._places.release(sequence, now)) is not None:
            granted.breaker.ended(landed.sequence_id)
        self._unwait(sequence)
        self._places.hold(sequence, landed.replica_id, now)
        sequence.visit.placed = True

    def _leave(self, ingress_id: str, leave: Leave, now: float) -> None:
        if (sequence := self._known(ingress_id, leave.sequence_id)) is None:
            return
        ask, visit, used = sequence.ask, sequence.visit, leave.used_tokens
        had_place = sequence.state is not State.WAITING
        if (replica := self._drop(sequence, now)) is not None:
            if leave.failed:
                replica.breaker.failed(leave.sequence_id, now)
            elif used >= min(ask.prompt_tokens + 1, ask.charge):  # it has done what it should
                replica.breaker.succeeded(leave.sequence_id)
            else:
                replica.breaker.ended(leave.sequence_id)
        if had_place:
            self._queue.charge(visit, used - ask.kv_tokens)
        visit.key.charge(0, min(0, used - ask.charge), now)

    def _drop(self, sequence: Waiter, now: float, *, runs_on: bool = False) -> Replica | None:
        """Forget a sequence and its answers; returns the replica that held it."""
        visit = sequence.visit
        ingress = self._ingresses[visit.ingress_id]
        self._unwait(sequence)
        replica = self._places.release(sequence, now, runs_on=runs_on)
        ingress.answers.pop(sequence.sequence_id, None)
        del self._sequences[sequence.sequence_id]
        del visit.sequences[sequence.sequence_id]
        visit.key.sequences -= 1
        visit.key.idle_since = now
        if not visit.sequences:
            del ingress.visits[visit.request_id]
        return replica

    # Refusing.

    def _refuse(self, visit: Visit, refused: Refused, now: float) -> None:
        """Refuse what waits of a visit, and give back what was charged for what never ran."""
        waiting = [s for s in visit.sequences.values() if s.state is not State.HELD]
        never = [s for s in waiting if s.state is State.WAITING]
        visit.key.charge(0 if visit.placed else -1, -sum(s.ask.charge for s in never), now)
        for sequence in waiting:
            self._drop(sequence, now)
        ids = tuple(sequence.sequence_id for sequence in waiting)
        self._answer_refusal(visit.ingress_id, ids, refused)

    def _answer_refusal(self, ingress_id: str, ids: tuple[str, ...], refused: Refused) -> None:
        self._refused[refused.code] += len(ids)
        self._ingresses[ingress_id].answers[ids[0]] = Refusal(
            sequence_ids=ids,
            code=refused.code,
            message=refused.message,
            retry_after_s=refused.retry_after_s,
        )

    # Ingresses that come and go.

    def _forget(self, ingress_id: str, now: float, *, run_on: bool) -> None:
        """Drop everything of an ingress. `run_on`: what it held may go on in the engines."""
        for visit in list(self._ingresses[ingress_id].visits.values()):
            for sequence in list(visit.sequences.values()):
                if (replica := self._drop(sequence, now, runs_on=run_on)) is not None:
                    replica.breaker.ended(sequence.sequence_id)

    def _join(self, ingress_id: str, join: Join, now: float) -> None:
        """What the ingress says replaces all that was known of it. It was let in before, so that
        no limit keeps it out now."""
        if ingress_id in self._ingresses:
            self._forget(ingress_id, now, run_on=False)
        is_new = ingress_id not in self._met
        self._met[ingress_id] = now
        self._ingresses[ingress_id] = _Ingress(now)
        if is_new:  # else the buckets have it already
            for spent in join.spent:
                self._quotas.key(spent.terms, now).carry(spent, now)
        for held in join.held:
            self._places.hold(self._rejoin(ingress_id, held, now), held.replica_id, now)
        for held, move in join.moving:
            sequence = self._rejoin(ingress_id, held, now)
            if is_new:
                self._blame(move, self._places.replicas.get(move.lost), now)
            self._start_moving(sequence, move, now)
        for enter in join.waiting:
            for ask in enter.asks:
                self._drop_double(ask.sequence_id, now)
            visit = self._visit(ingress_id, enter, now)
            if (known := self._ingresses[ingress_id].visits.get(enter.request_id)) is not None:
                visit.placed = known.placed
                for sequence in visit.waiting.values():
                    sequence.visit = known
                known.waiting, visit = visit.waiting, known
                visit.sequences.update(visit.waiting)
                visit.entered, visit.own_deadline = now - enter.waited_s, enter.own_deadline
            self._enqueue(visit)

    def _rejoin(self, ingress_id: str, held: Held, now: float) -> Waiter:
        """A sequence that has, or has had, a place under another owner."""
        self._drop_double(held.ask.sequence_id, now)
        visits = self._ingresses[ingress_id].visits
        if (visit := visits.get(held.request_id)) is None:
            visit = visits[held.request_id] = self._new_visit(
                ingress_id, held.request_id, held.terms, now, held.seconds_left, now
            )
        visit.placed = True
        visit.key.sequences += 1
        sequence = Waiter(held.ask, visit)
        visit.sequences[sequence.sequence_id] = self._sequences[sequence.sequence_id] = sequence
        return sequence

    def _drop_double(self, sequence_id: str, now: float) -> None:
        """Of a sequence that two ingresses claim the last word counts."""
        if (old := self._sequences.get(sequence_id)) is not None:
            self._drop(old, now)


def _is_waiting(visit: Visit) -> bool:
    return any(sequence.state is not State.HELD for sequence in visit.sequences.values())
