"""Bodies on their way: declared as JSON, complete in time, and with room for others. Over sockets
where the server's own reading matters."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from support.serving import client_of, make_service, metric, wait_for
from support.sockets import Raw, head, listening

from serve_app.openai.routes import make_app

TEXT = "/v1/completions"
BODY = json.dumps({"model": "echo", "prompt": "hello"}).encode()


def code(answer: httpx.Response) -> str:
    return str(answer.json()["error"]["code"])


@pytest.mark.parametrize(
    "declared",
    ["application/json", "Application/JSON", "application/json; charset=utf-8"]
    + ['application/json ;charset="UTF-8"', "application/json;charset=utf8;x=y"],
)
async def test_json_may_be_declared_in_any_case_and_with_parameters(declared: str) -> None:
    async with client_of(make_service()) as client:
        answer = await client.post(TEXT, content=BODY, headers={"content-type": declared})
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("content-type", "")],
        [("content-type", "text/plain")],
        [("content-type", "text/plain;application/json")],
        [("content-type", "application/x-www-form-urlencoded")],
        [("content-type", "multipart/form-data; boundary=x")],
        [("content-type", "application/jsonx")],
        [("content-type", "application/vnd.api+json")],
        [("content-type", "application/json, text/plain")],
        [("content-type", "application/json"), ("content-type", "text/plain")],
        [("content-type", "application/json"), ("content-type", "application/json")],
        [("content-type", "application/json; charset=latin-1")],
        [("content-type", "application/json"), ("content-encoding", "gzip")],
        [("content-type", "application/json"), ("content-encoding", "identity, br")],
    ],
)
async def test_any_other_body_is_a_415_and_is_not_read(headers: list[tuple[str, str]]) -> None:
    async def unread() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    service = make_service()
    async with client_of(service) as client:
        answer = await client.post(TEXT, content=unread(), headers=headers)
    assert (answer.status_code, code(answer)) == (415, "unsupported_media_type")
    told = service.metrics.snapshot()
    assert metric(told, "intserve_requests_total", outcome="unsupported_media_type") == 1


async def test_an_identity_encoding_is_none() -> None:
    headers = {"content-type": "application/json", "content-encoding": "identity"}
    async with client_of(make_service()) as client:
        assert (await client.post(TEXT, content=BODY, headers=headers)).status_code == 200


def test_a_body_that_does_not_come_is_given_up_and_its_connection_closed() -> None:
    service = make_service(body_timeout_s=0.2)
    with listening(make_app(service)) as port:
        with Raw(port, head(TEXT, length=len(BODY)) + BODY[:1]) as slow:
            answer = slow.answer()
            assert slow.is_closed()
        assert (answer.status, answer.headers["connection"]) == (408, "close")
        assert json.loads(answer.body)["error"]["code"] == "body_timeout"
        told = service.metrics.snapshot()
        assert metric(told, "intserve_requests_total", outcome="body_timeout") == 1
        assert metric(told, "intserve_requests_in_flight") == 0


def test_drops_of_a_body_do_not_put_the_deadline_off() -> None:
    service = make_service(body_timeout_s=0.4)
    with listening(make_app(service)) as port, Raw(port, head(TEXT, length=10_000)) as slow:
        drops = 0
        while not slow.has_answer(wait_s=0.05):
            slow.send(b" ")
            drops += 1
            assert drops < 100
        assert slow.answer().status == 408


async def test_the_request_deadline_covers_the_body() -> None:
    async def slow() -> AsyncIterator[bytes]:
        yield BODY[:1]
        await asyncio.sleep(30)

    async with client_of(make_service(timeout_s=0.1)) as client:
        headers = {"content-type": "application/json"}
        answer = await client.post(TEXT, content=slow(), headers=headers)
    assert (answer.status_code, code(answer)) == (408, "body_timeout")


def test_a_client_that_leaves_while_it_sends_is_a_disconnect_and_no_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    service = make_service()
    with listening(make_app(service)) as port:
        with Raw(port, head(TEXT, length=len(BODY)) + BODY[:9]):
            wait_for(lambda: service.bodies.num_arriving == 1)
        wait_for(lambda: service.bodies.num_arriving == 0)
        wait_for(lambda: metric(service.metrics.snapshot(), "intserve_requests_in_flight") == 0)
    told = service.metrics.snapshot()
    assert metric(told, "intserve_requests_total", outcome="disconnected") == 1
    assert metric(told, "intserve_requests_total") == 1
    assert not caplog.records


@pytest.mark.heavy
def test_a_request_that_is_sent_at_once_takes_the_place_of_a_stalled_body() -> None:
    service = make_service(max_open_bodies=3)
    with listening(make_app(service)) as port:
        stalled = [Raw(port, head(TEXT, length=len(BODY)) + BODY[:1]) for _ in range(3)]
        wait_for(lambda: service.bodies.num_arriving == 3)
        # None has been silent for long yet: a further one is refused, at once and whole.
        with Raw(port, head(TEXT, length=len(BODY)) + BODY) as early:
            refused = early.answer()
        assert (refused.status, refused.headers["connection"]) == (503, "close")
        assert int(refused.headers["retry-after"]) > 0
        assert json.loads(refused.body)["error"]["code"] == "too_many_connections"

        def asks() -> bool:
            with Raw(port, head(TEXT, length=len(BODY)) + BODY) as fast:
                return fast.answer().status == 200

        wait_for(asks)
        first = stalled[0].answer()
        assert (first.status, json.loads(first.body)["error"]["code"]) == (
            503,
            "too_many_connections",
        )
        assert service.bodies.num_arriving == 2
        stalled[1].send(BODY[1:])
        assert stalled[1].answer().status == 200, "the others may still go on"
        for connection in stalled:
            connection.close()


def test_bytes_of_unfinished_bodies_have_a_limit_over_all() -> None:
    service = make_service(max_body_bytes=40_000, max_open_body_bytes=100_000)
    with listening(make_app(service)) as port:
        held = [Raw(port, head(TEXT, length=40_000) + b" " * 35_000) for _ in range(2)]
        wait_for(lambda: service.bodies.num_bytes == 70_000)
        with Raw(port, head(TEXT, length=40_000) + b" " * 35_000) as third:
            assert third.answer().status == 503
        wait_for(lambda: service.bodies.num_bytes == 70_000)
        for connection in held:
            connection.close()
        wait_for(lambda: service.bodies.num_bytes == 0)


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (["Content-Length: 5000000"], 413),
        (["Content-Length: " + "9" * 15], 413),
        (["Content-Length: -1"], 400),
        (["Content-Length: 4x"], 400),
        (["Content-Length: 4", "Content-Length: 5"], 400),
        (["Content-Length: 4", "Transfer-Encoding: chunked"], 400),
    ],
)
def test_a_length_that_is_wrong_is_refused_without_waiting_for_a_body(
    lines: list[str], status: int
) -> None:
    with listening(make_app(make_service())) as port, Raw(port, head(TEXT, *lines)) as raw:
        assert raw.answer().status == status


def test_chunks_and_expectations_are_http() -> None:
    chunk = f"{len(BODY):x}\r\n".encode() + BODY + b"\r\n0\r\n\r\n"
    with listening(make_app(make_service(max_body_bytes=100))) as port:
        with Raw(port, head(TEXT, "Transfer-Encoding: chunked") + chunk) as raw:
            assert raw.answer().status == 200
        with Raw(port, head(TEXT, "Transfer-Encoding: chunked") + b"65\r\n" + b" " * 101) as raw:
            assert raw.answer().status == 413
        with Raw(port, head(TEXT, "Expect: 100-continue", length=len(BODY))) as raw:
            assert raw.answer().status == 100
            raw.send(BODY)
            assert raw.answer().status == 200
        with Raw(port, head(TEXT, "Expect: 100-continue", length=101)) as raw:
            assert raw.answer().status == 413, "refused before it is asked for"


async def test_a_refused_key_leaves_the_body_unread() -> None:
    async def unread() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    service = make_service(api_keys=["one"])
    async with client_of(service) as client:
        answer: Any = await client.post(TEXT, content=unread())
    assert (answer.status_code, code(answer)) == (401, "invalid_api_key")
