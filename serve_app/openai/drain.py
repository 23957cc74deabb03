"""Ends the work of one ingress in order: what is in flight finishes, newcomers are sent away.

An ASGI middleware around routes.py. It sees a request before anything else does and until its last
byte is handed to the server, on the event loop that also starts the drain: a request is either
counted before the drain starts, and finishes, or comes after, and gets a 503 with `Retry-After`.
local.py drives it through the ingress deployment; it knows no Ray.
"""

from __future__ import annotations

from collections.abc import Callable

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.errors import ApiError, Draining, EngineUnavailable
from serve_app.routing.interrupt import Interrupt

#: Reads that say whether to send requests here; while draining they say no. Other reads (metrics,
#: the model card) still answer.
READINESS_PATHS = ("/health", "/ping")


class Drain:
    """What is in flight at one ingress, and whether more may come.

    `cut_streams` ends the engines' streams of this ingress with an error; later ones too.
    """

    def __init__(self, cut_streams: Callable[[ApiError], None]) -> None:
        self.started = False
        #: Requests that were accepted and whose answer is not complete.
        self.requests: set[Interrupt] = set()
        self._cut_streams = cut_streams

    @property
    def in_flight(self) -> int:
        return len(self.requests)

    def start(self) -> int:
        """Refuse newcomers from now on; says how many requests are in flight."""
        self.started = True
        return self.in_flight

    def cut(self) -> int:
        """Tell what is still in flight, in-band or by its status, that it ends here."""
        self.started = True
        error = EngineUnavailable(
            "the service is stopping and cannot finish this request; send it again"
        )
        for request in self.requests:
            request.trip(error)
        self._cut_streams(error)
        return self.in_flight


class DrainMiddleware:
    """Counts the requests of one application, and refuses them while its `Drain` is started."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        reads = scope["method"] in ("GET", "HEAD", "OPTIONS")
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if self._drain.started and not (reads and path not in READINESS_PATHS):
            refusal = Draining("the service is stopping and takes no more requests; retry later")
            answer = JSONResponse(refusal.body(), refusal.status, refusal.headers())
            await answer(scope, receive, send)
            return
        if reads:
            await self._app(scope, receive, send)
            return
        request = Interrupt()
        self._drain.requests.add(request)
        try:
            await self._app(scope, _interruptible(receive, request), send)
        finally:
            self._drain.requests.discard(request)


def _interruptible(receive: Receive, request: Interrupt) -> Receive:
    """`receive` that an interrupt ends while the body arrives. Later the server's listener for a
    disconnect waits there, which must not lose what is still to be sent."""
    complete = False

    async def receive_body() -> Message:
        nonlocal complete
        if complete:
            return await receive()
        message = await request.run(receive)
        complete = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    return receive_body
