"""Reads the body of a request: JSON only, bounded in size and in time, and with others in memory.

A body that never ends costs a place in Serve, whose ingress holds a fixed number of requests. So
each must arrive whole in time, and only so many may arrive at once. When there is no room for a
further one, the body that has been silent longest makes room: a request that is sent at once finds
a place, whatever number of slow ones hold theirs. service.py reads every body through `BodyReader`.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict

from fastapi import Request

from serve_app.errors import BodyTimeout, BodyTooLarge, TooManyConnections, UnsupportedMediaType

#: Seconds without a byte after which a body may be given up for another.
STALLED_S = 1.0


class _Arriving:
    """A body that is being read. `silent_since` is on the loop's clock."""

    def __init__(self, timeout: asyncio.Timeout, now: float) -> None:
        self.timeout = timeout
        self.silent_since = now
        self.num_bytes = 0
        self.given_up = False


class BodyReader:
    """The bodies that are arriving at this ingress: at most `max_bodies`, of which at most
    `max_total_bytes` have arrived. Each has at most `max_body_bytes`, and `timeout_s` seconds."""

    def __init__(
        self, *, max_body_bytes: int, timeout_s: float, max_bodies: int, max_total_bytes: int
    ) -> None:
        self._max_body_bytes = max_body_bytes
        self._timeout_s = timeout_s
        self._max_bodies = max_bodies
        self._max_total_bytes = max_total_bytes
        #: The one that has been silent longest first.
        self._arriving: OrderedDict[_Arriving, None] = OrderedDict()
        #: What has arrived of them.
        self.num_bytes = 0

    @property
    def num_arriving(self) -> int:
        return len(self._arriving)

    async def read(self, request: Request, *, arrived: float, deadline: float) -> bytes:
        """The body of a request that arrived at `arrived` and ends at `deadline`, both on the
        running loop's clock.

        Raises:
            UnsupportedMediaType: it is not plain JSON; nothing is read.
            BodyTooLarge: as soon as that is known.
            BodyTimeout: it is not there in time.
            TooManyConnections: there is no room, or it was given up for another.
            ClientDisconnect: Starlette's; the client has left.
        """
        check_media_type(request)
        too_large = BodyTooLarge(
            f"the body is over the limit of {self._max_body_bytes} bytes; shorten the request"
        )
        announced = request.headers.get("content-length", "")
        # Compared by its length first: int() refuses a number of over 4300 digits.
        if announced.isdecimal() and (len(announced) > 18 or int(announced) > self._max_body_bytes):
            raise too_large
        loop = asyncio.get_running_loop()
        self._make_room(loop.time(), num_bodies=1)
        timeout = asyncio.timeout_at(min(arrived + self._timeout_s, deadline))
        mine = _Arriving(timeout, loop.time())
        self._arriving[mine] = None
        body = bytearray()
        try:
            async with timeout:
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > self._max_body_bytes:
                        raise too_large
                    self._note(mine, len(chunk), loop.time())
        except TimeoutError:
            if mine.given_up:
                raise TooManyConnections(
                    "too many requests are being sent at once, and the body of this one did not "
                    "arrive; retry later"
                ) from None
            raise BodyTimeout(
                f"the body did not arrive whole within {loop.time() - arrived:.0f} s; send the "
                "request again"
            ) from None
        finally:
            self._leave(mine)
        return bytes(body)

    def _note(self, mine: _Arriving, num_bytes: int, now: float) -> None:
        """Account for bytes that have arrived."""
        if num_bytes and not mine.given_up:
            mine.silent_since = now
            self._arriving.move_to_end(mine)
            self._make_room(now, num_bytes=num_bytes)
            mine.num_bytes += num_bytes
            self.num_bytes += num_bytes

    def _make_room(self, now: float, *, num_bodies: int = 0, num_bytes: int = 0) -> None:
        """Give up bodies that have stalled until there is room. Raises TooManyConnections."""
        while (
            len(self._arriving) + num_bodies > self._max_bodies
            or self.num_bytes + num_bytes > self._max_total_bytes
        ):
            slowest = next(iter(self._arriving), None)
            if slowest is None or now - slowest.silent_since < STALLED_S:
                raise TooManyConnections("too many requests are being sent at once; retry later")
            slowest.given_up = True
            slowest.timeout.reschedule(now)  # its reader wakes up and refuses it
            self._leave(slowest)

    def _leave(self, body: _Arriving) -> None:
        if body in self._arriving:
            del self._arriving[body]
            self.num_bytes -= body.num_bytes


def check_media_type(request: Request) -> None:
    """Raises UnsupportedMediaType unless the body is declared as plain JSON in UTF-8.

    A web page can send any other type to a server on its reader's machine without asking that
    server first; `application/json` makes the browser ask (origins.py).
    """
    declared = request.headers.getlist("content-type")
    media_type, *parameters = [part.strip() for part in ";".join(declared[:1]).lower().split(";")]
    if len(declared) != 1 or media_type != "application/json":
        raise UnsupportedMediaType(
            "the body must be JSON and say so in one header: Content-Type: application/json"
        )
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        charset = value.strip().strip('"')
        if name.strip() == "charset" and charset not in ("utf-8", "utf8", "us-ascii"):
            raise UnsupportedMediaType("the body must be UTF-8: Content-Type: application/json")
    codings = ",".join(request.headers.getlist("content-encoding")).lower()
    if any(coding.strip() not in ("", "identity") for coding in codings.split(",")):
        raise UnsupportedMediaType("the body must not be compressed; remove Content-Encoding")
