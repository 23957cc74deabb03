"""The engines as one: a sequence gets a place, runs there, and goes on elsewhere if that ends.

`Fleet` implements `EngineClient` over the replicas' client and an `Admission`. The stream that it
yields is one stream, whatever replicas it came from.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from serve_app.engines.protocol import (
    Done,
    EngineClient,
    EngineInfo,
    Event,
    GenerateRequest,
    Placed,
    ReplicaStatus,
    Tokens,
)
from serve_app.routing.admission_client import Admission
from serve_app.routing.tickets import Leave
from serve_app.sections import ResumeSection


class Fleet:
    """Implements `EngineClient`. `settings` may be replaced while it serves."""

    def __init__(self, replicas: EngineClient, admission: Admission, settings: ResumeSection):
        self._replicas = replicas
        self._admission = admission
        self.settings = settings

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """The events of one sequence that has entered; it leaves when they end."""
        sequence_id = request.request_id
        used, failed = 0, True
        try:
            place = await self._admission.place(sequence_id)
            used = len(request.prompt_ids)
            events = self._replicas.generate(replace(request, replica_id=place))
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, Placed) and event.replica_id != place:
                        self._admission.landed(sequence_id, event.replica_id)
                    elif isinstance(event, Tokens):
                        used += len(event.token_ids)
                    failed = isinstance(event, Done) and event.reason == "error"
                    yield event
        except GeneratorExit:
            failed = False
            raise
        finally:
            self._admission.leave(Leave(sequence_id=sequence_id, used_tokens=used, failed=failed))

    async def statuses(self) -> list[ReplicaStatus]:
        return await self._replicas.statuses()

    async def info(self) -> EngineInfo:
        return await self._replicas.info()
