"""Clients, an `Admission` and engines in simulated time: minutes of load in a second.

An engine runs what it is given at once, each sequence at a fixed number of tokens per second,
whatever else runs: its capacity is its places. Everything that is random comes from one seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from typing import Any

from serve_app.engines.protocol import ReplicaStatus
from serve_app.routing.admission import Admission
from serve_app.routing.owner_settings import OwnerSettings
from serve_app.routing.tickets import (
    Answer,
    Ask,
    Enter,
    Grant,
    Join,
    Leave,
    Refusal,
    Seen,
    Terms,
)
from serve_app.sections import AdmissionSection
from serve_app.setting_types import POOL

#: Tokens per second of a sequence.
SPEED = 50.0


@dataclass
class Call:
    """One request of one sequence, and what became of it."""

    call_id: str
    terms: Terms
    prompt: int
    limit: int
    output: int
    arrived: float
    pools: tuple[str, ...] = (POOL,)
    session: str = ""
    granted: float | None = None
    replica_id: str | None = None
    done: float | None = None
    refusals: list[tuple[float, Refusal]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return self.prompt + self.output

    @property
    def wait(self) -> float:
        assert self.granted is not None
        return self.granted - self.arrived


class Simulation:
    """`obey`: clients come back after the Retry-After of a 429. `affinity`: the owner is told their
    sessions."""

    def __init__(
        self,
        replicas: dict[str, ReplicaStatus],
        *,
        places: int | dict[str, int] = 8,
        obey: bool = False,
        affinity: bool = True,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        self.now = 0.0
        self.random = random.Random(seed)
        self.calls: list[Call] = []
        self._statuses = replicas
        self._obey = obey
        self._affinity = affinity
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._running: dict[str, set[str]] = {name: set() for name in replicas}
        self._by_sequence: dict[str, Call] = {}
        self.admission = Admission(
            OwnerSettings(
                admission=AdmissionSection(**settings),
                places=places if isinstance(places, dict) else {POOL: places},
            ),
            lambda: self.now,
        )
        self._answers(self.admission.take("i", [Join()]))
        self._beat()
        self._tick()

    def at(self, moment: float, action: Callable[[], None]) -> None:
        self._count += 1
        heappush(self._events, (moment, self._count, action))

    def run(self, until: float) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, action = heappop(self._events)
            action()
        self.now = until

    def call(
        self,
        terms: Terms,
        prompt: int,
        output: int,
        limit: int | None = None,
        *,
        pools: tuple[str, ...] = (POOL,),
        session: str = "",
    ) -> Call:
        """Send a request now."""
        call = Call(
            f"c{len(self.calls)}",
            terms,
            prompt,
            limit or output,
            output,
            self.now,
            pools=pools,
            session=session,
        )
        self.calls.append(call)
        self._send(call)
        return call

    def load(
        self,
        terms: Terms,
        per_s: float,
        size: Callable[[random.Random], tuple[int, int]],
        start: float = 0.0,
        end: float = 1e9,
        reserve: float = 1.0,
        pools: tuple[str, ...] = (POOL,),
        sessions: Sequence[str] = ("",),
    ) -> None:
        """Poisson arrivals; `size` gives prompt and output tokens; what is asked for is `reserve`
        times the output. Each is of one of the `sessions`."""

        def arrive() -> None:
            if self.now >= end:
                return
            prompt, output = size(self.random)
            session = self.random.choice(sessions) if len(sessions) > 1 else sessions[0]
            self.call(terms, prompt, output, round(output * reserve), pools=pools, session=session)
            self.at(self.now + self.random.expovariate(per_s), arrive)

        self.at(start + self.random.expovariate(per_s), arrive)

    def served(self, name: str, start: float, end: float) -> int:
        """Tokens of a key's requests that got places in this time."""
        return sum(
            call.tokens
            for call in self.calls
            if call.terms.name == name and call.granted is not None and start <= call.granted < end
        )

    def _send(self, call: Call) -> None:
        sequence_id = f"{call.call_id}-{len(call.refusals)}"
        self._by_sequence[sequence_id] = call
        ask = Ask(
            sequence_id=sequence_id,
            prompt_tokens=call.prompt,
            output_tokens=call.limit,
            charge=call.prompt + call.limit,
            pools=call.pools,
            affinity=call.session if self._affinity else "",
        )
        enter = Enter(request_id=sequence_id, terms=call.terms, asks=(ask,), seconds_left=600.0)
        self._answers(self.admission.take("i", [enter]))

    def _answers(self, answers: list[Answer]) -> None:
        for answer in answers:
            if isinstance(answer, Grant):
                self._start(answer)
            else:
                self._refused(answer)

    def _start(self, grant: Grant) -> None:
        call, running = self._by_sequence[grant.sequence_id], self._running[grant.replica_id]
        call.granted, call.replica_id = self.now, grant.replica_id
        running.add(grant.sequence_id)

        def finish() -> None:
            running.discard(grant.sequence_id)
            call.done = self.now
            leave = Leave(sequence_id=grant.sequence_id, used_tokens=call.tokens)
            self._answers(self.admission.take("i", [leave]))

        self.at(self.now + call.output / SPEED, finish)

    def _refused(self, refusal: Refusal) -> None:
        call = self._by_sequence[refusal.sequence_ids[0]]
        call.refusals.append((self.now, refusal))
        if self._obey:
            self.at(self.now + refusal.retry_after_s, lambda: self._send(call))

    def _beat(self) -> None:
        self._answers(self.admission.take("i", [Seen(statuses=tuple(self._reports()))]))
        self.at(self.now + 1.0, self._beat)

    def _reports(self) -> list[tuple[ReplicaStatus, float]]:
        return [
            (replace(status, request_ids=tuple(self._running[name])), 0.0)
            for name, status in self._statuses.items()
        ]

    def _tick(self) -> None:
        self.admission.tick()
        self._answers(self.admission.answers_for("i"))
        self.at(self.now + 0.2, self._tick)


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
