"""What is not resumed, or not for ever, and whom the owner of admission may blame."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest
from ray.serve.exceptions import BackPressureError
from support.fleets import (
    LocalFleet,
    LocalReplica,
    LocalStream,
    NotedAdmission,
    after,
    done_of,
    echo_fleet,
    places,
    read,
    settle,
    text_of,
)
from support.serving import make_request

from deepseek.errors import RequestError
from serve_app.config import EchoOptions
from serve_app.engines.echo import EchoEngine
from serve_app.engines.protocol import (
    Done,
    EngineInfo,
    Event,
    GenerateRequest,
    Tokens,
)
from serve_app.errors import DeadlineExceeded, EngineUnavailable, Overloaded, ReplicaLost
from serve_app.routing.fleet import REFUSED_S
from serve_app.sections import ResumeSection

TEXT = "hello"


class Forgetful(EchoEngine):
    """An echo that does not continue what others said."""

    async def start(self) -> EngineInfo:
        return replace(await super().start(), continues=False)


async def unresumed(outcome: str, fleet: LocalFleet, counts: list[str]) -> list[Event]:
    """What came of the stream, which must end in the loss of its replica."""
    events: list[Event] = []
    try:
        async for event in fleet.fleet.generate(make_request(TEXT)):
            events.append(event)
    except ReplicaLost:
        pass
    else:
        pytest.fail("the stream has not ended in an error")
    assert counts[-1] == outcome
    return events


async def test_disabled_means_that_the_client_gets_the_error() -> None:
    counts: list[str] = []
    admission = NotedAdmission("a")
    async with echo_fleet(
        settings=ResumeSection(enabled=False), admission=admission, count=counts.append
    ) as fleet:
        after(2, fleet, lambda fleet, name: fleet.die(name))
        assert text_of(await unresumed("excluded", fleet, counts)) == TEXT[:2]
    assert admission.moves == []
    assert [leave.failed for leave in admission.leaves] == [True]


@pytest.mark.parametrize("num_tokens", [0, 2])
async def test_an_engine_that_continues_nothing_starts_requests_anew_only(num_tokens: int) -> None:
    counts: list[str] = []
    engines = {name: Forgetful(EchoOptions()) for name in "ab"}
    fleet = LocalFleet(engines, count=counts.append)
    await fleet.start()
    after(num_tokens, fleet, lambda fleet, name: fleet.die(name))
    if num_tokens:
        await unresumed("excluded", fleet, counts)
    else:
        assert text_of(await read(fleet.fleet, make_request(TEXT))) == TEXT


async def test_a_request_that_takes_replica_after_replica_down_takes_a_limited_number() -> None:
    counts: list[str] = []
    async with echo_fleet(8, settings=ResumeSection(max_attempts=2), count=counts.append) as fleet:
        after(1, fleet, lambda fleet, name: fleet.die(name), times=8)
        await unresumed("exhausted", fleet, counts)
        assert sum(replica.alive for replica in fleet.replicas.values()) == 5
        fleet.before_message = lambda replica, stream, event: None
        assert text_of(await read(fleet.fleet, make_request(TEXT, "other"))) == TEXT
    assert counts == ["resumed", "resumed", "exhausted"]


async def test_choices_of_one_request_share_its_attempts() -> None:
    counts: list[str] = []
    async with echo_fleet(8, settings=ResumeSection(max_attempts=2), count=counts.append) as fleet:
        after(1, fleet, lambda fleet, name: fleet.die(name), times=8)
        choices = [read(fleet.fleet, make_request(TEXT, f"poison-{i}")) for i in range(4)]
        ends = await asyncio.gather(*choices, return_exceptions=True)
        alive = sum(replica.alive for replica in fleet.replicas.values())
    assert any(isinstance(end, ReplicaLost) for end in ends)
    assert "exhausted" in counts
    assert alive >= 8 - (4 + 2)  # one for each choice, all at one time, and `max_attempts`


async def test_an_update_may_take_a_sequence_through_any_number_of_replicas() -> None:
    stops = ReplicaLost("stops", blame=False)
    async with echo_fleet(8, settings=ResumeSection(max_attempts=1)) as fleet:

        def stop(replica: LocalReplica, stream: LocalStream, event: Event) -> None:
            if stream.num_tokens > len(stream.request.output_ids):
                fleet.cut(replica.replica_id, stops)

        fleet.before_message = stop
        events = await read(fleet.fleet, make_request(TEXT))
    assert text_of(events) == TEXT
    assert len(places(events)) == 1 + len(TEXT)


@pytest.mark.parametrize(
    ("refusal", "outcome"),
    [
        (Overloaded("full"), "no_replica"),
        (EngineUnavailable("nobody decides"), "no_replica"),
        (DeadlineExceeded("too late"), "late"),
    ],
)
async def test_without_another_place_the_client_gets_the_first_error(
    refusal: Exception, outcome: str
) -> None:
    counts: list[str] = []
    async with echo_fleet(admission=NotedAdmission("a", refusal), count=counts.append) as fleet:
        after(2, fleet, lambda fleet, name: fleet.die(name))
        assert text_of(await unresumed(outcome, fleet, counts)) == TEXT[:2]


class Endless(NotedAdmission):
    """Never has another place."""

    async def move(self, move: Any) -> str | None:
        self.moves.append(move)
        await asyncio.Event().wait()
        return None


async def test_a_place_is_waited_for_only_so_long() -> None:
    counts: list[str] = []
    admission = Endless("a")
    async with echo_fleet(
        settings=ResumeSection(wait_s=0.05), admission=admission, count=counts.append
    ) as fleet:
        after(2, fleet, lambda fleet, name: fleet.die(name))
        await unresumed("no_replica", fleet, counts)
    assert len(admission.moves) == 1
    assert len(admission.leaves) == 1


async def test_nobody_waits_for_a_replica_that_will_never_come() -> None:
    looks = 0

    async def hopeless() -> bool:
        nonlocal looks
        looks += 1
        return looks == 3

    counts: list[str] = []
    async with echo_fleet(
        admission=Endless("a"), count=counts.append, hopeless=hopeless, look_s=0.01
    ) as fleet:
        after(2, fleet, lambda fleet, name: fleet.die(name))
        await unresumed("no_replica", fleet, counts)


async def test_a_request_that_ends_while_it_waits_leaves_and_is_counted() -> None:
    counts: list[str] = []
    admission = Endless("a")
    async with echo_fleet(admission=admission, count=counts.append) as fleet:
        after(2, fleet, lambda fleet, name: fleet.die(name))
        reading = asyncio.create_task(read(fleet.fleet, make_request(TEXT)))
        await settle()
        assert admission.moves
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
    assert counts == ["late"]
    assert [(leave.used_tokens, leave.failed) for leave in admission.leaves] == [
        (7, False)
    ]  # the move has blamed the replica


class Refusing(EchoEngine):
    """Raises what it is given, before the first event."""

    def __init__(self, error: Exception) -> None:
        super().__init__(EchoOptions())
        self.error = error

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        raise self.error
        yield


async def fleet_of(*engines: EchoEngine, **settings: Any) -> LocalFleet:
    fleet = LocalFleet(dict(zip("abcdefgh", engines, strict=False)), **settings)
    await fleet.start()
    return fleet


async def test_what_the_engine_refuses_is_not_tried_elsewhere_and_blames_no_replica() -> None:
    admission = NotedAdmission("a")
    fleet = await fleet_of(
        Refusing(RequestError("no")), EchoEngine(EchoOptions()), admission=admission
    )
    with pytest.raises(RequestError, match="no"):
        await read(fleet.fleet, make_request(TEXT))
    assert admission.moves == []
    assert [leave.failed for leave in admission.leaves] == [False]


async def test_an_error_that_every_replica_would_come_to_is_reported() -> None:
    class Infinite(EchoEngine):
        async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
            yield Tokens((104,), "h")
            yield Done("error", len(request.prompt_ids), 1, error="not finite")

    admission = NotedAdmission("a")
    fleet = await fleet_of(Infinite(EchoOptions()), EchoEngine(EchoOptions()), admission=admission)
    events = await read(fleet.fleet, make_request(TEXT))
    assert done_of(events).error == "not finite"
    assert admission.moves == []
    assert [leave.failed for leave in admission.leaves] == [False]


@pytest.mark.parametrize("error", [BackPressureError(1, 1), Overloaded("full")])
async def test_a_granted_place_that_is_not_there_is_asked_for_again(error: Exception) -> None:
    admission = NotedAdmission("a", "b")
    fleet = await fleet_of(Refusing(error), EchoEngine(EchoOptions()), admission=admission)
    assert text_of(await read(fleet.fleet, make_request(TEXT))) == TEXT
    assert [(move.lost, move.blame) for move in admission.moves] == [("a", False)]
    assert fleet.replicas["b"].received[0].avoid == ()  # it may have room again


async def test_a_service_that_is_full_everywhere_says_so() -> None:
    admission = NotedAdmission("a", "a", "a", "a", "a")
    fleet = await fleet_of(Refusing(Overloaded("full")), admission=admission)
    with pytest.raises(Overloaded, match="full"):
        await read(fleet.fleet, make_request(TEXT))
    assert len(admission.moves) == 3


async def test_a_replica_without_room_is_waited_for_a_moment_only() -> None:
    admission = Endless("a")
    fleet = await fleet_of(Refusing(Overloaded("full")), admission=admission)
    with pytest.raises(Overloaded, match="full"):
        await asyncio.wait_for(read(fleet.fleet, make_request(TEXT)), 20 * REFUSED_S)
    assert len(admission.moves) == 1


async def test_nothing_is_resumed_when_the_service_stops() -> None:
    async with echo_fleet(options=EchoOptions(itl_s=0.01)) as fleet:
        after(2, fleet, lambda fleet, name: fleet.client.close(EngineUnavailable("stopping")))
        with pytest.raises(EngineUnavailable, match="stopping"):
            await read(fleet.fleet, make_request(TEXT))
        assert [len(replica.received) for replica in fleet.replicas.values()] == [1, 0]


async def test_the_times_of_all_replicas_are_in_the_final_event() -> None:
    options = EchoOptions(ttft_s=0.02, itl_s=0.02)
    async with echo_fleet(options=options) as fleet:
        after(3, fleet, lambda fleet, name: fleet.die(name))
        done = done_of(await read(fleet.fleet, make_request(TEXT)))
    assert done.prefill_s >= 2 * options.ttft_s  # of both
    assert done.decode_s >= 3 * options.itl_s  # two pauses there, one here


async def test_who_leaves_blames_no_replica() -> None:
    admission = NotedAdmission("a")
    async with echo_fleet(options=EchoOptions(itl_s=10.0), admission=admission) as fleet:
        reading = asyncio.create_task(read(fleet.fleet, make_request(TEXT)))
        await settle()
        reading.cancel()
        await settle()
        assert fleet.replicas["a"].cancelled == ["r"]
    assert [leave.failed for leave in admission.leaves] == [False]


async def test_the_owner_learns_where_a_sequence_landed_that_found_no_place() -> None:
    admission = NotedAdmission("gone")
    async with echo_fleet(admission=admission) as fleet:
        await read(fleet.fleet, make_request(TEXT))
    assert admission.landings == [("r", "a")]
