"""An owner of admission in this process, ingresses that talk to it, and faults on the way."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

from deepseek.engine.options import EngineLoad
from serve_app.engines.protocol import EngineInfo, ReplicaStatus
from serve_app.routing.admission import UnknownIngress
from serve_app.routing.admission_client import AdmissionClient, OwnerLostError
from serve_app.routing.owner import AdmissionOwner
from serve_app.routing.tickets import Answer, Ask, Enter, Message, Seen, Terms
from serve_app.sections import AdmissionSection

_numbers = itertools.count()


class Clock:
    """The real time, and what a test adds to it."""

    def __init__(self) -> None:
        self.added = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.added


def status(replica_id: str, *, kv_tokens: int = 100_000) -> ReplicaStatus:
    """A heartbeat of an idle replica."""
    info = EngineInfo(
        max_model_len=kv_tokens,
        kv_tokens_total=kv_tokens,
        recipe="r",
        artifact_digest="d",
        engine="echo",
    )
    load = EngineLoad(running=0, waiting=0, kv_tokens_used=0, kv_tokens_total=kv_tokens)
    return ReplicaStatus(replica_id=replica_id, info=info, load=load, gated=True)


def visit(
    name: str | None = None,
    *,
    choices: int = 1,
    key: str = "k",
    seconds: float = 60.0,
    **terms: Any,
) -> Enter:
    """A request of 10 prompt tokens and 10 of output for each choice."""
    request_id = f"r{next(_numbers)}"
    asks = tuple(
        Ask(sequence_id=f"{request_id}-{i}", prompt_tokens=10, output_tokens=10, charge=20)
        for i in range(choices)
    )
    return Enter(
        request_id=request_id, terms=Terms(name=key, **terms), asks=asks, seconds_left=seconds
    )


class LocalOwner:
    """The way to an owner in this process; implements `Channel` for any number of ingresses."""

    def __init__(self, *, places: int, clock: Clock, settle_s: float = 0.02, **settings: Any):
        self._settings = AdmissionSection(**settings)
        self._places, self._clock, self._settle_s = places, clock, settle_s
        #: The calls of `exchange`, as (ingress, messages).
        self.exchanges: list[tuple[str, Sequence[Message]]] = []
        #: Answers of the next so many calls do not arrive; the messages do.
        self.lost_answers = 0
        #: Times that an ingress has ended the owner.
        self.num_ended = 0
        self._runs = asyncio.Event()
        self._runs.set()
        self.replace()

    def replace(self) -> None:
        """The owner dies; another one takes its place, and knows nothing."""
        self.generation = object()
        self.owner = AdmissionOwner(
            self._settings, self._places, self._clock, settle_s=self._settle_s
        )

    def held(self) -> dict[str, int]:
        """Sequences that have places, by replica, as the owner knows them."""
        replicas = self.owner.admission.stats().replicas
        return {replica.replica_id: replica.held for replica in replicas if replica.held}

    def queued(self) -> int:
        """Sequences that wait, as the owner knows them."""
        stats = self.owner.admission.stats()
        return stats.moving + sum(key.sequences for key in stats.queued)

    def lose_one(self) -> None:
        """The answer of the next call does not arrive; its messages do."""
        self.lost_answers += 1

    def stop(self) -> None:
        """Like SIGSTOP: calls wait."""
        self._runs.clear()

    def resume(self) -> None:
        self._runs.set()

    async def end_owner(self) -> None:
        self.num_ended += 1
        self.replace()
        self.resume()

    async def exchange(
        self, ingress_id: str, epoch: int, messages: Sequence[Message]
    ) -> Sequence[Answer]:
        self.exchanges.append((ingress_id, messages))
        # The call is on its way and goes on when the caller gives it up, as an actor's does.
        return await self._call(lambda owner: owner.exchange(ingress_id, epoch, messages))

    async def wait(self, ingress_id: str, epoch: int, timeout_s: float) -> Sequence[Answer]:
        return await self._call(lambda owner: owner.wait(ingress_id, epoch, timeout_s))

    async def _call(
        self, call: Callable[[AdmissionOwner], Coroutine[Any, Any, list[Answer]]]
    ) -> Sequence[Answer]:
        async def arrive() -> list[Answer]:
            await asyncio.sleep(0)
            await self._runs.wait()
            return await call(self.owner)

        generation = self.generation
        task = asyncio.create_task(arrive())
        while not task.done():
            await asyncio.wait({task}, timeout=0.005)
            if self.generation is not generation:
                task.cancel()
                await asyncio.wait({task})
                raise OwnerLostError("the owner has died")
        if self.lost_answers:
            self.lost_answers -= 1
            raise OwnerLostError("the answer is lost")
        try:
            return await task
        except UnknownIngress as error:
            raise OwnerLostError("unknown") from error


@contextlib.asynccontextmanager
async def ingress(
    channel: LocalOwner, clock: Clock, name: str = "a", replicas: Sequence[str] = ("x",)
) -> AsyncIterator[AdmissionClient]:
    """One ingress that hears of these replicas; a list may change meanwhile."""
    client = AdmissionClient(
        channel,
        name,
        lambda: Seen(statuses=tuple((status(replica), 0.0) for replica in replicas)),
        clock=clock,
    )
    running = asyncio.create_task(client.run())
    try:
        yield client
    finally:
        running.cancel()
        await asyncio.wait({running})
        if not running.cancelled():
            running.result()
