"""The admission of one ingress: what its requests ask of the owner, and what the owner answers.

`Admission` is what openai/service.py and fleet.py call; `OpenAdmission` lets everybody in at once.
`AdmissionClient` asks the one owner (owner.py) that decides for all ingresses. Messages go out in
an exchange; while one is under way the next ones gather. What is decided later comes by a long
poll, of which one is always open.

The owner may die, hang, or forget this ingress, and a message or an answer may be lost on the way.
An owner that hangs, which nothing else would notice, is ended: Ray starts another.
All of it is met in one way: a new epoch begins with a `Join`, which tells the owner all that this
ingress holds and waits for (ledger.py), and what belongs to an earlier epoch counts no more, here
and there. Who has a place keeps it meanwhile. Who waits goes on waiting, for up to
`OWNER_PATIENCE_S` without a sign of an owner.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

from serve_app.errors import (
    ApiError,
    DeadlineExceeded,
    EngineUnavailable,
    InvalidRequest,
    Overloaded,
)
from serve_app.routing.ledger import Ledger, Tracked
from serve_app.routing.tickets import (
    Answer,
    Enter,
    Grant,
    Join,
    Landed,
    Leave,
    Message,
    Move,
    Refusal,
    Seen,
)

log = logging.getLogger("ray.serve")

#: Seconds without any answer of an owner after which nobody waits for it any more.
OWNER_PATIENCE_S = 10.0
#: Seconds for one exchange. An owner that takes longer hangs, or the answer is lost. Each try in
#: vain doubles it, up to eight times as long: a slow owner must not be asked ever more.
EXCHANGE_S = 3.0
#: Seconds without any answer after which an owner counts as hung.
HUNG_S = 20.0
#: Seconds for which a long poll stays open, and between two tries to reach an owner.
POLL_S = 10.0
RETRY_S = 0.1
#: Seconds for which `Leave` and `Landed` wait for company while nobody waits for a place.
GATHER_S = 0.02
#: Seconds between two reports of the engine replicas: the owner forgets both after five.
SEEN_S = 1.0
#: Seconds between two looks at who waits, and those for which the owner's own refusal of a passed
#: deadline is waited for.
_LOOK_S = 0.2
_GRACE_S = 0.5

#: The codes of refusals that no later try would change, or that are not about room.
_ERRORS: dict[str, type[ApiError]] = {
    "context_length_exceeded": InvalidRequest,
    "deadline_exceeded": DeadlineExceeded,
    "engine_unavailable": EngineUnavailable,
    "invalid_value": InvalidRequest,
}


class Admission(Protocol):
    """Decides who gets a place. Methods are called on the ingress's event loop."""

    async def enter(self, visit: Enter) -> None:
        """Bring the sequences of a request into the queue, all or none. Returns once they wait or
        have places. Every sequence that has entered must `leave`.

        Raises:
            Overloaded: there is no room, or a limit of the key is reached.
            DeadlineExceeded: its deadline has passed.
            EngineUnavailable: nobody decides at present.
        """
        ...

    async def place(self, sequence_id: str) -> str | None:
        """Wait for the sequence's place: the replica's id, None where any will do.

        Raises:
            Overloaded: it has waited too long, or had to give way.
            DeadlineExceeded: its deadline has passed.
            EngineUnavailable: nobody decides at present.
        """
        ...

    async def move(self, move: Move) -> str | None:
        """Another place for a sequence whose replica is lost; errors as for `place`, but where
        nobody decides any replica will do: what has begun goes on."""
        ...

    def landed(self, sequence_id: str, replica_id: str) -> None:
        """The sequence runs on this replica, whichever was granted."""
        ...

    def leave(self, leave: Leave) -> None:
        """The sequence has ended. Idempotent; unknown ids are ignored."""
        ...


class OpenAdmission:
    """Implements `Admission` without limits: for an engine in this process, and for tests."""

    async def enter(self, visit: Enter) -> None:
        return None

    async def place(self, sequence_id: str) -> str | None:
        return None

    async def move(self, move: Move) -> str | None:
        return None

    def landed(self, sequence_id: str, replica_id: str) -> None:
        return None

    def leave(self, leave: Leave) -> None:
        return None


class OwnerLostError(Exception):
    """The owner cannot be reached, or does not know this ingress in this epoch: join."""


class Channel(Protocol):
    """The way to the owner. `epoch` grows with every `Join`, which is its first message."""

    def exchange(
        self, ingress_id: str, epoch: int, messages: Sequence[Message]
    ) -> Coroutine[Any, Any, Sequence[Answer]]:
        """Hand over messages, in order; the answers that are there by then.

        Raises:
            OwnerLostError: they may have arrived or not.
        """
        ...

    def wait(
        self, ingress_id: str, epoch: int, timeout_s: float
    ) -> Coroutine[Any, Any, Sequence[Answer]]:
        """The answers that come next; none where none comes in time.

        Raises:
            OwnerLostError: as for `exchange`.
        """
        ...

    def end_owner(self) -> Coroutine[Any, Any, None]:
        """End the owner, which hangs; another will come. Where there is none, nothing happens."""
        ...


def _ignore(name: str, amount: float) -> None:
    """Counts nothing."""


class AdmissionClient:
    """Implements `Admission` over a `Channel`. `run` must run beside it.

    `seen` tells of the engine replicas that this ingress hears of; call `replicas_changed` when
    one comes or goes. `count` adds to a metric by name.
    """

    def __init__(
        self,
        channel: Channel,
        ingress_id: str,
        seen: Callable[[], Seen],
        *,
        clock: Callable[[], float] = time.monotonic,
        count: Callable[[str, float], None] = _ignore,
    ) -> None:
        self._channel = channel
        self._id = ingress_id
        self._seen = seen
        self._clock = clock
        self._count = count
        self._ledger = Ledger(clock)
        self._outbox: list[Message] = []
        self._urgent = False
        self._gather_until = 0.0
        self._seen_due = 0.0
        self._wake = asyncio.Event()
        self._epoch = 0
        self._joined = asyncio.Event()
        self._poll: asyncio.Future[Sequence[Answer]] | None = None
        self._answered = clock()  # when an owner was last heard
        self._ended = clock()  # when one was last ended because it hung

    # What requests call.

    async def enter(self, visit: Enter) -> None:
        entered = self._ledger.enter(visit)
        self._post(visit, urgent=True)
        try:
            refused = await entered.decided
        except BaseException:
            for ask in visit.asks:
                self.leave(Leave(sequence_id=ask.sequence_id, used_tokens=0))
            raise
        if refused is not None:
            raise refused

    async def place(self, sequence_id: str) -> str | None:
        tracked = self._ledger.get(sequence_id)
        if tracked is None:
            raise EngineUnavailable("this request has left admission; retry")
        return await self._outcome(tracked)

    async def move(self, move: Move) -> str | None:
        tracked = self._ledger.move(move)
        if tracked is None:
            raise EngineUnavailable("this request has left admission; retry")
        self._post(move, urgent=True)
        return await self._outcome(tracked)

    def landed(self, sequence_id: str, replica_id: str) -> None:
        if self._ledger.landed(sequence_id, replica_id):
            self._post(Landed(sequence_id=sequence_id, replica_id=replica_id))

    def leave(self, leave: Leave) -> None:
        if self._ledger.leave(leave):
            self._post(leave, urgent=self._ledger.any_waits)

    def replicas_changed(self) -> None:
        """Tell the owner of the engine replicas at once."""
        self._seen_due = self._clock()
        self._wake.set()

    @property
    def num_waiting(self) -> int:
        """Sequences of this ingress that wait for a place."""
        return sum(1 for _ in self._ledger.waiting())

    def describe(self) -> dict[str, Any]:
        """For /health: whether an owner decides, and what waits at this ingress."""
        silent = self._clock() - self._answered > 2 * EXCHANGE_S
        return {"owner": "silent" if silent else "ok", "waiting": self.num_waiting}

    # What runs beside them.

    async def run(self) -> None:
        """Talk with the owner until cancelled."""
        while True:
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._talk())
                    tasks.create_task(self._listen())
                    tasks.create_task(self._look())
            except* Exception as errors:  # a bug; requests must not wait for ever because of it
                log.error("the client of admission has failed; it starts again", exc_info=errors)
                self._lose(self._epoch, errors)
                await asyncio.sleep(RETRY_S)

    async def _talk(self) -> None:
        tries = 0
        while True:
            await self._something_due()
            epoch, messages = self._epoch, self._take_messages()
            try:
                async with asyncio.timeout(EXCHANGE_S * min(8, 2**tries)):
                    answers = await self._channel.exchange(self._id, epoch, messages)
            except (OwnerLostError, TimeoutError) as error:
                self._lose(epoch, error)
                tries += isinstance(error, TimeoutError)
                await self._end_hung_owner()
                await asyncio.sleep(RETRY_S)
                continue
            tries, self._answered = 0, self._clock()
            self._count("intserve_admission_exchanges_total", 1)
            self._count("intserve_admission_messages_total", len(messages))
            if epoch != self._epoch:
                continue  # meanwhile the poll has found that the owner is another
            self._take_answers(answers)
            for message in messages:
                if isinstance(message, Enter):
                    self._ledger.acknowledge(message.request_id)
                elif isinstance(message, Join):
                    for enter in message.waiting:
                        self._ledger.acknowledge(enter.request_id)
                    self._count("intserve_admission_joins_total", 1)
                    self._joined.set()

    async def _end_hung_owner(self) -> None:
        """Every ingress may do so: what it ends has answered nobody for as long."""
        now = self._clock()
        if now - max(self._answered, self._ended) <= HUNG_S:
            return
        log.error("the owner of admission has not answered for %g s; ending it", HUNG_S)
        self._ended = now
        self._count("intserve_admission_hung_owners_total", 1)
        await self._channel.end_owner()

    async def _listen(self) -> None:
        while True:
            await self._joined.wait()
            epoch = self._epoch
            call = self._channel.wait(self._id, epoch, POLL_S)
            self._poll = poll = asyncio.ensure_future(call)
            try:
                await asyncio.wait({poll}, timeout=POLL_S + EXCHANGE_S)
            finally:
                poll.cancel()  # nothing, where it is done
            if not poll.done():
                self._lose(epoch, TimeoutError())
            elif not poll.cancelled() and (error := poll.exception()) is not None:
                if not isinstance(error, OwnerLostError):
                    raise error
                self._lose(epoch, error)
            elif epoch == self._epoch:
                self._take_answers(poll.result())

    async def _look(self) -> None:
        looked = self._clock()
        while True:
            await asyncio.sleep(_LOOK_S)
            late = self._clock() - looked > 1.0
            looked = self._clock()
            if not late:  # else this loop itself was held up, and answers wait unread
                self.end_overdue()

    def end_overdue(self) -> None:
        """Refuse who waits beyond its deadline, or without an owner for too long; a sequence that
        has run before gets any place."""
        now = self._clock()
        for sequence_id, tracked in list(self._ledger.waiting()):
            if now > tracked.until + _GRACE_S:
                late = DeadlineExceeded("the request's deadline passed before it got a place")
                self._give_up(sequence_id, late)
            elif now - max(tracked.since, self._answered) <= OWNER_PATIENCE_S:
                continue
            elif tracked.lost is not None:
                self._ledger.grant(sequence_id, None)
            else:
                away = EngineUnavailable("nobody decides on admission at present; retry later")
                self._give_up(sequence_id, away)

    def _give_up(self, sequence_id: str, error: ApiError) -> None:
        self._ledger.refuse([sequence_id], error)
        self._post(Leave(sequence_id=sequence_id, used_tokens=0))

    def _lose(self, epoch: int, error: Exception) -> None:
        """Begin a new epoch, once for each that is lost."""
        if epoch != self._epoch:
            return
        if self._joined.is_set():
            log.warning("the owner of admission is lost (%s); joining again", type(error).__name__)
        self._joined.clear()
        self._epoch += 1
        if self._poll is not None:
            self._poll.cancel()
        self._wake.set()

    def _post(self, message: Message, *, urgent: bool = False) -> None:
        if not self._outbox:
            self._gather_until = self._clock() + GATHER_S
        self._outbox.append(message)
        self._urgent |= urgent
        self._wake.set()

    async def _something_due(self) -> None:
        while self._joined.is_set() and not (self._outbox and self._urgent):
            due = self._seen_due
            if self._outbox:
                due = min(due, self._gather_until)
            if (left_s := due - self._clock()) <= 0:
                return
            self._wake.clear()
            try:
                async with asyncio.timeout(left_s):
                    await self._wake.wait()
            except TimeoutError:
                return

    def _take_messages(self) -> list[Message]:
        messages, self._outbox, self._urgent = self._outbox, [], False
        if not self._joined.is_set():
            messages = [self._ledger.join()]  # holds all that the others say
            self._seen_due = self._clock()
        if self._clock() >= self._seen_due:
            self._seen_due = self._clock() + SEEN_S
            messages.append(self._seen())
        return messages

    def _take_answers(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            if isinstance(answer, Grant):
                self._ledger.grant(answer.sequence_id, answer.replica_id)
            else:
                self._ledger.refuse(answer.sequence_ids, _refused(answer))

    @staticmethod
    async def _outcome(tracked: Tracked) -> str | None:
        outcome = await asyncio.shield(tracked.outcome)
        if isinstance(outcome, ApiError):
            raise outcome
        return outcome


def _refused(refusal: Refusal) -> ApiError:
    if refusal.code in _ERRORS:
        return _ERRORS[refusal.code](refusal.message, code=refusal.code)
    return Overloaded(refusal.message, code=refusal.code, retry_after_s=refusal.retry_after_s)
