"""The board of replica statuses: heartbeats come in, silent replicas go."""

from __future__ import annotations

import asyncio

from serve_app.config import EchoOptions
from serve_app.engines.echo import EchoEngine
from serve_app.engines.protocol import ReplicaStatus
from serve_app.routing.replica_client import MAX_AGE_S, StatusBoard


async def test_a_replica_that_sends_no_heartbeat_is_forgotten() -> None:
    now = 100.0
    board = StatusBoard(clock=lambda: now)
    engine = EchoEngine(EchoOptions())
    info = await engine.start()
    waiting = asyncio.create_task(board.first())
    await asyncio.sleep(0)
    old, new = (
        ReplicaStatus(replica_id=name, info=info, load=engine.load(), gated=True)
        for name in ("old", "new")
    )
    board.note(old)
    assert await waiting == old
    now += MAX_AGE_S
    board.note(new)
    assert board.fresh() == [old, new]
    now += 0.1
    assert board.fresh() == [new]
