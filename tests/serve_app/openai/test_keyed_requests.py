"""What a key means for its requests: the models that it may use, its cache salt, and that nothing
which the service tells or records shows a key."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from support.serving import client_of, make_service, metric

from serve_app.config import EchoOptions
from serve_app.engines.echo import EchoEngine
from serve_app.engines.protocol import Event, GenerateRequest
from serve_app.key_forms import key_digest
from serve_app.openai.service import Service
from serve_app.routing.tenants import ANYONE
from serve_app.sections import KeysSection
from serve_app.telemetry.tracing import Telemetry

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
KEYS = """
keys:
  - {name: all, key: sk-all}
  - {name: echo-only, key: sk-echo, models: [echo, large]}
  - {name: another, key: sk-other, models: [large]}
"""


class Recorder(EchoEngine):
    """An echo that keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(EchoOptions())
        self.requests: list[GenerateRequest] = []

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        return super().generate(request)


def keyed(tmp_path: Path, text: str = KEYS, **settings: Any) -> Service:
    path = tmp_path / "keys"
    path.touch(0o600)
    path.write_text(text)
    return make_service(keys=KeysSection(file=path), **settings)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def error_of(answer: httpx.Response) -> tuple[int, str, str]:
    error = answer.json()["error"]
    return answer.status_code, error["type"], error["code"]


NOT_ALLOWED = (403, "permission_error", "model_not_allowed")
NOT_FOUND = (404, "not_found_error", "model_not_found")


@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize", "/detokenize"])
async def test_a_key_that_may_not_use_the_model_gets_a_403(path: str, tmp_path: Path) -> None:
    body: dict[str, Any] = {"prompt": "hi"}
    if path == CHAT:
        body = {"messages": [{"role": "user", "content": "hi"}]}
    if path == "/detokenize":
        body = {"tokens": [104]}
    service = keyed(tmp_path)
    async with client_of(service) as client:

        async def ask(key: str, model: str | None) -> httpx.Response:
            return await client.post(path, json=body | {"model": model}, headers=bearer(key))

        for key in ("sk-all", "sk-echo"):
            for model in ("echo", None, ""):
                assert (await ask(key, model)).status_code == 200
        for model in ("echo", None, ""):
            answer = await ask("sk-other", model)
            assert error_of(answer) == NOT_ALLOWED, "the model that is served when none is named"
            assert "echo" not in answer.text, "it is told of no model that it may not use"
            assert answer.json()["error"]["param"] == "model"
        assert error_of(await ask("sk-echo", "small")) == NOT_ALLOWED
        assert error_of(await ask("sk-echo", "large")) == NOT_FOUND
        assert "use 'echo'" in (await ask("sk-echo", "large")).text
        assert error_of(await ask("sk-all", "small")) == NOT_FOUND
        told = await ask("sk-other", "large")
        assert error_of(told) == NOT_FOUND
        assert "echo" not in told.text
    assert metric(service.metrics.snapshot(), "intserve_requests_in_flight") == 0


async def test_the_list_of_models_shows_what_the_key_may_use(tmp_path: Path) -> None:
    async with client_of(keyed(tmp_path)) as client:
        for key, names in (("sk-all", ["echo"]), ("sk-echo", ["echo"]), ("sk-other", [])):
            listed = (await client.get("/v1/models", headers=bearer(key))).json()
            assert [card["id"] for card in listed["data"]] == names
            card = await client.get("/v1/models/echo", headers=bearer(key))
            assert (card.status_code == 200) is bool(names)
        assert error_of(await client.get("/v1/models/echo", headers=bearer("sk-other"))) == (
            NOT_ALLOWED
        )
        answer = await client.get("/v1/models/large", headers=bearer("sk-echo"))
        assert error_of(answer) == NOT_FOUND


async def test_requests_share_a_salt_where_key_and_own_salt_are_equal(tmp_path: Path) -> None:
    engine = Recorder()
    service = keyed(tmp_path, engine=engine)
    asked = [("sk-all", None), ("sk-all", "u1"), ("sk-all", "u2"), ("sk-echo", None),
             ("sk-echo", "u1"), ("sk-all", "u1")]  # fmt: skip
    async with client_of(service) as client:
        for key, own in asked:
            body = {"prompt": ["a", "b"], "max_tokens": 1, "cache_salt": own}
            answer = await client.post(TEXT, json=body, headers=bearer(key))
            assert answer.status_code == 200
    salts = [request.cache_salt for request in engine.requests]
    assert salts[::2] == salts[1::2], "all sequences of a request have one"
    assert len(set(salts)) == 5
    assert salts[10] == salts[2]


async def test_without_keys_everybody_shares_a_salt_unless_they_give_their_own() -> None:
    engine = Recorder()
    async with client_of(make_service(engine)) as client:
        for own in (None, "u1", None):
            body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
            assert (await client.post(CHAT, json=body | {"cache_salt": own})).status_code == 200
    assert [request.cache_salt for request in engine.requests] == [
        *(ANYONE.cache_salt(), ANYONE.cache_salt("u1"), ANYONE.cache_salt()),
    ]


@pytest.mark.parametrize("salt", ["", 1, True, ["a"], {"a": 1}, "x" * 16385])
async def test_a_salt_that_is_none_is_a_400_that_names_it(salt: Any) -> None:
    async with client_of(make_service()) as client:
        answer = await client.post(TEXT, json={"prompt": "a", "cache_salt": salt})
    assert error_of(answer) == (400, "invalid_request_error", "invalid_value")
    assert answer.json()["error"]["param"] == "cache_salt"


@pytest.mark.heavy
async def test_keys_that_change_while_it_serves_count_from_the_next_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = keyed(tmp_path, text="sk-old\n")
    path = service.config.keys.file
    assert path is not None
    task = service.watch_keys()
    assert task is not None
    async with client_of(service) as client:

        async def status(key: str) -> int:
            return (await client.get("/v1/models", headers=bearer(key))).status_code

        async def until(key: str, expected: int) -> None:
            async with asyncio.timeout(20):
                while await status(key) != expected:
                    await asyncio.sleep(0.05)

        def failed() -> float:
            return metric(service.metrics.snapshot(), "intserve_key_reload_failed")

        assert await status("sk-old") == 200
        path.write_text("keys: [{name: a, key: sk-new}]\n")
        await until("sk-new", 200)
        assert await status("sk-old") == 401
        assert failed() == 0
        path.write_text("keys: [sk-secret]\n")
        async with asyncio.timeout(20):
            while not failed():
                await asyncio.sleep(0.05)
        assert await status("sk-new") == 200
    task.cancel()
    assert "sk-" not in caplog.text


async def test_a_service_without_a_key_file_watches_none() -> None:
    assert make_service().watch_keys() is None
    assert make_service(api_keys=("one",)).watch_keys() is None


async def test_nothing_that_is_told_or_recorded_shows_a_key_or_its_digest(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger="ray.serve")
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    service = keyed(tmp_path, telemetry=Telemetry(provider))
    told: list[str] = []
    async with client_of(service) as client:
        for key in ("sk-all", "sk-echo", "sk-other", "sk-wrong-one"):
            for body in ({"prompt": "hi"}, {"prompt": "hi", "model": "x"}, {"prompt": 1}):
                answer = await client.post(TEXT, json=body, headers=bearer(key))
                told += [answer.text, repr(answer.headers)]
    spans = exporter.get_finished_spans()
    assert spans
    told += [span.to_json() for span in spans]
    told += [service.metrics.snapshot(), caplog.text, repr(service.config), repr(service.keys)]
    told += [repr(service.keys.tenants), str(service.config.model_dump(mode="json"))]
    for key in ("sk-all", "sk-echo", "sk-other", "sk-wrong-one"):
        digest = key_digest(key)
        for secret in (key, digest.hex(), repr(digest)[2:-1]):
            assert not [text for text in told if secret in text]
