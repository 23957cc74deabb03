"""The engines as one: a sequence gets a place, runs there, and goes on elsewhere if that ends.

`Fleet` implements `EngineClient` over the replicas' client and an `Admission`. The stream that it
yields is one stream, whatever replicas it came from: when a replica is lost, another one gets the
prompt and the tokens so far, and goes on as if it had generated them (progress.py). A sequence is
not resumed

- when resuming is disabled,
- when more replicas than `max_attempts` have failed with its request, or had no room for it: a
  request that takes its replicas down takes no more than those,
- when tokens were passed on already and the engine does not continue those of others,
- when there is no place for it within `wait_s` or before its deadline; where Serve stops this
  ingress and the engines, as when the application is deleted, a moment only.

Its client then gets the error of the replica that it lost last. What the engine refuses, and an
error that every replica would come to (`Done.retryable` is false), is no loss.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Literal
from weakref import WeakValueDictionary

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
from serve_app.routing.progress import Failures, Progress
from serve_app.routing.tickets import Leave, Move
from serve_app.sections import ResumeSection

log = logging.getLogger("ray.serve")

#: What became of a sequence that lost its replica: it goes on; there was no place for it in time;
#: it had lost too many; its deadline passed or its client left while it waited; or it is of a kind
#: that is not resumed.
Outcome = Literal["resumed", "no_replica", "exhausted", "late", "excluded"]

#: Seconds to wait for another replica than one that had no room: soon the client is told.
REFUSED_S = 1.0
#: Seconds by which the owner of admission may be late in giving up a move; this side decides.
_GRACE_S = 5.0
#: Seconds between two looks whether it is of any use to wait for another place.
LOOK_S = 1.0


async def never() -> bool:
    """There is always hope."""
    return False


class Fleet:
    """Implements `EngineClient`. `settings` may be replaced while it serves. `count` is called once
    for each replica that a sequence loses; `hopeless` says that no replica will ever come, and is
    asked every `look_s` seconds while a sequence waits for another place; `pool_of` gives the pool
    of a replica, None where it is not known."""

    def __init__(
        self,
        replicas: EngineClient,
        admission: Admission,
        settings: ResumeSection,
        count: Callable[[Outcome], None] = lambda outcome: None,
        *,
        hopeless: Callable[[], Awaitable[bool]] = never,
        look_s: float = LOOK_S,
        pool_of: Callable[[str], str | None] = lambda replica_id: None,
    ) -> None:
        self._replicas = replicas
        self._admission = admission
        self._count = count
        self._hopeless = hopeless
        self._look_s = look_s
        self._pool_of = pool_of
        self._failures: WeakValueDictionary[str, Failures] = WeakValueDictionary()
        self.settings = settings

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """The events of one sequence that has entered; it leaves when they end."""
        sequence_id = request.request_id
        # The id of a sequence is that of its request, and a number.
        request_id = sequence_id.rpartition("-")[0] or sequence_id
        failures = self._failures.setdefault(request_id, Failures())
        progress = Progress(request, failures)
        failed = False
        try:
            place = await self._admission.place(sequence_id)
            while True:
                loss: Done | ApiError | None = None
                events = self._replicas.generate(progress.send(place))
                told = ""
                if place is not None:  # now: the replica's own word comes with its first tokens
                    told = self._pool_of(place) or progress.home
                    yield Placed(place, progress.attempt, told)
                try:
                    async with aclosing(events):
                        async for event in events:
                            if isinstance(event, Placed):
                                if event.replica_id != place:
                                    self._admission.landed(sequence_id, event.replica_id)
                                elif event.pool in ("", told):
                                    continue
                            if isinstance(event, Done) and event.retryable:
                                loss = event
                                break
                            yield progress.take(event)
                except ReplicaLost as error:
                    loss = error.with_traceback(None)  # which would hold this frame
                except Overloaded as error:
                    if place is None:
                        raise
                    # The place that was granted is not there: ask for another.
                    loss = error.with_traceback(None)
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
            leave = Leave(
                sequence_id=sequence_id,
                used_tokens=progress.used_tokens,
                failed=failed,
                ttft_s=progress.ttft_s,
                itl_s=progress.itl_s,
            )
            self._admission.leave(leave)

    async def _move(
        self, sequence_id: str, progress: Progress, loss: Done | ApiError
    ) -> tuple[Outcome, str | None]:
        """Another place for a sequence that lost its replica, or why there is none."""
        settings, lost = self.settings, progress.replica_id or ""
        progress.lose(failed=_blames(loss), avoid=not isinstance(loss, Overloaded))
        log.warning(
            "%s lost replica %s after %d tokens (losses that count: %d of at most %d): %s",
            sequence_id, lost or "unknown", progress.num_output, progress.num_losses,
            settings.max_attempts, loss.error if isinstance(loss, Done) else loss,
        )  # fmt: skip
        if not settings.enabled:
            return "excluded", None
        if progress.num_losses > settings.max_attempts:
            return "exhausted", None
        wait_s = settings.wait_s
        if isinstance(loss, Overloaded):
            wait_s = min(wait_s, REFUSED_S)
        move = Move(
            sequence_id=sequence_id,
            lost=lost,
            blame=_blames(loss),
            seconds_left=wait_s + _GRACE_S,
        )
        try:
            if progress.num_output and not await self._continues(progress.pools):
                return "excluded", None
            return "resumed", await self._another_place(move, wait_s)
        except asyncio.CancelledError:
            self._count("late")
            raise
        except DeadlineExceeded:
            return "late", None
        except (TimeoutError, Overloaded, EngineUnavailable):
            return "no_replica", None

    async def _continues(self, pools: tuple[str, ...]) -> bool:
        """Whether the engines of these pools go on with the tokens of others."""
        infos = await self.infos(wait=False)
        return all(infos[pool].continues for pool in pools if pool in infos)

    async def _another_place(self, move: Move, wait_s: float) -> str | None:
        """Raises TimeoutError when there is none in time, and what `Admission.move` raises."""
        async with asyncio.timeout(wait_s) as limit:
            look = asyncio.create_task(self._end_if_hopeless(limit))
            try:
                return await self._admission.move(move)
            finally:
                look.cancel()

    async def _end_if_hopeless(self, limit: asyncio.Timeout) -> None:
        await asyncio.sleep(self._look_s)
        while not await self._hopeless():
            await asyncio.sleep(self._look_s)
        limit.reschedule(asyncio.get_running_loop().time())

    async def statuses(self) -> list[ReplicaStatus]:
        return await self._replicas.statuses()

    async def infos(self, *, wait: bool = True) -> Mapping[str, EngineInfo]:
        return await self._replicas.infos(wait=wait)


def _blames(loss: Done | ApiError) -> bool:
    """Whether the replica failed, and did not merely stop or have no room."""
    return isinstance(loss, Done) or (isinstance(loss, ReplicaLost) and loss.blame)
