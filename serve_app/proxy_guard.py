"""Guards the server that clients connect to: Serve's HTTP proxy, or the replica behind HAProxy.

Serve runs uvicorn, which waits without end for the rest of a request's head, of any size, and Serve
gives a request whose body has not arrived a place in the ingress at a cost of milliseconds. Here,
before Serve sees it:

- a connection must send a complete head in time and in bounds; when connections run out, the one
  that has waited longest for its head makes room for a new one;
- a body that is not there after a moment is slow, and of those only so many are passed on;
- a client that reads nothing of what waits for it is cut off (openai/unread.py does so sooner, and
  says it, where it can see the client);
- headers by which a client would command Serve itself are removed.

Serve calls `middlewares` in the process of each server when CALLBACK_VARIABLE names it in the
environment; local.py sets that, and so does whoever starts Ray on a cluster. openai/body.py bounds
the same bodies again, whatever server is in front.
"""

from __future__ import annotations

import asyncio
import os
import re
import resource
import socket
import sys
from collections import OrderedDict
from typing import Any

import uvicorn.config
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from serve_app.errors import TooManyConnections

CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK = "serve_app.proxy_guard:middlewares"

#: Seconds from a connection, or from the first byte of its next request, to the end of the head.
HEAD_TIMEOUT_S = 10.0
#: Bytes of a head: a long prompt stands in the body.
MAX_HEAD_BYTES = 64 * 1024
MAX_CONNECTIONS = 16_384
#: Seconds within which a body is not slow, and what is held meanwhile: of one, and of all.
PATIENCE_S = 1.0
MAX_HELD_BYTES = 1 << 20
MAX_TOTAL_HELD_BYTES = 256 << 20
#: Slow bodies that are passed on at one time.
MAX_SLOW_BODIES = 256

#: HAProxy's limit for clients that do not read, in seconds; here some more, so that whoever knows
#: the request may end it first.
CLIENT_TIMEOUT_VARIABLE = "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S"
CLIENT_TIMEOUT_S = 60.0
_LATER_S = 15.0
#: What the kernel may hold of an answer; Linux doubles it.
SEND_BUFFER_BYTES = 256 * 1024

#: Headers that tell Serve's proxy not to notice that the client has left, to wait longer for an
#: answer, or which of several models to load.
_COMMANDS = re.compile(
    rb"x[-_]request[-_]timeout[-_]seconds|x[-_]request[-_]disconnect[-_]disabled"
    rb"|serve[-_]multiplexed[-_]model[-_]id"
)
#: A request id goes into logs: another than this is replaced by one of Serve's own.
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")


class Heads:
    """The connections of one server that have not sent a whole head, the longest waiting first."""

    def __init__(
        self, *, timeout_s: float, max_bytes: int, max_connections: int | None = None
    ) -> None:
        """`max_connections` None leaves a quarter of the process's open files to others."""
        self.timeout_s = timeout_s
        self.max_bytes = max_bytes
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.max_connections = max_connections or min(MAX_CONNECTIONS, soft * 3 // 4)
        self.waiting: OrderedDict[Any, None] = OrderedDict()

    def protocol(self) -> type[asyncio.Protocol]:
        """uvicorn's protocol of a connection, guarded."""
        heads = self

        class GuardedProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
            _timer: asyncio.TimerHandle | None = None
            _head_bytes = 0

            def connection_made(self, transport: asyncio.Transport) -> None:
                super().connection_made(transport)
                self._await_head()
                if len(self.connections) > heads.max_connections:
                    next(iter(heads.waiting)).transport.abort()

            def data_received(self, data: bytes) -> None:
                before = self.cycle
                super().data_received(data)
                if self.cycle is not before:  # the head is complete
                    self._have_head()
                elif before is None or before.response_complete:
                    # A new request's head; or what is left of the body of a refused request, which
                    # may take as long, and any number of bytes.
                    self._await_head()
                    if before is None or not before.more_body:
                        self._head_bytes += len(data)
                    if self._head_bytes > heads.max_bytes and not self.transport.is_closing():
                        self.transport.abort()

            def handle_websocket_upgrade(self, *args: Any) -> None:
                self._have_head()
                super().handle_websocket_upgrade(*args)

            def connection_lost(self, exc: Exception | None) -> None:
                self._have_head()
                super().connection_lost(exc)

            def _await_head(self) -> None:
                if self._timer is None:
                    heads.waiting[self] = None
                    self._timer = self.loop.call_later(heads.timeout_s, self._give_up)

            def _have_head(self) -> None:
                if self._timer is not None:
                    self._timer.cancel()
                    self._timer = None
                    del heads.waiting[self]
                self._head_bytes = 0

            def _give_up(self) -> None:
                self.transport.abort()

        return GuardedProtocol


def cut_unread(base: type[asyncio.Protocol], *, timeout_s: float) -> type[asyncio.Protocol]:
    """uvicorn's protocol `base` of a connection, which ends when its client takes nothing for
    `timeout_s` seconds of what the server has to write."""

    class ReadProtocol(base):  # type: ignore[misc, valid-type]
        _look_timer: asyncio.TimerHandle | None = None
        _unsent = 0

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            # The kernel would hold megabytes for a client that does not read, and nobody counts
            # them; a stream of tokens needs kilobytes.
            transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES
            )

        def pause_writing(self) -> None:
            super().pause_writing()
            self._look_later()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._unsent = sys.maxsize  # it has taken some

        def timeout_keep_alive_handler(self) -> None:
            super().timeout_keep_alive_handler()
            self._look_later()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if self._look_timer is not None:
                self._look_timer.cancel()

        def _look_later(self) -> None:
            if self._look_timer is None:
                self._unsent = self.transport.get_write_buffer_size()
                self._look_timer = self.loop.call_later(timeout_s, self._look)

        def _look(self) -> None:
            self._look_timer = None
            unsent = self.transport.get_write_buffer_size()
            if unsent and unsent >= self._unsent:
                self.transport.abort()
            elif unsent:
                self._look_later()

    return ReadProtocol


class SlowBodies:
    """ASGI middleware: passes requests on whole where it can, and only so many that are not."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        patience_s: float = PATIENCE_S,
        max_slow: int = MAX_SLOW_BODIES,
        max_held_bytes: int = MAX_HELD_BYTES,
        max_total_held_bytes: int = MAX_TOTAL_HELD_BYTES,
    ) -> None:
        self._app = app
        self._patience_s = patience_s
        self._max_slow = max_slow
        self._max_held_bytes = max_held_bytes
        self._max_total_held_bytes = max_total_held_bytes
        self.num_slow = 0
        self._total_held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["headers"] = [item for item in scope["headers"] if _is_passed_on(*item)]
        if not _has_body(scope):
            await self._app(scope, receive, send)
            return
        messages = await self._hold(receive)
        if not _is_more_to_come(messages):
            await self._app(scope, _Replay(messages, receive, lambda: None), send)
        elif self.num_slow >= self._max_slow:
            error = TooManyConnections("too many requests are being sent slowly; retry later")
            await JSONResponse(error.body(), error.status, error.headers())(scope, receive, send)
        else:
            self.num_slow += 1
            replay = _Replay(messages, receive, self._arrived)
            try:
                await self._app(scope, replay, send)
            finally:
                replay.end()

    def _arrived(self) -> None:
        self.num_slow -= 1

    async def _hold(self, receive: Receive) -> list[Message]:
        """What arrives of a body within the patience, and the limits of memory."""
        messages: list[Message] = []
        held_bytes = 0
        try:
            async with asyncio.timeout(self._patience_s):
                while _is_more_to_come(messages):
                    message = await receive()
                    messages.append(message)
                    size = len(message.get("body", b""))
                    held_bytes += size
                    self._total_held_bytes += size
                    if (
                        held_bytes > self._max_held_bytes
                        or self._total_held_bytes > self._max_total_held_bytes
                    ):
                        break
        except TimeoutError:
            pass
        finally:
            self._total_held_bytes -= held_bytes
        return messages


class _Replay:
    """`receive` that gives messages again before it goes on; calls `on_end`, once, with the last
    message of the body or with `end`."""

    def __init__(self, messages: list[Message], receive: Receive, on_end: Any) -> None:
        self._messages = messages[::-1]
        self._receive = receive
        self._on_end = on_end
        self._ended = False

    async def __call__(self) -> Message:
        message = self._messages.pop() if self._messages else await self._receive()
        if not _is_more_to_come([message]):
            self.end()
        return message

    def end(self) -> None:
        if not self._ended:
            self._ended = True
            self._on_end()


def _is_more_to_come(messages: list[Message]) -> bool:
    """Whether the body goes on after these messages."""
    if not messages:
        return True
    return messages[-1]["type"] == "http.request" and bool(messages[-1].get("more_body", False))


def _has_body(scope: Scope) -> bool:
    for name, value in scope["headers"]:
        if name == b"transfer-encoding" or (name == b"content-length" and value.strip() != b"0"):
            return True
    return False


def _is_passed_on(name: bytes, value: bytes) -> bool:
    if name.lower() == b"x-request-id":
        return _REQUEST_ID.fullmatch(value) is not None
    return _COMMANDS.fullmatch(name.lower()) is None


def middlewares() -> list[Middleware]:
    """Guard the server that this process is about to start; Serve adds what is returned to it.

    Serve gives a server's protocol no place of its own: uvicorn looks it up in a table by name.
    """
    heads = Heads(timeout_s=HEAD_TIMEOUT_S, max_bytes=MAX_HEAD_BYTES)
    table: dict[str, Any] = uvicorn.config.HTTP_PROTOCOLS
    timeout_s = float(os.environ.get(CLIENT_TIMEOUT_VARIABLE) or CLIENT_TIMEOUT_S) + _LATER_S
    table["auto"] = cut_unread(heads.protocol(), timeout_s=timeout_s)
    return [Middleware(SlowBodies)]
