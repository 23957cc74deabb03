"""The owner of admission: one actor that decides for all ingresses of an application.

`AdmissionOwner` puts the state machine (admission.py) behind two calls: `exchange` takes messages
and answers what is decided by then, `wait` is the long poll for what is decided later. `find_owner`
makes or finds the actor, `OwnerChannel` is an ingress's way to it (admission_client.py is the other
end). It is a named, detached Ray actor and not a part of a deployment: decision 0018.

What it knows, the ingresses know together. Ray restarts it when it dies, empty; every ingress then
joins again. Until they had the time to, it only learns what they hold, so that nobody gets a place
which an ingress that is still silent holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError, RayTaskError

from serve_app.routing.admission import Admission, UnknownIngress
from serve_app.routing.admission_client import OwnerLostError
from serve_app.routing.admission_stats import AdmissionStats
from serve_app.routing.tickets import WIRE_VERSION, Answer, Join, Message, Seen
from serve_app.sections import AdmissionSection

log = logging.getLogger("ray.serve")

NAMESPACE = "intserve"

#: Seconds between two looks at what has expired.
TICK_S = 0.15
#: Seconds from the first message, in which every ingress joins before anybody gets a place.
SETTLE_S = 0.5
#: Seconds without any ingress after which the owner ends itself.
IDLE_S = 60.0
#: A tick that comes so much later than it should was held up, and so were all messages.
_HELD_UP_S = 1.0


class AdmissionOwner:
    """Decides for all ingresses. Every method runs on one event loop."""

    def __init__(
        self,
        settings: AdmissionSection,
        max_ongoing_requests: int,
        clock: Callable[[], float] = time.monotonic,
        settle_s: float = SETTLE_S,
    ) -> None:
        self.admission = Admission(settings, max_ongoing_requests, clock)
        self._clock = clock
        self._settle_s = settle_s
        self._configured = clock() - 1e9
        self._epochs: dict[str, int] = {}
        self._polls: dict[str, asyncio.Future[list[Answer]]] = {}
        self._undelivered: dict[str, list[Answer]] = {}
        self._heard = clock()
        self._settled: float | None = None
        self._held_back: dict[str, list[Message]] = {}
        self._ticks: asyncio.Task[None] | None = None

    async def exchange(
        self, ingress_id: str, epoch: int, messages: Sequence[Message]
    ) -> list[Answer]:
        """Take messages, in order; the answers for this ingress that are there by then.

        Raises:
            UnknownIngress: it must join first.
        """
        self._start()
        self._heard = now = self._clock()
        if epoch < self._epochs.get(ingress_id, 0):
            return []  # the sender has given this call up, and has joined since
        if any(isinstance(message, Join) for message in messages):
            self._epochs[ingress_id] = epoch
            self._undelivered.pop(ingress_id, None)
            self._end_poll(ingress_id)
        if self._settled is None:
            self._settled = now + self._settle_s
        if now < self._settled:
            messages = self._hold_back(ingress_id, messages)
        else:
            self._settle()
        answers = self._undelivered.pop(ingress_id, [])
        answers += self.admission.take(ingress_id, messages)
        self._deliver()
        return answers

    async def wait(self, ingress_id: str, epoch: int, timeout_s: float) -> list[Answer]:
        """The next answers for this ingress; none where none comes in time. One call at a time: a
        further one ends the one before.

        Raises:
            UnknownIngress: it must join first.
        """
        self._heard = self._clock()
        if epoch != self._epochs.get(ingress_id) or not self.admission.knows(ingress_id):
            raise UnknownIngress(ingress_id)
        self._end_poll(ingress_id)
        if answers := self._answers_for(ingress_id):
            return answers
        poll: asyncio.Future[list[Answer]] = asyncio.get_running_loop().create_future()
        self._polls[ingress_id] = poll
        await asyncio.wait({poll}, timeout=timeout_s)
        if self._polls.get(ingress_id) is poll:
            del self._polls[ingress_id]
        return poll.result() if poll.done() else []

    async def configure(
        self, settings: AdmissionSection, max_ongoing_requests: int, age_s: float
    ) -> None:
        """Take in settings that are `age_s` old, unless newer ones are known. Idempotent."""
        moment = self._clock() - age_s
        if moment > self._configured:
            self._configured = moment
            self.admission.configure(settings, max_ongoing_requests)
            self._deliver()

    async def stats(self) -> AdmissionStats:
        """Who waits and who holds what now."""
        return self.admission.stats()

    def tick(self) -> None:
        """Expire what has waited too long or fallen silent, and deliver what that decides."""
        self._settle()
        self.admission.tick()
        for ingress_id in [name for name in self._epochs if not self.admission.knows(name)]:
            del self._epochs[ingress_id]
            self._undelivered.pop(ingress_id, None)
        self._deliver()

    @property
    def idle(self) -> bool:
        """Whether no ingress has spoken for long."""
        return self._clock() - self._heard > IDLE_S

    def end(self) -> None:
        """What happens to an owner that nobody needs."""

    def _start(self) -> None:
        if self._ticks is None or self._ticks.done():
            self._ticks = asyncio.get_running_loop().create_task(self._tick_for_ever())

    async def _tick_for_ever(self) -> None:
        ticked = self._clock()
        while not self.idle:
            await asyncio.sleep(TICK_S)
            # Where this process was stopped, the messages that came meanwhile are read first: else
            # everybody would seem to have been silent.
            held_up = self._clock() - ticked > _HELD_UP_S
            ticked = self._clock()
            if not held_up:
                self.tick()
        self.end()

    def _hold_back(self, ingress_id: str, messages: Sequence[Message]) -> list[Message]:
        """Keep all but a `Join` for later; gives that."""
        joins: list[Message] = [message for message in messages if isinstance(message, Join)]
        if joins:
            self._held_back[ingress_id] = []  # the `Join` says it too
        elif not self.admission.knows(ingress_id):
            raise UnknownIngress(ingress_id)
        self._held_back[ingress_id] += [m for m in messages if not isinstance(m, Join)]
        return joins

    def _settle(self) -> None:
        """Once everybody had the time to join, take what was kept; the engine replicas first."""
        if not self._held_back or self._settled is None or self._clock() < self._settled:
            return
        held_back, self._held_back = self._held_back, {}
        known = {name: kept for name, kept in held_back.items() if self.admission.knows(name)}
        for first in (True, False):
            for ingress_id, kept in known.items():
                messages = [m for m in kept if isinstance(m, Seen) is first]
                answers = self.admission.take(ingress_id, messages)
                self._undelivered.setdefault(ingress_id, []).extend(answers)

    def _deliver(self) -> None:
        """Answer the polls of those for whom there is something."""
        some = self.admission.pending_ingresses() | self._undelivered.keys()
        for ingress_id in some & self._polls.keys():
            poll = self._polls.pop(ingress_id)
            if not poll.done():
                poll.set_result(self._answers_for(ingress_id))

    def _answers_for(self, ingress_id: str) -> list[Answer]:
        answers = self._undelivered.pop(ingress_id, [])
        return answers + self.admission.answers_for(ingress_id)

    def _end_poll(self, ingress_id: str) -> None:
        poll = self._polls.pop(ingress_id, None)
        if poll is not None and not poll.done():
            poll.set_result([])


class AdmissionActor(AdmissionOwner):
    """The owner as an actor of Ray's."""

    def end(self) -> None:
        # An actor ends in a call of its own; outside of one the exception would end only a task.
        ray.get_runtime_context().current_actor.leave.remote()

    async def leave(self) -> None:
        """End this process, unless somebody has come meanwhile."""
        if self.idle:
            ray.actor.exit_actor()
        self._start()


def owner_name(app_name: str) -> str:
    return f"admission:{app_name}:{WIRE_VERSION}"


def find_owner(app_name: str, settings: AdmissionSection, max_ongoing_requests: int) -> Any:
    """The handle of the application's owner, which is made where there is none. Blocks for some
    milliseconds. Ray restarts the actor when it dies, on another node if need be, with the
    settings that it was made with; `configure` brings later ones."""
    actor = ray.remote(AdmissionActor).options(
        name=owner_name(app_name),
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached",
        max_restarts=-1,
        max_task_retries=0,
        num_cpus=0,
    )
    return actor.remote(settings, max_ongoing_requests)


class OwnerChannel:
    """Implements `Channel` over the owner's actor, and keeps it to this ingress's settings."""

    def __init__(
        self, app_name: str, settings: AdmissionSection, max_ongoing_requests: int
    ) -> None:
        self._app_name = app_name
        self._max_ongoing_requests = max_ongoing_requests
        self._settings = settings
        self._since = time.monotonic()
        self._handle: Any = None
        self._finding: asyncio.Future[Any] | None = None
        self._told = False

    def configure(self, settings: AdmissionSection) -> None:
        """Settings that hold from now on; the owner gets them with the next exchange."""
        self._settings, self._since, self._told = settings, time.monotonic(), False

    async def exchange(
        self, ingress_id: str, epoch: int, messages: Sequence[Message]
    ) -> Sequence[Answer]:
        joins = any(isinstance(message, Join) for message in messages)
        return await self._call(
            lambda owner: owner.exchange.remote(ingress_id, epoch, messages),
            configure=joins or not self._told,
        )

    async def wait(self, ingress_id: str, epoch: int, timeout_s: float) -> Sequence[Answer]:
        return await self._call(lambda owner: owner.wait.remote(ingress_id, epoch, timeout_s))

    async def end_owner(self) -> None:
        """Implements `Channel`. Ray ends the process, after 5 s with SIGKILL; the next call makes
        another owner, because Ray would restart this one only once its process has ended."""
        handle, self._handle = self._handle, None
        if handle is not None:
            with contextlib.suppress(RayError, ValueError):
                await asyncio.to_thread(ray.kill, handle, no_restart=True)

    async def stats(self) -> AdmissionStats:
        """What the owner has now.

        Raises:
            OwnerLostError: it cannot be reached.
        """
        return await self._call(lambda owner: owner.stats.remote())

    async def _call(self, call: Callable[[Any], Any], configure: bool = False) -> Any:
        try:
            owner = self._handle or await self._find()
            if configure:
                self._told = True
                age_s = time.monotonic() - self._since
                owner.configure.remote(self._settings, self._max_ongoing_requests, age_s)
            return await call(owner)
        except ActorDiedError as error:  # for good: the next call makes another
            self._handle = None
            raise OwnerLostError("the owner has ended") from error
        except RayTaskError as error:
            if not isinstance(error.cause, UnknownIngress):
                log.error("the owner of admission has failed", exc_info=error)
            raise OwnerLostError("the owner refused") from error
        except RayError as error:
            raise OwnerLostError("the owner is away") from error

    async def _find(self) -> Any:
        """Make or find the owner: in a thread, because Ray asks the cluster's head for it and
        blocks, and in one at a time, because that may take long."""
        if self._finding is None:
            self._finding = asyncio.ensure_future(
                asyncio.to_thread(
                    find_owner, self._app_name, self._settings, self._max_ongoing_requests
                )
            )
        finding = self._finding
        try:
            self._handle = await asyncio.shield(finding)
        except (RayError, RuntimeError, ValueError) as error:
            log.error("the owner of admission cannot be made: %s", error)
            raise OwnerLostError("there is no owner") from error
        finally:
            if finding.done():
                self._finding = None
        return self._handle
