"""The admission of one ingress: batching, cancellation, an owner that dies or hangs."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable

import pytest
from support.local_owner import Clock, LocalOwner, ingress, visit

from serve_app.errors import DeadlineExceeded, EngineUnavailable, Overloaded
from serve_app.routing import admission_client
from serve_app.routing.admission_client import HUNG_S, OWNER_PATIENCE_S, AdmissionClient
from serve_app.routing.tickets import Enter, Join, Landed, Leave, Move, Seen


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def owner(clock: Clock) -> LocalOwner:
    return LocalOwner(places=2, clock=clock, max_queued_requests=100)


@pytest.fixture
async def client(owner: LocalOwner, clock: Clock) -> AsyncIterator[AdmissionClient]:
    async with ingress(owner, clock) as client:
        yield client


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission_client, "RETRY_S", 0.01)
    monkeypatch.setattr(admission_client, "EXCHANGE_S", 0.2)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def enter(client: AdmissionClient, **settings: object) -> str:
    """One sequence that has a place; its id."""
    request = visit(**settings)  # type: ignore[arg-type]
    await client.enter(request)
    sequence_id = request.asks[0].sequence_id
    assert await client.place(sequence_id) is not None
    return sequence_id


def leave(client: AdmissionClient, sequence_id: str, used: int = 20) -> None:
    client.leave(Leave(sequence_id=sequence_id, used_tokens=used))


async def test_with_room_a_request_costs_one_exchange(
    client: AdmissionClient, owner: LocalOwner
) -> None:
    await enter(client)
    before = len(owner.exchanges)
    request = visit()
    await client.enter(request)
    waiting = asyncio.ensure_future(client.place(request.asks[0].sequence_id))
    await asyncio.sleep(0)
    assert waiting.done(), "the place came with the answer to `enter`"
    assert waiting.result() == "x"
    assert [m for _, ms in owner.exchanges[before:] for m in ms if not isinstance(m, Seen)] == [
        request
    ]


async def test_messages_gather_while_an_exchange_is_under_way(
    client: AdmissionClient, owner: LocalOwner
) -> None:
    await enter(client)
    before = len(owner.exchanges)
    requests = [visit() for _ in range(50)]
    await asyncio.gather(*map(client.enter, requests))
    sent = [[m for m in ms if isinstance(m, Enter)] for _, ms in owner.exchanges[before:]]
    assert sum(map(len, sent)) == 50
    assert len(sent) <= 3


async def test_leaves_wait_for_company_only_while_nobody_waits(
    client: AdmissionClient, owner: LocalOwner
) -> None:
    first, second = await enter(client), await enter(client)
    before = len(owner.exchanges)
    for sequence_id in (first, second):
        leave(client, sequence_id)
        await asyncio.sleep(0.002)
    assert not [m for _, ms in owner.exchanges[before:] for m in ms if isinstance(m, Leave)]
    await until(lambda: len(owner.exchanges) > before)
    (messages,) = [ms for _, ms in owner.exchanges[before:]]
    assert len([m for m in messages if isinstance(m, Leave)]) == 2


async def test_who_waits_gets_the_place_that_another_leaves(client: AdmissionClient) -> None:
    held = [await enter(client), await enter(client)]
    request = visit()
    await client.enter(request)
    waiting = asyncio.ensure_future(client.place(request.asks[0].sequence_id))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    leave(client, held[0])
    assert await waiting == "x"


async def test_a_refusal_has_its_code_and_its_retry_after(clock: Clock) -> None:
    owner = LocalOwner(places=1, clock=clock, max_queued_requests=0)
    async with ingress(owner, clock) as client:
        await enter(client)
        with pytest.raises(Overloaded) as refused:
            await client.enter(visit())
    assert refused.value.code == "queue_full"
    assert refused.value.retry_after_s is not None


async def test_a_refusal_that_comes_before_anybody_waits_for_the_place_is_told_all_the_same(
    clock: Clock,
) -> None:
    owner = LocalOwner(places=1, clock=clock, max_wait_s=0.1)
    async with ingress(owner, clock) as client:
        await enter(client)
        request = visit(choices=2)
        await client.enter(request)
        await until(lambda: owner.queued() == 0)
        await asyncio.sleep(0.05)
        for ask in request.asks:
            with pytest.raises(Overloaded) as refused:
                await client.place(ask.sequence_id)
            assert refused.value.code == "waited_too_long"
            leave(client, ask.sequence_id, 0)
        owner.replace()
        await until(lambda: owner.held() == {"x": 1})
        join = [m for _, ms in owner.exchanges for m in ms if isinstance(m, Join)][-1]
        assert not join.waiting
        assert sum(spent.tokens for spent in join.spent) == 20, "only of the one that runs"


async def test_a_bug_on_the_way_is_no_end(
    client: AdmissionClient, owner: LocalOwner, monkeypatch: pytest.MonkeyPatch
) -> None:
    await enter(client)
    with monkeypatch.context() as patch:
        patch.setattr(owner, "exchange", lambda *arguments: 1 / 0)
        entering = asyncio.ensure_future(client.enter(visit()))
        await asyncio.sleep(0.05)
        assert not entering.done()
    await entering
    assert owner.held() == {"x": 2}


@pytest.mark.parametrize("when", ["unsent", "sent", "queued", "placed"])
async def test_a_request_that_is_cancelled_leaves(
    client: AdmissionClient, owner: LocalOwner, when: str
) -> None:
    held = [await enter(client), *([] if when == "placed" else [await enter(client)])]
    request = visit(choices=2)

    async def whole() -> None:
        await client.enter(request)
        try:
            await client.place(request.asks[0].sequence_id)
            await client.place(request.asks[1].sequence_id)
        finally:
            for ask in request.asks:
                leave(client, ask.sequence_id)

    if when == "sent":
        owner.stop()
    task = asyncio.create_task(whole())
    await asyncio.sleep(0 if when == "unsent" else 0.05)
    task.cancel()
    await asyncio.wait({task})
    owner.resume()
    for sequence_id in held:
        leave(client, sequence_id)
    await until(lambda: owner.held() == {} and owner.queued() == 0)
    assert not client.num_waiting


async def test_a_new_owner_learns_who_holds_and_who_waits(
    client: AdmissionClient, owner: LocalOwner
) -> None:
    held = [await enter(client), await enter(client)]
    request = visit(choices=2)
    await client.enter(request)
    waiting = [asyncio.ensure_future(client.place(ask.sequence_id)) for ask in request.asks]
    owner.replace()
    newcomer = visit()
    await client.enter(newcomer)
    await until(lambda: owner.held() == {"x": 2} and owner.queued() == 3)
    assert not any(place.done() for place in waiting)
    for sequence_id in held:
        leave(client, sequence_id)
    assert await asyncio.gather(*waiting) == ["x", "x"]
    join = [m for _, ms in owner.exchanges for m in ms if isinstance(m, Join)][-1]
    assert sorted(h.ask.sequence_id for h in join.held) == sorted(held)
    waited = {enter.request_id: enter.waited_s for enter in join.waiting}
    assert waited[request.request_id] > 0


async def test_nobody_gets_a_place_that_an_ingress_holds_which_has_yet_to_join(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = LocalOwner(places=2, clock=clock, settle_s=0.2)
    async with ingress(owner, clock, "a") as first, ingress(owner, clock, "b") as second:
        held = [await enter(second), await enter(second)]
        monkeypatch.setattr(admission_client, "RETRY_S", 0.1)  # `second` is the later one
        owner.replace()
        request = visit()
        await first.enter(request)
        waiting = asyncio.ensure_future(first.place(request.asks[0].sequence_id))
        await asyncio.sleep(0.4)
        assert owner.held() == {"x": 2}
        assert not waiting.done()
        leave(second, held[0])
        assert await waiting == "x"


async def test_lost_answers_lose_no_place_and_no_request(
    client: AdmissionClient, owner: LocalOwner
) -> None:
    await enter(client)
    owner.lost_answers = 1
    await enter(client)
    assert owner.held() == {"x": 2}
    request = visit()
    await client.enter(request)
    owner.lost_answers = 3  # of the poll too
    waiting = asyncio.ensure_future(client.place(request.asks[0].sequence_id))
    other = visit()
    await client.enter(other)
    assert owner.queued() == 2
    waiting.cancel()


async def test_an_owner_that_hangs_is_waited_for_and_all_goes_on_when_it_wakes(
    client: AdmissionClient, owner: LocalOwner, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission_client, "EXCHANGE_S", 0.05)
    held = [await enter(client), await enter(client)]
    owner.stop()
    newcomer = visit()
    entering = asyncio.ensure_future(client.enter(newcomer))
    leave(client, held[0])
    await asyncio.sleep(0.3)  # several exchanges are given up
    assert not entering.done()
    owner.resume()
    await entering
    assert await client.place(newcomer.asks[0].sequence_id) == "x"
    await until(lambda: owner.held() == {"x": 2})


async def test_an_owner_that_hangs_for_long_is_ended_once_and_the_next_knows_all(
    client: AdmissionClient, owner: LocalOwner, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission_client, "EXCHANGE_S", 0.05)
    await enter(client)
    owner.stop()
    await asyncio.sleep(0.2)  # several exchanges are given up
    assert owner.num_ended == 0
    clock.added += HUNG_S
    await until(lambda: owner.num_ended == 1)
    await enter(client)
    assert owner.held() == {"x": 2}, "the one of before, too"
    assert owner.num_ended == 1


async def test_without_an_owner_newcomers_and_waiters_end_in_503_and_holders_go_on(
    client: AdmissionClient, owner: LocalOwner, clock: Clock
) -> None:
    held = [await enter(client), await enter(client)]
    queued = visit()
    await client.enter(queued)
    owner.stop()
    waiting = asyncio.ensure_future(client.place(queued.asks[0].sequence_id))
    entering = asyncio.ensure_future(client.enter(visit()))
    moving = asyncio.ensure_future(
        client.move(Move(sequence_id=held[0], lost="x", blame=True, seconds_left=60))
    )
    await asyncio.sleep(0.05)
    clock.added += OWNER_PATIENCE_S - 1
    client.end_overdue()
    await asyncio.sleep(0)
    assert not waiting.done()
    clock.added += 2
    client.end_overdue()
    for refused in (waiting, entering):
        with pytest.raises(EngineUnavailable, match="nobody decides"):
            await refused
    assert await moving is None, "what has begun goes on, anywhere"
    assert await client.place(held[1]) == "x"
    client.landed(held[0], "x")
    owner.resume()
    await until(lambda: owner.held() == {"x": 2} and owner.queued() == 0)


async def test_a_deadline_passes_also_where_nobody_decides(
    client: AdmissionClient, owner: LocalOwner, clock: Clock
) -> None:
    await enter(client)
    owner.stop()
    entering = asyncio.ensure_future(client.enter(visit(seconds=2)))
    await asyncio.sleep(0.01)
    clock.added += 3
    client.end_overdue()
    with pytest.raises(DeadlineExceeded):
        await entering


async def test_what_a_key_spent_in_the_last_minute_is_told_to_a_new_owner(
    client: AdmissionClient, owner: LocalOwner, clock: Clock
) -> None:
    for used in (5, 20, 0):
        sequence_id = await enter(client, key="rich")
        leave(client, sequence_id, used)
    clock.added += 30
    held = await enter(client, key="rich")
    owner.replace()
    await until(lambda: owner.held() == {"x": 1})
    spent = [m for _, ms in owner.exchanges for m in ms if isinstance(m, Join)][-1].spent
    assert [(s.terms.name, s.requests, s.tokens) for s in spent] == [
        ("rich", 3, 25),
        ("rich", 1, 20),
    ]
    assert spent[0].age_s >= 30 > spent[1].age_s
    leave(client, held)
    clock.added += 40
    client._lose(client._epoch, TimeoutError())
    await until(client._joined.is_set)
    spent = [m for _, ms in owner.exchanges for m in ms if isinstance(m, Join)][-1].spent
    assert [(s.requests, s.tokens) for s in spent] == [(1, 20)]


async def test_a_move_prefers_another_replica_and_a_landing_elsewhere_is_told(
    owner: LocalOwner, clock: Clock
) -> None:
    async with ingress(owner, clock, replicas=["x", "y"]) as client:
        sequence_id = await enter(client)
        lost = await client.place(sequence_id)
        assert lost is not None
        other = await client.move(
            Move(sequence_id=sequence_id, lost=lost, blame=True, seconds_left=60)
        )
        assert {lost, other} == {"x", "y"}
        client.landed(sequence_id, lost)
        await until(lambda: owner.held() == {lost: 1})
        assert [m for _, ms in owner.exchanges for m in ms if isinstance(m, Landed)]


async def test_a_replica_that_comes_is_told_at_once_and_all_of_them_every_second(
    owner: LocalOwner, clock: Clock
) -> None:
    replicas = ["x"]
    async with ingress(owner, clock, replicas=replicas) as client:
        await until(lambda: len(owner.exchanges) == 1)
        request = visit(choices=3)
        await client.enter(request)
        third = asyncio.ensure_future(client.place(request.asks[2].sequence_id))
        await asyncio.sleep(0.05)
        assert not third.done()
        replicas.append("y")
        client.replicas_changed()
        assert await third == "y"
        before = len(owner.exchanges)
        clock.added += 1.0
        await until(lambda: len(owner.exchanges) > before)


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_happens_the_owner_holds_what_the_ingresses_hold(
    clock: Clock, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests come, go and are cancelled at any point, while owners die, hang and lose answers."""
    monkeypatch.setattr(admission_client, "EXCHANGE_S", 0.1)
    rng = random.Random(seed)
    owner = LocalOwner(places=3, clock=clock, max_queued_requests=8)
    answered = refused = 0

    async def run(client: AdmissionClient, sequence_id: str) -> None:
        try:
            lost = await client.place(sequence_id)
            if rng.random() < 0.2:
                await client.move(
                    Move(sequence_id=sequence_id, lost=lost or "", blame=False, seconds_left=60)
                )
            await asyncio.sleep(rng.random() * 0.02)
        finally:
            leave(client, sequence_id, rng.randrange(20))

    async def live(client: AdmissionClient) -> None:
        nonlocal answered, refused
        request = visit(choices=rng.choice([1, 1, 3]), key=rng.choice("kl"))
        await asyncio.sleep(rng.random())
        try:
            await client.enter(request)
            await asyncio.gather(*(run(client, ask.sequence_id) for ask in request.asks))
            answered += 1
        except Overloaded:
            refused += 1

    async with (
        ingress(owner, clock, "a", ["x", "y"]) as a,
        ingress(owner, clock, "b", ["x", "y"]) as b,
    ):
        tasks = [asyncio.create_task(live(rng.choice([a, b]))) for _ in range(60)]
        for _ in range(25):
            fault = rng.choice([owner.replace, owner.lose_one, owner.stop, owner.resume, None])
            if fault is not None:
                fault()
            elif any(not task.done() for task in tasks):
                rng.choice([task for task in tasks if not task.done()]).cancel()
            await asyncio.sleep(rng.random() * 0.06)
            if rng.random() < 0.5:
                owner.resume()
        owner.resume()
        async with asyncio.timeout(60):
            await asyncio.gather(*tasks, return_exceptions=True)
        failures = [task.exception() for task in tasks if not task.cancelled() and task.exception()]
        assert not failures
        assert answered > 10
        await until(lambda: owner.held() == {} and owner.queued() == 0)
        assert not a.num_waiting
        assert not b.num_waiting
        for client in (a, b):
            assert await enter(client)
