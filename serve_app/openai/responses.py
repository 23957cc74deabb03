"""The responses of generation requests: how an answer leaves, and how its end is recorded.

Whatever happens to the connection, open choices are aborted, places are given back and the outcome
is recorded exactly once. service.py makes them; a client that does not read is ended by unread.py:
its response stays incomplete, and the server closes the connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import Response
from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from serve_app.errors import ApiError, ClientTooSlow
from serve_app.openai.stream import Answer
from serve_app.openai.unread import Unread
from serve_app.telemetry.request import Observation

T = TypeVar("T")


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves. The body must have been
    read. A server notices that by itself only while it sends.

    Raises:
        ClientDisconnect: the client has left.
    """
    scope = asyncio.timeout(None)
    left = False

    async def listen() -> None:
        nonlocal left
        try:
            while (await receive())["type"] != "http.disconnect":
                await asyncio.sleep(0)
        except Exception:
            return  # a connection that cannot be listened to; sending to it will tell
        left = True
        scope.reschedule(asyncio.get_running_loop().time())

    listener = asyncio.create_task(listen())
    try:
        async with scope:
            return await work
    except TimeoutError:
        if not left:
            raise
        raise ClientDisconnect from None
    finally:
        listener.cancel()


class EventStream(StreamingResponse):
    """Server-sent events."""

    def __init__(
        self,
        chunks: AsyncIterator[bytes],
        answer: Answer,
        observation: Observation,
        unread: Unread,
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **observation.headers}
        super().__init__(chunks, headers=headers, media_type="text/event-stream")
        self._answer = answer
        self._observation = observation
        self._unread = unread
        self._complete = False
        self._error: ApiError | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Around everything: a client that has left already ends this before the stream begins.
        try:
            await while_connected(receive, self.stream_response(send))
        except ClientDisconnect:
            pass  # the observation says it
        finally:
            self._answer.merged.close()
            self._unread.end()
            error = self._error or next(iter(self._answer.merged.errors.values()), None)
            left = not self._complete and self._error is None
            self._observation.finish(error, status=200, disconnected=left)

    async def stream_response(self, send: Send) -> None:
        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            await self._unread.begin(send, head)
            async for chunk in self.body_iterator:
                assert isinstance(chunk, bytes)
                await self._unread.send(send, chunk)
            await self._unread.send(send, b"", last=True)
        except ClientTooSlow as error:
            self._error = error
        else:
            self._complete = True


class WholeAnswer(Response):
    """One JSON object."""

    def __init__(self, text: bytes, observation: Observation, unread: Unread) -> None:
        super().__init__(text, headers=observation.headers, media_type="application/json")
        self._observation = observation
        self._unread = unread

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error: ApiError | None = None
        left = True
        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            await self._unread.begin(send, head)
            await self._unread.send(send, bytes(self.body), last=True)
            left = False
        except ClientTooSlow as slow:
            error, left = slow, False
        finally:
            self._unread.end()
            self._observation.finish(error, status=200, disconnected=left)
