"""Answers that clients have not read yet: counted in bytes, and bounded over all of an ingress.

A client that reads slowly holds up nobody: engines go on, and what they say waits here. It costs
memory, and so two limits end such an answer (`ClientTooSlow`):

- `max_bytes` over all answers of this ingress: beyond, the answer with the most unread bytes among
  those that have stood still for STALLED_S. What moves is being read, and is left alone.
- `timeout_s`: nothing of the answer was read for so long.

The server's own buffer is part of it. uvicorn lets `send` wait while a connection has more than
64 KiB to write, so answers go out in slices of SLICE bytes, and one counts as unread until the next
may be sent: at most two slices of an answer are in the server and not counted. Behind Serve's proxy
in Python `send` never waits, and what is unread lies in the proxy; proxy_guard.py bounds its time.
"""

from __future__ import annotations

import asyncio

from starlette.types import Message, Send

from serve_app.errors import ClientTooSlow
from serve_app.routing.interrupt import Interrupt

#: Bytes that are handed to the server at a time; what its buffer holds before `send` waits.
SLICE = 64 * 1024
#: Seconds without progress after which an answer may be ended when there are too many bytes.
STALLED_S = 2.0
#: Seconds between two looks at answers that stand still.
_LOOK_S = 0.5


class Unread:
    """What one client has not read of its answer. Methods belong to the event loop."""

    def __init__(self, answers: UnreadAnswers) -> None:
        self._answers = answers
        self._interrupt = Interrupt()
        self.num_bytes = 0
        #: Since when `send` has waited, on the loop's clock; None while it does not.
        self.waiting_since: float | None = None
        answers.open.add(self)

    def add(self, num_bytes: int) -> None:
        """Bytes more, or with a negative number fewer, wait for the client."""
        self.num_bytes += num_bytes
        self._answers.count(num_bytes)

    async def send(self, send: Send, body: bytes, *, last: bool = False) -> None:
        """Send a part of the body as the client takes it; `last` ends the answer.

        Raises:
            ClientTooSlow: it does not take it.
        """
        self.add(left := len(body))
        try:
            while True:
                begin = len(body) - left
                part = body[begin : begin + SLICE]
                more = not last or left > SLICE
                await self._pass(
                    send, {"type": "http.response.body", "body": part, "more_body": more}
                )
                self.add(-len(part))
                left -= len(part)
                if not left:
                    break
        finally:
            self.add(-left)

    async def begin(self, send: Send, message: Message) -> None:
        """Send what comes before the body."""
        await self._pass(send, message)

    async def _pass(self, send: Send, message: Message) -> None:
        self.waiting_since = asyncio.get_running_loop().time()
        self._answers.watch()
        try:
            await self._interrupt.run(lambda: send(message))
        finally:
            self.waiting_since = None

    def end(self) -> None:
        """Nothing more is to be sent. Idempotent."""
        self._answers.open.discard(self)
        self._answers.count(-self.num_bytes)
        self.num_bytes = 0

    def give_up(self, error: ClientTooSlow) -> None:
        """End the answer where it stands: its `send` raises `error`."""
        self._interrupt.trip(error)


class UnreadAnswers:
    """The answers of one ingress that are being sent: at most about `max_bytes` of them wait."""

    def __init__(self, *, max_bytes: int, timeout_s: float, stalled_s: float = STALLED_S) -> None:
        self.max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._stalled_s = stalled_s
        self.num_bytes = 0
        self.open: set[Unread] = set()
        self._timer: asyncio.TimerHandle | None = None

    def open_one(self) -> Unread:
        """A new answer; it must `end`."""
        return Unread(self)

    def count(self, num_bytes: int) -> None:
        """Bytes more, or with a negative number fewer, wait."""
        self.num_bytes += num_bytes

    def watch(self) -> None:
        """Look at the answers now and then, as long as any is being sent."""
        if self._timer is None:
            loop = asyncio.get_running_loop()
            pause_s = min(_LOOK_S, self._timeout_s / 2, self._stalled_s / 2)
            self._timer = loop.call_later(pause_s, self._look_again)

    def _look_again(self) -> None:
        self._timer = None
        self.look()
        if any(answer.waiting_since is not None for answer in self.open):
            self.watch()

    def look(self) -> None:
        """End the answers that have stood still for too long, or that take too much memory."""
        now = asyncio.get_running_loop().time()
        waiting = [(a, now - a.waiting_since) for a in self.open if a.waiting_since is not None]
        for answer, seconds in waiting:
            if seconds > self._timeout_s:
                answer.give_up(
                    ClientTooSlow(f"the client has read nothing for {self._timeout_s:g} s")
                )
        excess = self.num_bytes - self.max_bytes
        if excess <= 0:
            return
        stalled = [answer for answer, seconds in waiting if seconds >= self._stalled_s]
        for answer in sorted(stalled, key=lambda answer: answer.num_bytes, reverse=True):
            if excess <= 0:
                break
            excess -= answer.num_bytes
            answer.give_up(
                ClientTooSlow(
                    f"the client reads too slowly: {answer.num_bytes} bytes wait for it, and all "
                    f"answers here more than {self.max_bytes}"
                )
            )
