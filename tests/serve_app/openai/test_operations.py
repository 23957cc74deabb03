"""What is told to whom: health, version and metrics, with a key, from this machine, and without."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import httpx
import pytest
from support.serving import LocalEngines, make_service, metric
from support.sockets import Raw, head, listening

from deepseek import __version__
from serve_app.config import EchoOptions
from serve_app.engines.echo import EchoEngine
from serve_app.engines.protocol import LoadingReplica, LoadProgress
from serve_app.errors import EngineUnavailable
from serve_app.openai.routes import make_app
from serve_app.openai.service import Service
from serve_app.routing.keys import BURST

UP = {"status": "ok"}
DETAILS = {
    *("status", "engine_replicas", "engine", "engine_digest", "recipe", "artifact_digest"),
    *("kv_cache", "gated", "emulated"),
    *("max_model_len", "pools"),
}
KEY = {"authorization": "Bearer one"}
LOCAL, AWAY = "127.0.0.1", "192.0.2.9"


class Gone(LocalEngines):
    """No engine replica is ready."""

    async def statuses(self) -> Any:
        raise EngineUnavailable("no engine replica is ready; retry later")


class Never(Gone):
    """Nor has any been."""

    async def infos(self, *, wait: bool = True) -> Any:
        raise EngineUnavailable("no engine replica is ready; retry later")


class Emulated(LocalEngines):
    """The verdict on what is served judged an emulation of its target."""

    async def statuses(self) -> Any:
        return [replace(status, emulated=True) for status in await super().statuses()]


def client(service: Service, host: str, url: str = "http://localhost:8000") -> httpx.AsyncClient:
    """A client at an address that asks for the server by the name in `url`."""
    transport = httpx.ASGITransport(
        make_app(service), raise_app_exceptions=False, client=(host, 50_000)
    )
    return httpx.AsyncClient(transport=transport, base_url=url)


async def sees_details(
    service: Service, host: str, url: str = "http://localhost:8000", **headers: str
) -> bool:
    """Whether all three that tell details do; that they agree is checked."""
    async with client(service, host, url) as asking:
        answers = [
            await asking.get(p, headers=headers) for p in ("/health", "/version", "/metrics")
        ]
    health, version, metrics = answers
    assert health.status_code == 200
    seen = health.json() != UP
    assert set(health.json()) == (DETAILS if seen else set(UP))
    assert {version.status_code, metrics.status_code} == {200 if seen else 401}
    return seen


async def test_a_verdict_by_emulation_is_told_in_health_and_metrics() -> None:
    for engines, emulated in ((LocalEngines, False), (Emulated, True)):
        made = make_service()
        service = Service(
            made.config, made.tokenizer, engines(EchoEngine(EchoOptions())), made.telemetry
        )
        async with client(service, LOCAL) as asking:
            assert (await asking.get("/health")).json()["emulated"] is emulated
            told = (await asking.get("/metrics")).text
        assert metric(told, "intserve_engine_info", emulated=str(emulated).lower()) == 1


@pytest.mark.parametrize(
    ("access", "host", "headers", "seen"),
    [
        ("loopback", AWAY, {}, False),
        ("loopback", AWAY, KEY, True),
        ("loopback", LOCAL, {}, True),
        ("loopback", "::1", {}, True),
        ("loopback", LOCAL, {"x-forwarded-for": AWAY}, True),
        ("loopback", AWAY, {"x-forwarded-for": LOCAL}, False),
        ("key", LOCAL, {}, False),
        ("key", LOCAL, KEY, True),
        ("open", AWAY, {}, True),
    ],
)
async def test_details_are_for_those_with_a_key_and_as_configured(
    access: str, host: str, headers: dict[str, str], seen: bool
) -> None:
    service = make_service(api_keys=["one"], details_access=access)
    assert await sees_details(service, host, **headers) is seen


async def test_without_keys_everybody_sees_details() -> None:
    assert await sees_details(make_service(), AWAY)


@pytest.mark.parametrize(
    ("url", "seen"),
    [("http://127.0.0.1:8000", True), ("http://[::1]:8000", True), ("http://[::1]", True)]
    + [("http://LOCALHOST", True), ("http://evil.example:8000", False)]
    + [("http://localhost.evil.example", False), ("http://127.0.0.1.evil.example", False)],
)
async def test_a_page_whose_name_points_at_this_machine_is_not_on_it(url: str, seen: bool) -> None:
    assert await sees_details(make_service(api_keys=["one"]), LOCAL, url) is seen


async def test_behind_a_proxy_without_addresses_nobody_is_on_this_machine() -> None:
    service = make_service(api_keys=["one"])
    hidden = Service(
        service.config, service.tokenizer, service.engines, service.telemetry,
        addresses_known=False,
    )  # fmt: skip
    assert not await sees_details(hidden, LOCAL)
    assert await sees_details(hidden, LOCAL, **KEY)


async def test_health_is_no_way_to_guess_keys() -> None:
    service = make_service(api_keys=["one"])
    async with client(service, AWAY) as asking:
        for number in range(BURST):
            wrong = {"authorization": f"Bearer guess{number}"}
            answer = await asking.get("/health", headers=wrong)
            assert (answer.status_code, answer.json()) == (200, UP)
        assert (await asking.get("/health", headers=KEY)).json() == UP
        refused = await asking.get("/v1/models", headers=KEY)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_failed_keys")
    assert refused.headers["retry-after"] == "60"
    told = service.metrics.snapshot()
    assert metric(told, "intserve_refused_keys_total", reason="wrong") == BURST
    assert metric(told, "intserve_refused_keys_total", reason="limited") == 2


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/health"),
        ("HEAD", "/health"),
        ("GET", "/ping"),
        ("HEAD", "/ping"),
        ("POST", "/ping"),
    ],
)
async def test_up_and_down_are_a_status_without_a_key(method: str, path: str) -> None:
    service = make_service(api_keys=["one"])
    async with client(service, AWAY) as asking:
        up = await asking.request(method, path)
        service.engines = Gone(EchoEngine(EchoOptions()))
        down = await asking.request(method, path)
    assert (up.status_code, down.status_code, down.headers["retry-after"]) == (200, 503, "5")
    if method != "HEAD":
        assert up.json() == UP
        assert down.json()["error"]["code"] == "engine_unavailable"


async def test_a_replica_that_loads_is_told_of_and_the_ingress_is_alive() -> None:
    service = make_service(api_keys=["one"], details_access="key")
    service.engines = Gone(EchoEngine(EchoOptions()))
    service.loading.note(
        LoadingReplica(
            replica_id="r",
            progress=LoadProgress("reading", 30, 120),
            elapsed_s=10.04,
            eta_s=30.0,
            node="abc",
        )
    )
    service.loading.note(
        LoadingReplica(
            replica_id="s",
            progress=LoadProgress("starting"),
            elapsed_s=1.0,
            pool="long",
            failure="rank 3 died",
        )
    )
    async with client(service, AWAY) as asking:
        assert (await asking.get("/live")).json() == UP
        assert (await asking.head("/live")).status_code == 200
        bare = await asking.get("/health")
        assert (bare.status_code, set(bare.json())) == (503, {"error"})
        full = await asking.get("/health", headers=KEY)
        assert (full.status_code, full.headers["retry-after"]) == (503, "5")
        assert full.json()["error"]["code"] == "engine_unavailable"
        assert full.json()["load_failures"] == {"long": "rank 3 died"}
        assert full.json()["loading"] == [
            {
                "replica": "r",
                "pool": "default",
                "node": "abc",
                "phase": "reading",
                "done_bytes": 30,
                "total_bytes": 120,
                "elapsed_s": 10.0,
                "eta_s": 30.0,
            }
        ]
        told = (await asking.get("/metrics", headers=KEY)).text
    labels = {"replica": "r", "pool": "default", "phase": "reading"}
    assert metric(told, "intserve_loading_done_bytes", **labels) == 30
    assert metric(told, "intserve_loading_expected_bytes", **labels) == 120
    assert metric(told, "intserve_loading_eta_seconds", **labels) == 30
    assert metric(told, "intserve_loading_seconds", **labels) == 10.04


async def test_health_is_up_while_more_replicas_load() -> None:
    service = make_service()
    progress = LoadProgress("reading")
    service.loading.note(LoadingReplica(replica_id="r", progress=progress, elapsed_s=1.0))
    async with client(service, LOCAL) as asking:
        health = await asking.get("/health")
    assert health.status_code == 200
    assert health.json()["status"] == "ok"
    (told,) = health.json()["loading"]
    assert (told["replica"], told["done_bytes"], told["eta_s"]) == ("r", None, None)


async def test_metrics_are_told_while_no_engine_is_ready() -> None:
    service = make_service()
    service.engines = Gone(EchoEngine(EchoOptions()))
    async with client(service, LOCAL) as asking:
        assert (await asking.get("/metrics")).status_code == 200
        assert (await asking.get("/version")).json() == {"version": __version__}


async def test_a_model_card_tells_the_length_as_vllm_does_once_it_is_known() -> None:
    service = make_service(echo=EchoOptions(max_model_len=99), model_name="a/b")
    ready = service.engines
    async with client(service, AWAY) as asking:
        service.engines = Never(EchoEngine(EchoOptions()))
        early = await asking.get("/v1/models")
        assert (early.status_code, early.headers["retry-after"]) == (503, "5")
        service.engines = ready
        (card,) = (await asking.get("/v1/models")).json()["data"]
        expected = {"id": "a/b", "root": "a/b", "parent": None, "max_model_len": 99}
        assert {name: card[name] for name in expected} == expected
        assert card["pools"]["default"]["replicas"] == 1
        service.engines = Gone(EchoEngine(EchoOptions(max_model_len=99)))
        later = (await asking.get("/v1/models/a/b")).json()
        assert later["pools"]["default"]["replicas"] == 0
        assert later | {"pools": card["pools"]} == card, "known from before"


async def test_a_model_card_waits_for_an_engine_of_which_this_ingress_has_not_heard_yet() -> None:
    service = make_service()
    service.engines = Gone(EchoEngine(EchoOptions()))  # whose `info` waits, and then knows
    async with client(service, AWAY) as asking:
        (card,) = (await asking.get("/v1/models")).json()["data"]
    assert card["max_model_len"] == 4096


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/health", {"GET", "HEAD"}),
        ("DELETE", "/v1/models", {"GET"}),
        ("HEAD", "/v1/models", {"GET"}),
        ("OPTIONS", "/v1/models", {"GET"}),
        ("GET", "/v1/completions", {"POST"}),
        ("HEAD", "/v1/chat/completions", {"POST"}),
        ("OPTIONS", "/v1/chat/completions", {"POST"}),
        ("TRACE", "/metrics", {"GET"}),
    ],
)
async def test_a_method_that_is_not_there_is_a_405_that_says_which_are(
    method: str, path: str, allowed: set[str]
) -> None:
    async with client(make_service(api_keys=["one"]), AWAY) as asking:
        answer = await asking.request(method, path)
    assert answer.status_code == 405
    assert {name.strip() for name in answer.headers["allow"].split(",")} == allowed


@pytest.mark.parametrize("path", ["/" + "x" * 60_000, "/%1b[2J%0aforged%e2%80%ae", "/%ff%00"])
def test_a_refusal_repeats_a_path_bounded_and_escaped(path: str) -> None:
    service = make_service()
    with (
        listening(make_app(service)) as port,
        Raw(port, head(path, method="GET", json=False)) as raw,
    ):
        answer = raw.answer()
    assert answer.status == 404
    message = httpx.Response(404, content=answer.body).json()["error"]["message"]
    assert message.isprintable()
    assert len(message) < 600
    assert "intserve_requests_total{" not in service.metrics.snapshot()
