"""A service with two pools in one process: where requests run, and where that is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.configs import make_config
from support.fleets import LocalFleet, after
from support.local_owner import Clock, LocalOwner
from support.serving import client_of, metric

from serve_app.config import EchoOptions
from serve_app.engines.echo import EchoEngine
from serve_app.engines.protocol import EngineInfo
from serve_app.openai.service import Service
from serve_app.openai.tokenizer import ByteTokenizer
from serve_app.routing.admission_client import AdmissionClient
from serve_app.routing.admission_stats import PoolStats
from serve_app.routing.tickets import Seen
from serve_app.telemetry.tracing import Telemetry

SHORT, LONG = 64, 512
KINDS = {"s1": "standard", "s2": "standard", "l1": "long"}


class KvEcho(EchoEngine):
    """An echo that says it has KV pages."""

    def __init__(self, options: EchoOptions, kv_cache: str, kv_bytes: float) -> None:
        super().__init__(options)
        self._kv = {"kv_cache": kv_cache, "kv_bytes_per_token": kv_bytes}

    async def start(self) -> EngineInfo:
        return replace(await super().start(), **self._kv)  # type: ignore[arg-type]


def engine(pool: str) -> KvEcho:
    options = EchoOptions(max_model_len=SHORT if pool == "standard" else LONG)
    return KvEcho(options, *(("bf16", 1152.0) if pool == "standard" else ("int8", 644.0)))


class Made:
    """The service, what it runs on, and a client of it."""

    def __init__(self, service: Service, fleet: LocalFleet, owner: LocalOwner) -> None:
        self.service, self.fleet, self.owner = service, fleet, owner
        self.client = client_of(service)

    async def ask(
        self, num_prompt: int, max_tokens: int | None = 8, *, head: str = "a", **headers: str
    ) -> httpx.Response:
        body: dict[str, Any] = {"model": "echo", "prompt": head * num_prompt, "ignore_eos": True}
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        return await self.client.post("/v1/completions", json=body, headers=headers)

    def ran_in(self) -> list[str]:
        """The replicas that got requests, in order, and forget them."""
        got = [
            (request.request_id, replica.replica_id)
            for replica in self.fleet.replicas.values()
            for request in replica.received
        ]
        for replica in self.fleet.replicas.values():
            replica.received.clear()
        return [replica_id for _, replica_id in got]

    def stats(self, pool: str) -> PoolStats:
        return next(one for one in self.owner.owner.admission.stats().pools if one.pool == pool)


@asynccontextmanager
async def serving(
    replicas: Mapping[str, str] = KINDS,
    *,
    places: int = 2,
    long: dict[str, Any] | None = None,
    **settings: Any,
) -> AsyncIterator[Made]:
    """`replicas` are those that there are, with their pools."""
    config = make_config(
        echo=EchoOptions(),
        pools={
            "standard": {
                "engine": {"kind": "echo", "max_model_len": SHORT},
                "max_ongoing_requests": places,
                "spill_over": ["long"],
            },
            "long": {
                "engine": {"kind": "echo", "max_model_len": LONG},
                "max_ongoing_requests": places,
                **(long or {}),
            },
        },
        **settings,
    )
    clock = Clock()
    owner = LocalOwner(places=config.places, clock=clock)

    def seen() -> Seen:
        known = [replica for replica in fleet.replicas.values() if replica.info is not None]
        return Seen(
            statuses=tuple((replica.status(), 0.0) for replica in known if replica.alive),
            gone=tuple(replica.replica_id for replica in known if not replica.alive),
        )

    admission = AdmissionClient(owner, "i", seen, clock=clock)
    fleet = LocalFleet(
        {name: engine(pool) for name, pool in replicas.items()},
        pools=dict(replicas) | {"?": "standard", "??": "long"},
        admission=admission,
    )
    await fleet.start()
    telemetry = Telemetry(None)
    service = Service(config, ByteTokenizer(), fleet.fleet, telemetry, admission=admission)
    running = asyncio.create_task(admission.run())
    try:
        yield Made(service, fleet, owner)
    finally:
        running.cancel()
        service.close()


async def test_a_request_runs_in_the_smallest_pool_that_holds_it_with_its_completion() -> None:
    async with serving() as made:
        for num_prompt, max_tokens, expected in ((56, 8, "s1"), (57, 8, "l1"), (500, 12, "l1")):
            answer = await made.ask(num_prompt, max_tokens)
            assert answer.status_code == 200
            assert made.ran_in() == [expected]
        # Without a limit it asks for the default, cut to what the largest pool has left.
        answer = await made.ask(500, None)
        assert answer.json()["usage"]["completion_tokens"] == 12


async def test_what_no_pool_can_ever_hold_is_a_400_that_names_the_largest() -> None:
    async with serving() as made:
        for num_prompt, max_tokens in ((505, 8), (520, 1)):
            answer = await made.ask(num_prompt, max_tokens)
            assert answer.status_code == 400
            assert answer.json()["error"]["code"] == "context_length_exceeded"
            assert f"holds {LONG}" in answer.json()["error"]["message"]
        assert made.ran_in() == []


async def test_the_prompts_of_one_request_run_in_the_pool_of_the_longest() -> None:
    async with serving() as made:
        body = {"model": "echo", "prompt": ["a", "b" * 100], "max_tokens": 4}
        answer = await made.client.post("/v1/completions", json=body)
        assert answer.status_code == 200
        assert made.ran_in() == ["l1", "l1"]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_names_its_pool_and_how_long_it_waited(stream: bool) -> None:
    async with serving(places=1) as made:
        made.fleet.hang("l1")
        body = {"model": "echo", "prompt": "b" * 100, "max_tokens": 4, "stream": stream}
        running = asyncio.create_task(made.client.post("/v1/completions", json=body))
        while not made.owner.held():
            await asyncio.sleep(0.01)
        waiting = asyncio.create_task(made.client.post("/v1/completions", json=body))
        await asyncio.sleep(0.3)
        made.fleet.wake("l1")
        answers = [await running, await waiting]
        assert [answer.headers["x-intserve-pool"] for answer in answers] == ["long", "long"]
        waited = [float(answer.headers["x-intserve-queue-seconds"]) for answer in answers]
        assert waited[1] > waited[0]  # which found a place at once


async def test_a_full_pool_spills_over_into_the_one_that_it_names() -> None:
    async with serving(places=1) as made:
        for name in ("s1", "s2"):
            made.fleet.hang(name)
        running = [asyncio.create_task(made.ask(8, head=head)) for head in "ab"]
        while sum(made.owner.held().values()) < 2:
            await asyncio.sleep(0.01)
        assert (await made.ask(8, head="c")).status_code == 200
        assert made.ran_in()[-1] == "l1"
        for name in ("s1", "s2"):
            made.fleet.wake(name)
        assert {answer.status_code for answer in await asyncio.gather(*running)} == {200}


async def test_a_stream_goes_on_in_its_own_pool_and_then_where_it_may_spill_over_to() -> None:
    async with serving() as made:
        for lost, taken in (("s1", ["s1", "s2"]), ("s2", ["s2", "l1"])):
            made.service.admission.replicas_changed()  # type: ignore[attr-defined]
            while any(name in made.owner.held() for name in KINDS):
                await asyncio.sleep(0.01)
            after(4, made.fleet, lambda fleet, name, lost=lost: fleet.die(lost))  # type: ignore[misc]
            answer = await made.ask(8, 20)
            assert answer.json()["choices"][0]["text"] == "a" * 20
            assert made.ran_in() == taken
        text = (await made.client.get("/metrics")).text
        assert metric(text, "intserve_admission_queue_seconds_count", pool="standard") == 2


async def test_a_session_is_its_header_or_the_head_of_its_prompt_and_belongs_to_a_tenant() -> None:
    settings = {"affinity_head_tokens": 4, "affinity_slack": 1.0, "api_keys": ["one", "two"]}
    async with serving(**settings) as made:  # type: ignore[arg-type]

        async def digest(prompt: str, key: str = "one", **headers: str) -> str:
            await made.ask(1, head=prompt, authorization=f"Bearer {key}", **headers)
            (request,) = [q for r in made.fleet.replicas.values() for q in r.received]
            made.ran_in()
            return request.affinity

        first = await digest("abcd and more")
        assert first == await digest("abcd and other") != await digest("abce")
        assert "abcd" not in first
        assert len({first, await digest("abcd", "two"), await digest("abc")}) == 3
        named = {"x-session-id": "chat-7"}
        chat = await digest("one", **named)
        assert chat == await digest("two", **named) != first
        assert chat != await digest("one", "two", **named)
        live = made.service.live
        routing = live.routing.model_copy(update={"affinity": False})
        made.service.reconfigure(live.model_copy(update={"routing": routing}))
        assert await digest("abcd", **named) == ""


async def test_a_chat_is_known_by_its_first_question_in_every_turn() -> None:
    async with serving() as made:

        async def digest(*texts: str, system: str = "be brief", session: str = "") -> str:
            roles = ["user", "assistant"] * len(texts)
            turns = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
            messages = [{"role": "system", "content": system}, *turns]
            body = {"model": "echo", "messages": messages, "max_tokens": 1}
            headers = {"x-session-id": session} if session else {}
            answer = await made.client.post("/v1/chat/completions", json=body, headers=headers)
            assert answer.status_code == 200
            (request,) = [q for r in made.fleet.replicas.values() for q in r.received]
            made.ran_in()
            return request.affinity

        first = await digest("hi")
        assert first == await digest("hi", "hello", "and then?")
        assert first != await digest("hi there")
        assert first != await digest("hi", system="be verbose")
        assert first != await digest("hi", session="mine")


async def test_the_next_turn_of_a_chat_meets_its_replica() -> None:
    async with serving(places=8) as made:
        assert (await made.ask(8, **{"x-session-id": "a"})).status_code == 200
        (first,) = made.ran_in()
        made.fleet.hang(first)
        other = asyncio.create_task(made.ask(9, head="z"))  # now its replica is the fuller one
        while first not in made.owner.held():
            await asyncio.sleep(0.01)
        made.ran_in()
        turn = asyncio.create_task(made.ask(20, **{"x-session-id": "a"}))
        while made.owner.held().get(first) != 2:
            await asyncio.sleep(0.01)
        made.fleet.wake(first)
        assert {(await turn).status_code, (await other).status_code} == {200}


async def test_a_pool_without_replicas_holds_requests_where_its_limit_is_configured() -> None:
    chats = {name: pool for name, pool in KINDS.items() if pool == "standard"}
    async with serving(chats, long={"max_request_tokens": 300}) as made:
        waiting = asyncio.create_task(made.ask(100))
        while made.stats("long").waiting != 1:
            await asyncio.sleep(0.01)
        assert (await made.ask(8)).status_code == 200
        assert (await made.ask(300)).status_code == 400
        made.fleet.replicas["l1"] = other = type(made.fleet.replicas["s1"])(
            "l1", engine("long"), "long"
        )
        await made.fleet.start()
        made.service.admission.replicas_changed()  # type: ignore[attr-defined]
        assert (await waiting).status_code == 200
        assert len(other.received) == 1
    async with serving(chats) as made:
        answer = await made.ask(100)
        assert answer.status_code == 503
        assert "no engine of pool long has told yet" in answer.json()["error"]["message"]


async def test_the_pool_is_told_in_the_log_the_metrics_health_and_the_models(
    tmp_path: Path,
) -> None:
    log = tmp_path / "access.jsonl"
    async with serving(access_log=str(log)) as made:
        await made.ask(8, 20)
        await made.ask(100, 20)
        await made.ask(1000)
        text = (await made.client.get("/metrics")).text
        health = (await made.client.get("/health")).json()
        (card,) = (await made.client.get("/v1/models")).json()["data"]
        for pool in ("standard", "long"):
            while (found := made.stats(pool)).running:  # the word that it has ended is on its way
                await asyncio.sleep(0.01)
            assert found.ttft_p90_s is not None
            assert found.itl_p90_s is not None
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["pool"] for line in lines] == ["standard", "long", None]
    for name in ("gen_ai_server_time_to_first_token_seconds_count",
                 "gen_ai_server_time_per_output_token_seconds_count",
                 "intserve_admission_queue_seconds_count"):  # fmt: skip
        assert [metric(text, name, pool=pool) for pool in ("standard", "long")] == [1, 1]
    assert metric(text, "intserve_engine_kv_bytes_per_token", pool="long") == 644
    assert metric(text, "intserve_engine_info", pool="long", kv_cache="int8") == 1

    expected = {"replicas": 1, "max_request_tokens": LONG, "kv_cache": "int8"}
    expected |= {"kv_bytes_per_token": 644.0, "kv_tokens_used": 0}
    assert card["pools"]["long"].items() >= expected.items()
    assert card["pools"]["standard"]["replicas"] == 2
    assert card["max_model_len"] == LONG
    assert health["pools"]["long"].items() >= {**expected, "engine": "echo"}.items()
    assert health["pools"]["standard"]["spill_over"] == ["long"]
    assert health["engine_replicas"] == 3
    assert health["kv_cache"] == "bf16", "of the first pool"
