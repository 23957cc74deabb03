"""The engines as one: a sequence gets a place, runs there, and goes on elsewhere if that ends.

`Fleet` implements `EngineClient` over the replicas' client and an `Admission`. The stream that it
yields is one stream, whatever replicas it came from: when a replica is lost, another one gets the
prompt and the tokens so far, and goes on as if it had generated them (progress.py). A sequence is
not resumed

- when resuming is disabled,
- when it has lost more replicas than `max_attempts`: a request that takes its replicas down takes
  no more than those,
- when tokens were passed on already and the engine does not continue those of others,
- when there is no place for it within `wait_s` or before its deadline; an ingress that Serve stops
  waits a moment only, because nothing may ever come.

Its client then gets the error of the replica that it lost last. What the engine refuses, and an
error that every replica would come to (`Done.retryable` is false), is no loss.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Literal

from deepseek.errors import RequestError
from serve_app.engines.protocol import (
    Done,
    EngineClient,
    EngineInfo,
    Event,
    GenerateRequest,
    Placed,
    ReplicaStatus,
)
from serve_app.errors import ApiError, DeadlineExceeded, EngineUnavailable, Overloaded, ReplicaLost
from serve_app.routing.admission_client import Admission
from serve_app.routing.progress import Progress
from serve_app.routing.tickets import Leave, Move
from serve_app.sections import ResumeSection

log = logging.getLogger("ray.serve")

#: What became of a sequence that lost its replica: it goes on; there was no place for it in time;
#: it had lost too many; its deadline passed or its client left while it waited; or it is of a kind
#: that is not resumed.
Outcome = Literal["resumed", "no_replica", "exhausted", "late", "excluded"]

#: Seconds that a sequence waits for another place before its ingress asks whether it is stopping.
LOOK_S = 1.0


async def never() -> bool:
    """For who is not stopped by anybody else."""
    return False


class Fleet:
    """Implements `EngineClient`. `settings` may be replaced while it serves. `count` is called once
    for each replica that a sequence loses; `stopping` says whether Serve is stopping this ingress,
    and is asked when another place takes longer than `look_s` seconds."""

    def __init__(
        self,
        replicas: EngineClient,
        admission: Admission,
        settings: ResumeSection,
        count: Callable[[Outcome], None] = lambda outcome: None,
        *,
        stopping: Callable[[], Awaitable[bool]] = never,
        look_s: float = LOOK_S,
    ) -> None:
        self._replicas = replicas
        self._admission = admission
        self._count = count
        self._stopping = stopping
        self._look_s = look_s
        self.settings = settings

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """The events of one sequence that has entered; it leaves when they end."""
        sequence_id = request.request_id
        progress = Progress(request)
        failed = False
        try:
            place = await self._admission.place(sequence_id)
            while True:
                loss: Done | ApiError | None = None
                events = self._replicas.generate(progress.send(place))
                try:
                    async with aclosing(events):
                        async for event in events:
                            if isinstance(event, Placed) and event.replica_id != place:
                                self._admission.landed(sequence_id, event.replica_id)
                            if isinstance(event, Done) and event.retryable:
                                loss = event
                                break
                            yield progress.take(event)
                except ReplicaLost as error:
                    loss = error
                except Overloaded as error:
                    if place is None:
                        raise
                    loss = error  # the place that was granted is not there: ask for another
                if loss is None:
                    return
                outcome, place = await self._move(sequence_id, progress, loss)
                self._count(outcome)
                if outcome != "resumed":
                    # Where a move was asked for, that has blamed the replica.
                    failed = outcome in ("excluded", "exhausted") and _blames(loss)
                    if isinstance(loss, ApiError):
                        raise loss
                    yield progress.take(loss)
                    return
        except (ApiError, RequestError):
            raise
        except Exception:
            failed = True
            raise
        finally:
            leave = Leave(sequence_id=sequence_id, used_tokens=progress.used_tokens, failed=failed)
            self._admission.leave(leave)

    async def _move(
        self, sequence_id: str, progress: Progress, loss: Done | ApiError
    ) -> tuple[Outcome, str | None]:
        """Another place for a sequence that lost its replica, or why there is none."""
        settings, lost = self.settings, progress.replica_id or ""
        log.warning(
            "%s lost replica %s, the %d. of at most %d, after %d tokens: %s",
            sequence_id, lost or "unknown", progress.attempt, settings.max_attempts,
            progress.num_output, loss.error if isinstance(loss, Done) else loss,
        )  # fmt: skip
        progress.lose(avoid=not isinstance(loss, Overloaded))
        if not settings.enabled:
            return "excluded", None
        if progress.attempt > settings.max_attempts:
            return "exhausted", None
        move = Move(
            sequence_id=sequence_id,
            lost=lost,
            blame=_blames(loss),
            seconds_left=settings.wait_s,
        )
        try:
            if progress.num_output and not (await self.info()).continues:
                return "excluded", None
            return "resumed", await self._another_place(move)
        except asyncio.CancelledError:
            self._count("late")
            raise
        except DeadlineExceeded:
            return "late", None
        except (TimeoutError, Overloaded, EngineUnavailable):
            return "no_replica", None

    async def _another_place(self, move: Move) -> str | None:
        """Raises TimeoutError when there is none in time, and what `Admission.move` raises."""
        async with asyncio.timeout(move.seconds_left) as limit:
            look = asyncio.create_task(self._end_if_stopping(limit))
            try:
                return await self._admission.move(move)
            finally:
                look.cancel()

    async def _end_if_stopping(self, limit: asyncio.Timeout) -> None:
        await asyncio.sleep(self._look_s)
        if await self._stopping():
            limit.reschedule(asyncio.get_running_loop().time())

    async def statuses(self) -> list[ReplicaStatus]:
        return await self._replicas.statuses()

    async def info(self) -> EngineInfo:
        return await self._replicas.info()


def _blames(loss: Done | ApiError) -> bool:
    """Whether the replica failed, and did not merely stop or have no room."""
    return isinstance(loss, Done) or (isinstance(loss, ReplicaLost) and loss.blame)
