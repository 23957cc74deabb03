"""The board of replica statuses, and the streams of the replicas that fall silent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from support.fleets import echo_fleet, read, settle
from support.serving import LocalHandle, make_request

from serve_app.config import EchoOptions
from serve_app.engines.echo import EchoEngine
from serve_app.engines.protocol import Done, Event, GenerateRequest, Placed, ReplicaStatus, Tokens
from serve_app.errors import EngineUnavailable, ReplicaLost
from serve_app.routing.replica_client import (
    HEARTBEAT_S,
    MAX_AGE_S,
    SILENT_S,
    ReplicaClient,
    StatusBoard,
)
from serve_app.setting_types import POOL


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
    await waiting
    assert board.infos == {POOL: info}
    assert board.pool_of("old") == POOL
    assert board.pool_of("unknown") is None
    now += MAX_AGE_S
    board.note(new)
    assert board.fresh() == [old, new]
    now += 0.1
    assert board.fresh() == [new]


class SilentEngine(EchoEngine):
    """Yields one token and then nothing more, as a queued request or a stopped process does."""

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        yield Tokens((1,), "x")
        await asyncio.Event().wait()


class MuteEngine(EchoEngine):
    """Says nothing at all, as an engine whose queue is long."""

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        await asyncio.Event().wait()
        yield Tokens((1,), "x")


@pytest.mark.parametrize("named", [True, False])
async def test_streams_without_a_message_are_lost_with_the_replica_that_holds_them(
    named: bool,
) -> None:
    """`named`: whether the replica's last heartbeat came after the stream began."""
    now = 100.0
    engine = MuteEngine(EchoOptions())
    info, load = await engine.start(), engine.load()

    def beat(replica_id: str, *request_ids: str) -> None:
        board.note(
            ReplicaStatus(
                replica_id=replica_id, info=info, load=load, gated=True, request_ids=request_ids
            )
        )

    board = StatusBoard(clock=lambda: now)
    handle = LocalHandle(engine)
    client = ReplicaClient({POOL: handle}, board, clock=lambda: now)
    streams = {name: client.generate(make_request(name=name)) for name in ("on-a", "on-b")}
    beat("a")
    waits = {name: asyncio.create_task(anext(stream)) for name, stream in streams.items()}
    await asyncio.sleep(0)
    if named:
        beat("a", "on-a")
    beat("b", "on-b")
    now += SILENT_S
    client.end_lost_streams()
    beat("b", "on-b")
    now += 0.1
    await asyncio.sleep(0.01)
    assert not any(wait.done() for wait in waits.values())
    client.end_lost_streams()
    with pytest.raises(ReplicaLost, match="fallen silent"):
        await waits["on-a"]
    assert handle.cancelled == ["on-a"]
    assert not waits["on-b"].done()
    waits["on-b"].cancel()


async def test_a_stream_that_goes_quiet_is_lost_whatever_the_heartbeats_say() -> None:
    now = 100.0
    engine = SilentEngine(EchoOptions())
    board = StatusBoard(clock=lambda: now)
    client = ReplicaClient({POOL: LocalHandle(engine)}, board, clock=lambda: now)
    stream = client.generate(make_request(name="r"))
    await anext(stream)
    now += 2 * SILENT_S  # its reader was slow, and not the replica
    client.end_lost_streams()
    wait = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    now += SILENT_S
    client.end_lost_streams()
    await asyncio.sleep(0.01)
    assert not wait.done()
    now += 0.1
    client.end_lost_streams()
    with pytest.raises(ReplicaLost, match="fallen silent"):
        await wait


async def test_signs_of_life_keep_a_stream_although_no_heartbeat_arrives() -> None:
    """As in an ingress that Serve stops: it gets none any more."""
    async with echo_fleet(1, EchoOptions(ttft_s=0.05)) as fleet:
        reading = asyncio.create_task(read(fleet.fleet, make_request("quiet")))
        await settle()
        for _ in range(5):
            fleet.now += SILENT_S / 2
            for stream in fleet.replicas["a"].streams:
                stream.sign()
            await settle()
            fleet.client.end_lost_streams()
        events = await reading
    assert [event.attempt for event in events if isinstance(event, Placed)] == [1]
    assert isinstance(events[-1], Done)


async def test_an_ingress_that_gets_no_heartbeats_asks_for_them() -> None:
    noted: list[ReplicaStatus] = []

    async def note(status: ReplicaStatus) -> None:
        noted.append(status)
        if len(noted) == 3:
            fleet.board.note(status)
            asked.cancel()

    async with echo_fleet(2) as fleet:
        asked = asyncio.create_task(fleet.client.ask(note, every_s=0.01))
        fleet.die("b")
        fleet.now += 2 * HEARTBEAT_S + 0.1
        with pytest.raises(asyncio.CancelledError):
            await asked
    assert [status.replica_id for status in noted] == ["a", "a", "a"]


async def test_a_replica_that_says_goodbye_takes_no_queued_request_with_it() -> None:
    now = 100.0
    engine = SilentEngine(EchoOptions())
    info = await engine.start()
    board = StatusBoard(clock=lambda: now)
    board.note(ReplicaStatus(replica_id="a", info=info, load=engine.load(), gated=True))
    board.remove("a")
    assert board.fresh() == []
    now += SILENT_S + 1
    assert board.lost({"queued": 100.0}) == []


async def test_a_closed_client_ends_streams_and_starts_none() -> None:
    engine = SilentEngine(EchoOptions())
    client = ReplicaClient({POOL: LocalHandle(engine)}, StatusBoard())
    stream = client.generate(make_request(name="open"))
    await anext(stream)
    wait = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    client.close(EngineUnavailable("closing"))
    for ended in (wait, anext(client.generate(make_request(name="late")))):
        with pytest.raises(EngineUnavailable, match="closing"):
            await ended
