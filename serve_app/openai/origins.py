"""Which web pages may use the service: cross-origin requests (CORS).

A page that a browser loaded from elsewhere can send requests to any server that its reader can
reach, a server on the reader's own machine included. The browser names the page's origin. Here a
request of an origin that is not configured is refused, before a route sees it, also when the
browser would not have asked first; that covers a page whose name was made to point at this machine
(DNS rebinding), too. Clients other than browsers send no `Origin`.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from deepseek.text import printable
from serve_app.errors import OriginNotAllowed


class Origins:
    """ASGI application: `app` for requests of no web page and of pages of `allowed` origins."""

    def __init__(self, app: ASGIApp, allowed: Sequence[str]) -> None:
        self._app = app
        self._allowed = frozenset(allowed)
        self._cors = CORSMiddleware(
            app,
            allow_origins=allowed,
            allow_methods=("GET", "HEAD", "POST"),
            allow_headers=("*",),  # OpenAI's browser client sends a dozen of its own
            expose_headers=(
                "Retry-After",
                "X-Request-Id",
                "X-IntServe-Pool",
                "X-IntServe-Queue-Seconds",
            ),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        origins = Headers(scope=scope).getlist("origin") if scope["type"] == "http" else []
        if not origins:
            await self._app(scope, receive, send)
        elif "*" in self._allowed or (len(origins) == 1 and origins[0] in self._allowed):
            await self._cors(scope, receive, send)
        else:
            error = OriginNotAllowed(
                f"web pages of {printable(origins[0][:200])} may not use this service; the "
                "server's setting allowed_origins names those that may"
            )
            await JSONResponse(error.body(), error.status)(scope, receive, send)
