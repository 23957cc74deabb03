"""The server in front of Serve: heads in time and in bounds, few slow bodies, no commands to Serve.

On uvicorn in this process, as Serve's proxy runs it.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn.config
from starlette.types import Receive, Scope, Send
from support.serving import wait_for
from support.sockets import Raw, head, listening

from serve_app import proxy_guard
from serve_app.proxy_guard import Heads, SlowBodies, cut_unread

PATH = "/v1/completions"


async def describe(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the headers it got and the length of the body that it read; /early unread."""
    length = 0
    if scope["path"] != "/early":
        while (message := await receive())["type"] == "http.request":
            length += len(message.get("body", b""))
            if not message.get("more_body"):
                break
    names = {name.decode(): value.decode("latin-1") for name, value in scope["headers"]}
    body = json.dumps({"length": length, "headers": names}).encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@contextlib.contextmanager
def guarded(app: Any, **bounds: Any) -> Iterator[tuple[int, Heads]]:
    """`app` behind uvicorn with guarded heads: its port."""
    heads = Heads(**{"timeout_s": 20.0, "max_bytes": 65_536, **bounds})
    with pytest.MonkeyPatch.context() as patch:  # the seam that `middlewares` uses
        patch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", heads.protocol())
        with listening(app) as port:
            yield port, heads


@pytest.mark.parametrize("start", [b"", b"GET", b"GET / HTTP/1.1\r\nHost: x\r\nX-A: b"])
def test_a_head_that_does_not_end_is_given_up(start: bytes) -> None:
    with guarded(describe, timeout_s=0.2) as (port, heads), Raw(port, start) as slow:
        assert slow.is_closed()
        wait_for(lambda: not heads.waiting)


def test_bytes_that_drip_in_do_not_put_the_end_off() -> None:
    with guarded(describe, timeout_s=0.3) as (port, _), Raw(port, b"GET / HTTP/1.1\r\nX: ") as slow:
        for _ in range(100):
            if slow.has_answer(wait_s=0.05):
                break
            with contextlib.suppress(ConnectionError):
                slow.send(b"x")
        assert slow.is_closed()


def test_a_head_has_a_limit_of_size() -> None:
    with guarded(describe, max_bytes=10_000) as (port, _):
        with Raw(port, head("/" + "x" * 5_000, method="GET", json=False)) as fits:
            assert fits.answer().status == 200
        with Raw(port, b"GET / HTTP/1.1\r\n") as endless, contextlib.suppress(ConnectionError):
            for _ in range(20_000):  # more than the kernel's buffers hold
                endless.send(b"X-A: " + b"x" * 990 + b"\r\n")
        assert endless.sent < 19_000_000


def test_the_time_for_a_head_is_none_for_an_answer_or_between_requests() -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0.5)
        await describe(scope, receive, send)

    with guarded(slow, timeout_s=0.2) as (port, _), Raw(port) as connection:
        for _ in range(2):
            connection.send(head(PATH, method="GET", json=False))
            assert connection.answer().status == 200


def test_the_rest_of_a_refused_body_is_no_head() -> None:
    with (
        guarded(describe, max_bytes=1000) as (port, heads),
        Raw(port, head("/early", length=50_000)) as raw,
    ):
        assert raw.answer().status == 200
        raw.send(b" " * 50_000 + head("/", method="GET", json=False))
        assert raw.answer().status == 200
        wait_for(lambda: not heads.waiting)


def test_out_of_connections_the_one_that_waited_longest_makes_room() -> None:
    with (
        guarded(describe, max_connections=3) as (port, heads),
        Raw(port, head("/early", length=10)) as busy,
    ):
        assert busy.answer().status == 200
        with Raw(port, b"GET / HT") as first:
            wait_for(lambda: len(heads.waiting) == 1)
            with Raw(port, b"GET / HT") as second:
                wait_for(lambda: len(heads.waiting) == 2)
                with Raw(port, head("/", method="GET", json=False)) as newcomer:
                    assert newcomer.answer().status == 200
                assert first.is_closed()
                second.send(b"TP/1.1\r\nHost: x\r\n\r\n")
                assert second.answer().status == 200


def test_only_so_many_slow_bodies_are_passed_on_and_quick_ones_always() -> None:
    app = SlowBodies(describe, patience_s=0.1, max_slow=2)
    with listening(app) as port:
        slow = [Raw(port, head(PATH, length=4) + b"ab") for _ in range(2)]
        wait_for(lambda: app.num_slow == 2)
        with Raw(port, head(PATH, length=4) + b"ab") as third:
            refused = third.answer()
        assert (refused.status, refused.headers["connection"]) == (503, "close")
        assert json.loads(refused.body)["error"]["code"] == "too_many_connections"
        with Raw(port, head(PATH, length=4) + b"abcd") as quick:
            assert json.loads(quick.answer().body)["length"] == 4
        with Raw(port, head("/health", method="GET", json=False)) as get:
            assert get.answer().status == 200
        slow[0].send(b"cd")
        assert json.loads(slow[0].answer().body)["length"] == 4, "nothing is lost or doubled"
        slow[1].close()
        wait_for(lambda: app.num_slow == 0)
        slow[0].close()


def test_a_slow_body_gives_its_place_back_when_it_has_arrived_and_not_after_the_answer() -> None:
    answering = asyncio.Event()

    async def hang(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        answering.set()
        await receive()  # the disconnect

    app = SlowBodies(hang, patience_s=0.05)
    with listening(app) as port, Raw(port, head(PATH, length=4) + b"ab") as slow:
        wait_for(lambda: app.num_slow == 1)
        slow.send(b"cd")
        wait_for(answering.is_set)
        assert app.num_slow == 0


def test_what_is_held_of_bodies_is_bounded() -> None:
    seen: list[int] = []

    async def note(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(len((await receive())["body"]))
        await describe(scope, receive, send)

    app = SlowBodies(note, patience_s=30.0, max_held_bytes=10_000)
    with listening(app) as port, Raw(port, head(PATH, length=50_000) + b" " * 20_000) as raw:
        wait_for(lambda: seen)  # passed on although it is not complete
        raw.send(b" " * 30_000)
        assert json.loads(raw.answer().body)["length"] == 50_000 - seen[0]


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("X-Request-Timeout-Seconds: -1", False),
        ("X-Request-Disconnect-Disabled: ?1", False),
        ("x_request_disconnect_disabled: ?1", False),
        ("Serve-Multiplexed-Model-Id: a", False),
        ("X-Request-Id: " + "x" * 129, False),
        ("X-Request-Id: a b", False),
        ("X-Request-Id: caf\xe9", False),
        ("X-Request-Id: req_01-AB.c:d", True),
        ("Authorization: Bearer one", True),
        ("X-Other: a b", True),
    ],
)
def test_a_client_gives_serve_no_commands_and_only_a_plain_request_id(
    line: str, kept: bool
) -> None:
    name = line.partition(":")[0].lower()
    with listening(SlowBodies(describe)) as port, Raw(port, head(PATH, line, length=0)) as raw:
        assert (name in json.loads(raw.answer().body)["headers"]) is kept


def test_the_name_that_serve_is_given_installs_the_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", None)
    module, _, name = proxy_guard.CALLBACK.partition(":")
    (found,) = getattr(importlib.import_module(module), name)()
    assert found.cls is SlowBodies
    made = uvicorn.Config(describe)  # as Serve makes it: the protocol is found by its name
    made.load()
    names = [kind.__name__ for kind in made.http_protocol_class.__mro__]
    assert {"ReadProtocol", "GuardedProtocol"} <= set(names)


@pytest.mark.heavy
def test_a_client_that_takes_nothing_is_cut_off_and_one_that_reads_slowly_is_not() -> None:
    """Also where the application has long handed over everything, and waits for nothing."""
    ended: list[str] = []

    async def talk(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(160):  # 10 MB, more than kernels hold
            await send({"type": "http.response.body", "body": b"x" * 65_536, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        ended.append(scope["path"])

    protocol = cut_unread(Heads(timeout_s=20.0, max_bytes=65_536).protocol(), timeout_s=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", protocol)
        with listening(talk) as port:
            silent, slow = (
                Raw(port, head(path, method="GET", json=False)) for path in ("/silent", "/slow")
            )
            with silent, slow:
                received = 0
                while received < 160 * 65_536:
                    received += len(slow.read())
                    time.sleep(0.001)
                wait_for(lambda: sorted(ended) == ["/silent", "/slow"])  # no `send` waits any more
                with pytest.raises((ConnectionError, AssertionError)):
                    [silent.read() for _ in range(160 * 65_536)]
