"""Who gets a place in which engine replica, and when: the state of admission and its rules.

One `Admission` decides for all ingress replicas (owner.py serves it to them). It is a state machine
without Ray, threads or I/O: messages (tickets.py) go in, answers come out, and the clock is passed
in. The order of the queue is fair_queue.py's, room is places.py's, the limits of keys are
quotas.py's; docs/decisions/0016-admission.md says why.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from serve_app.routing.admission_stats import AdmissionStats
from serve_app.routing.owner_settings import OwnerSettings
from serve_app.routing.places import Places
from serve_app.routing.quotas import REMEMBER_S
from serve_app.routing.rates import DrainMeter, retry_after
from serve_app.routing.recent import Recent
from serve_app.routing.refusals import (
    Refused,
    pool_empty,
    queue_full,
    too_late,
    too_long,
    unknown,
    waited_too_long,
)
from serve_app.routing.replica_room import Replica
from serve_app.routing.roster import Roster
from serve_app.routing.snapshot import snapshot
from serve_app.routing.tickets import (
    Answer,
    Enter,
    Grant,
    Join,
    Landed,
    Leave,
    Message,
    Move,
    Seen,
)
from serve_app.routing.visits import Sequence as Waiter
from serve_app.routing.visits import State, Visit

#: Seconds of silence after which an ingress is forgotten.
SILENT_S = 5.0


class UnknownIngress(Exception):
    """The ingress must `Join` first: this owner knows nothing of it."""


class Admission:
    """`clock` gives seconds of a monotonic clock."""

    def __init__(
        self,
        settings: OwnerSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._places = Places(settings.places, settings.routing.affinity_slack)
        self._roster = Roster(self._places)
        self._queue = self._roster.queue
        self._meters: dict[str, DrainMeter] = {}  # by pool
        self._recent = Recent()
        self._entering: Visit | None = None
        self._stale = False  # whether something has happened since the last round of placing
        self._granted = 0
        self._pruned_at = self._ticked_at = clock()

    def configure(self, settings: OwnerSettings) -> None:
        """Other settings. What has been let in stays; a smaller queue only lets less in."""
        self._settings = settings
        self._places.configure(settings.places, settings.routing.affinity_slack)
        self._place_all(self._now())

    # What ingresses say.

    def knows(self, ingress_id: str) -> bool:
        return ingress_id in self._roster.ingresses

    def take(self, ingress_id: str, messages: Sequence[Message]) -> list[Answer]:
        """Handle what an ingress says, in order; returns its answers that are decided by then.
        Without messages it is a sign of life.

        Raises:
            UnknownIngress: it has not joined, or was forgotten; nothing was handled.
        """
        starts = bool(messages) and isinstance(messages[0], Join)
        if ingress_id not in self._roster.ingresses and not starts:
            raise UnknownIngress(ingress_id)
        now = self._now()
        for message in messages:
            self._stale = True
            self._handle(ingress_id, message, now)
        self._roster.ingresses[ingress_id].seen = self._roster.met[ingress_id] = now
        if self._stale:
            self._place_all(now)
        return self.answers_for(ingress_id)

    def answers_for(self, ingress_id: str) -> list[Answer]:
        """The answers for an ingress that were not returned yet, each once."""
        ingress = self._roster.ingresses.get(ingress_id)
        if ingress is None or not ingress.answers:
            return []
        answers = list(ingress.answers.values())
        ingress.answers.clear()
        return answers

    def pending_ingresses(self) -> set[str]:
        """The ingresses that `answers_for` has something for."""
        return {name for name, ingress in self._roster.ingresses.items() if ingress.answers}

    def tick(self) -> None:
        """What time brings about: expired waits and deadlines, ingresses and replicas that have
        fallen silent, breakers that let a sequence through again. Call it every 0.1 to 0.2 s."""
        now = self._now()
        if (pause := now - self._ticked_at) > 1.0:
            # This process itself was held up, and what ingresses said meanwhile waits unread.
            for ingress in self._roster.ingresses.values():
                ingress.seen += pause
        self._ticked_at = now
        for ingress_id, ingress in list(self._roster.ingresses.items()):
            if now - ingress.seen > SILENT_S:
                self._roster.forget(ingress_id, now, run_on=True)
                del self._roster.ingresses[ingress_id]
        for visit in self._roster.deadlines.due(now):
            if visit.deadline <= now:
                self._refuse(visit, too_late(), now)
        max_wait_s = self._settings.admission.max_wait_s
        for visit in list(self._roster.waits.due(now - max_wait_s)):
            self._end_wait(visit, max_wait_s, now)
        self._places.tick(now)
        if now - self._pruned_at >= REMEMBER_S:
            self._pruned_at = now
            self._queue.prune()
            self._roster.quotas.prune(now)
            met = self._roster.met
            self._roster.met = {i: heard for i, heard in met.items() if now - heard < REMEMBER_S}
        self._place_all(now)

    def stats(self) -> AdmissionStats:
        """A snapshot, for metrics."""
        rates = [rate for meter in self._meters.values() if (rate := meter.rate()) is not None]
        return snapshot(
            self._roster,
            self._recent,
            self._clock(),
            granted=self._granted,
            drain_tokens_per_s=sum(rates) if rates else None,
        )

    def _now(self) -> float:
        now = self._clock()
        for pool, queue in self._queue.by_pool.items():
            self._meter(pool).advance(now, queue.sequences > 0)
        return now

    def _meter(self, pool: str) -> DrainMeter:
        if (meter := self._meters.get(pool)) is None:
            meter = self._meters[pool] = DrainMeter()
        return meter

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
                self._roster.join(ingress_id, message, now)

    # Entering.

    def _enter(self, ingress_id: str, enter: Enter, now: float) -> None:
        if not enter.asks or any(ask.sequence_id in self._roster.sequences for ask in enter.asks):
            return  # said twice
        tokens = sum(ask.charge for ask in enter.asks)
        visit = self._roster.visit_of(ingress_id, enter, now)
        try:
            if enter.seconds_left <= 0:
                raise too_late()
            for sequence in visit.waiting.values():
                if not self._places.can_ever_hold(sequence):
                    raise too_long(sequence.ask.charge)
            visit.key.check(enter.asks, now)
            self._roster.enqueue(visit)
            self._entering = visit
            self._place_all(now)
            self._entering = None
            if visit.home in self._settings.refuses and not self._places.ready(visit.pools, now):
                refused = pool_empty(visit.home, self._retry_after(visit))
                self._take_back(visit, now)
                self._recent.note("turned_away", visit.home, 1.0, now)
                raise refused
            if visit.waiting and not self._make_room(visit, now):
                refused = queue_full(self._retry_after(visit))
                self._take_back(visit, now)
                self._stale = True
                raise refused
        except Refused as refused:
            ids = tuple(ask.sequence_id for ask in enter.asks)
            self._roster.refuse(ingress_id, ids, refused)
        else:
            visit.key.charge(1, tokens, now)

    def _make_room(self, visit: Visit, now: float) -> bool:
        """Whether what waits fits the queue; visits that give way to this one are refused."""
        settings, queue = self._settings.admission, self._queue.of(visit.home)
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
            replica = self._roster.drop(sequence, now)
            if held:
                self._granted -= 1
                self._queue.charge(visit, -sequence.tokens)
            if replica is not None:
                replica.breaker.ended(sequence.sequence_id)

    def _retry_after(self, visit: Visit) -> int:
        """Seconds until what waits for its pool in its band and those before it has drained, it
        included."""
        rate = self._meter(visit.home).rate()
        tokens = self._queue.of(visit.home).ahead_of(visit.terms.priority)
        return retry_after(tokens / rate if rate else None)

    # Placing.

    def _place_all(self, now: float) -> None:
        """Place all that can be placed, in order: moving sequences, then the queue."""
        places, self._stale = self._places, False
        if not self._roster.moving and not self._queue.sequences:
            return
        places.begin(now)
        if not places.has_places():
            return

        def try_place(sequence: Waiter, is_head: bool, pools: tuple[str, ...]) -> bool:
            if (replica := places.choose(sequence, pools)) is not None:
                self._grant(sequence, replica, now)
                return True
            if is_head and not places.has_pin(sequence):
                places.pin(sequence)
            return False

        for sequence in places.pinned(-math.inf):
            try_place(sequence, True, sequence.ask.pools)
        for sequence in list(self._roster.moving.values()):
            if not places.has_room(-math.inf):
                break
            try_place(sequence, True, sequence.ask.pools)
        self._queue.place(try_place, places.has_room, places.pinned)

    def _grant(self, sequence: Waiter, replica: Replica, now: float) -> None:
        visit, waited = sequence.visit, sequence.state is State.WAITING
        self._roster.unwait(sequence)
        self._places.hold(sequence, replica.replica_id, now)
        visit.placed = True
        self._granted += 1
        if waited:
            self._queue.charge(visit, sequence.tokens)
            if visit is not self._entering:
                self._meter(visit.home).drained(sequence.tokens)
        grant = Grant(sequence_id=sequence.sequence_id, replica_id=replica.replica_id)
        self._roster.ingresses[visit.ingress_id].answers[sequence.sequence_id] = grant

    # Running and leaving.

    def _move(self, ingress_id: str, move: Move, now: float) -> None:
        if (sequence := self._roster.find(ingress_id, move.sequence_id)) is None:
            self._roster.refuse(ingress_id, (move.sequence_id,), unknown())
            return
        if sequence.state is State.MOVING and sequence.avoid == move.lost:
            return  # said twice
        self._roster.blame(move, self._places.release(sequence, now), now)
        self._roster.start_moving(sequence, move, now)

    def _landed(self, ingress_id: str, landed: Landed, now: float) -> None:
        sequence = self._roster.find(ingress_id, landed.sequence_id)
        if sequence is None or sequence.replica_id == landed.replica_id:
            return
        self._roster.ingresses[ingress_id].answers.pop(landed.sequence_id, None)
        if (granted := self._places.release(sequence, now)) is not None:
            granted.breaker.ended(landed.sequence_id)
        self._roster.unwait(sequence)
        self._places.hold(sequence, landed.replica_id, now)
        sequence.visit.placed = True

    def _leave(self, ingress_id: str, leave: Leave, now: float) -> None:
        if (sequence := self._roster.find(ingress_id, leave.sequence_id)) is None:
            return
        ask, visit, used = sequence.ask, sequence.visit, leave.used_tokens
        ran_in = self._places.pool_of(sequence)
        self._recent.note("ttft", visit.home, leave.ttft_s, now)
        self._recent.note("itl", ran_in or visit.home, leave.itl_s, now)
        had_place = sequence.state is not State.WAITING
        if (replica := self._roster.drop(sequence, now)) is not None:
            if leave.failed:
                replica.breaker.failed(leave.sequence_id, now)
            elif used >= min(ask.prompt_tokens + 1, ask.charge):  # it has done what it should
                replica.breaker.succeeded(leave.sequence_id)
            else:
                replica.breaker.ended(leave.sequence_id)
        if had_place:
            self._queue.charge(visit, used - ask.kv_tokens)
        visit.key.charge(0, min(0, used - ask.charge), now)

    # Refusing.

    def _end_wait(self, visit: Visit, max_wait_s: float, now: float) -> None:
        """The visit has waited for as long as any may: refuse it, unless a replica is being
        started for it."""
        if self._places.ready(visit.pools, now):
            refused = waited_too_long(max_wait_s, self._retry_after(visit))
        elif visit.home in self._settings.wakes_up - self._settings.refuses:
            self._roster.waits.add(now, visit)
            return
        else:
            refused = pool_empty(visit.home, self._retry_after(visit))
        self._refuse(visit, refused, now)

    def _refuse(self, visit: Visit, refused: Refused, now: float) -> None:
        """Refuse what waits of a visit, and give back what was charged for what never ran."""
        waiting = [s for s in visit.sequences.values() if s.state is not State.HELD]
        never = [s for s in waiting if s.state is State.WAITING]
        visit.key.charge(0 if visit.placed else -1, -sum(s.ask.charge for s in never), now)
        for sequence in waiting:
            self._roster.drop(sequence, now)
        ids = tuple(sequence.sequence_id for sequence in waiting)
        self._roster.refuse(visit.ingress_id, ids, refused)
