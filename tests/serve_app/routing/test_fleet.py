"""What becomes of a sequence that loses its replica, rule by rule, on echo engines."""

from __future__ import annotations

import asyncio

import pytest
from support.fleets import (
    GONE,
    LocalFleet,
    NotedAdmission,
    Switch,
    after,
    done_of,
    echo_fleet,
    places,
    read,
    settle,
    text_of,
)
from support.serving import make_request

from serve_app.config import EchoOptions
from serve_app.engines.protocol import (
    PromptLogprobs,
    Tokens,
)
from serve_app.errors import EngineUnavailable, ReplicaLost
from serve_app.routing.replica_client import SILENT_S

TEXT = "hello"

LOSSES: dict[str, tuple[Switch, bool]] = {
    "died": (lambda fleet, name: fleet.die(name, GONE[0]), True),
    "unavailable": (lambda fleet, name: fleet.die(name, GONE[1]), True),
    "gave up its engine": (lambda fleet, name: fleet.cut(name, EngineUnavailable("hangs")), True),
    "stopped": (lambda fleet, name: fleet.cut(name, ReplicaLost("stops", blame=False)), False),
    "failed": (lambda fleet, name: fleet.fail(name), True),
}


@pytest.mark.parametrize("num_tokens", [0, 2, 5])
@pytest.mark.parametrize("kind", LOSSES)
async def test_a_lost_replica_costs_no_token_and_the_owner_learns_of_it(
    kind: str, num_tokens: int
) -> None:
    switch, blame = LOSSES[kind]
    admission, counts = NotedAdmission("a", "b"), list[str]()
    async with echo_fleet(admission=admission, count=counts.append) as fleet:
        after(num_tokens, fleet, switch)
        request = make_request(TEXT, logprobs=0, prompt_logprobs=0)
        events = await read(fleet.fleet, request)
        assert text_of(events) == TEXT
        (move,) = admission.moves
        assert (move.lost, move.blame, move.sequence_id) == ("a", blame, "r")
        (sent,) = fleet.replicas["b"].received
        assert sent.output_ids == tuple(TEXT.encode()[:num_tokens])
        assert (sent.num_shown, sent.avoid, sent.replica_id) == (num_tokens, ("a",), "b")
    assert places(events) == [("a", 1), ("b", 2)]
    logprobs = [item for event in events if isinstance(event, Tokens) for item in event.logprobs]
    assert [item.token for item in logprobs] == list(TEXT)
    assert len([event for event in events if isinstance(event, PromptLogprobs)]) == 1
    done = done_of(events)
    assert (done.reason, done.prompt_tokens, done.completion_tokens) == ("stop", 5, 5)
    assert counts == ["resumed"]
    (leave,) = admission.leaves
    assert (leave.used_tokens, leave.failed) == (10, False)


async def test_prompt_logprobs_that_were_lost_are_asked_for_again() -> None:
    async with echo_fleet() as fleet:
        after(0, fleet, lambda fleet, name: fleet.die(name))
        events = await read(fleet.fleet, make_request(TEXT, max_tokens=0, prompt_logprobs=0))
    (scores,) = [event for event in events if isinstance(event, PromptLogprobs)]
    assert len(scores.logprobs) == len(TEXT)


async def test_a_stop_string_across_the_seam_ends_the_text_before_it() -> None:
    for at in range(9):
        async with echo_fleet() as fleet:
            after(at, fleet, lambda fleet, name: fleet.die(name))
            events = await read(fleet.fleet, make_request("one two three", stop=("e tw",)))
        assert text_of(events) == "on", at
        assert (done_of(events).reason, done_of(events).completion_tokens) == ("stop", 6), at


async def test_a_replica_that_hangs_is_left_and_what_it_says_when_it_wakes_is_ignored() -> None:
    admission = NotedAdmission("a", "b")
    async with echo_fleet(admission=admission) as fleet:
        after(2, fleet, lambda fleet, name: fleet.hang(name))
        reading = asyncio.create_task(read(fleet.fleet, make_request(TEXT)))
        await settle()
        await fleet.pass_time(SILENT_S)
        assert not reading.done()
        await fleet.pass_time(3)
        events = await reading
        assert text_of(events) == TEXT
        assert places(events) == [("a", 1), ("b", 2)]
        assert [move.blame for move in admission.moves] == [True]
        fleet.wake("a")
        await settle()
        assert fleet.replicas["a"].cancelled == ["r"]  # its KV is free
        assert fleet.replicas["a"].engine.load().running == 0
        assert len(admission.leaves) == 1


async def test_a_stream_is_left_although_its_replica_woke_between_with_an_old_list() -> None:
    """The hung replica names the sequence again when it wakes; the other one then hangs."""
    async with echo_fleet(options=EchoOptions(itl_s=0.001)) as fleet:
        hung: list[str] = []

        def hang(fleet: LocalFleet, name: str) -> None:
            hung.append(name)
            fleet.hang(name)

        after(2, fleet, hang, times=2)
        reading = asyncio.create_task(read(fleet.fleet, make_request(TEXT)))
        for _ in range(2):
            async with asyncio.timeout(5):
                while not hung:
                    await asyncio.sleep(0.001)
            name = hung.pop()
            await fleet.pass_time(SILENT_S + 2)
            fleet.wake(name)
        assert text_of(await reading) == TEXT


async def test_a_sequence_waits_for_the_only_replica_to_come_back() -> None:
    async with echo_fleet(1) as fleet:
        after(3, fleet, lambda fleet, name: fleet.die(name))
        reading = asyncio.create_task(read(fleet.fleet, make_request(TEXT)))
        await settle()
        assert not reading.done()
        await fleet.add("new", fleet.replicas["a"].engine)
        events = await reading
    assert text_of(events) == TEXT
    assert places(events) == [("a", 1), ("new", 2)]


async def test_streams_of_a_drained_replica_go_on_there_until_it_ends_them() -> None:
    async with echo_fleet(options=EchoOptions(itl_s=0.001)) as fleet:
        after(2, fleet, lambda fleet, name: fleet.drain(name))
        events = await read(fleet.fleet, make_request(TEXT))
        assert places(events) == [("a", 1)]
        later = await read(fleet.fleet, make_request(TEXT, "later"))
    assert places(later) == [("b", 1)]
