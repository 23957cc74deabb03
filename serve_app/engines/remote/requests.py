"""The requests that a worker has, from the message that brings each to the one that ends it."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import msgspec

from serve_app.engines.protocol import Done, Event
from serve_app.engines.remote.text import Answer
from serve_app.engines.stall import StallClock
from serve_app.engines.worker.messages import Abort, Generate

#: Token of prompts that say nothing.
_TOKEN = 1


@dataclass(slots=True, eq=False)
class OpenRequest:
    """One request in the worker. `answer` None is one of our own, whose end sets `over`. `ended`:
    its client has been told the end; `aborted`: the worker has been told to stop it."""

    number: int
    answer: Answer | None
    events: asyncio.Queue[Event | Exception] = field(default_factory=asyncio.Queue)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    ended: bool = False
    aborted: bool = False

    def put(self, items: Iterable[Event | Exception]) -> None:
        """Tell the client, unless it has been told the end."""
        for item in items:
            if self.ended:
                return
            self.ended = isinstance(item, Done | Exception)
            self.events.put_nowait(item)


class Requests:
    """`named` are those of clients by their ids, until the client has gone; the worker's numbers
    are never used twice. `stall` is told of every one."""

    def __init__(self, send: Callable[[msgspec.Struct], None], end_ids: Iterable[int]) -> None:
        self.stall = StallClock()
        self.named: dict[str, OpenRequest] = {}
        self._send = send
        self._end_ids = sorted(end_ids)
        self._open: dict[int, OpenRequest] = {}
        self._numbers = itertools.count(1)

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[OpenRequest]:
        return iter(self._open.values())

    @property
    def answers(self) -> list[Answer]:
        """Of the requests of clients."""
        return [item.answer for item in self._open.values() if item.answer is not None]

    def new(self, answer: Answer | None) -> OpenRequest:
        """A request that the worker has not got yet."""
        return OpenRequest(next(self._numbers), answer)

    def get(self, number: int) -> OpenRequest | None:
        return self._open.get(number)

    def submit(self, item: OpenRequest, message: Generate) -> None:
        """Give a request to the worker."""
        self._open[item.number] = item
        self.stall.submitted()
        self.stall.taken()
        self._send(message)

    def abort(self, item: OpenRequest) -> None:
        """Tell the worker to stop a request, once, unless it has told its end."""
        if not item.aborted and item.number in self._open:
            item.aborted = True
            self._send(Abort(item.number))

    def close(self, number: int) -> OpenRequest | None:
        """The worker has told the end of a request."""
        item = self._open.pop(number, None)
        if item is not None:
            item.over.set()
        return item

    def progress(self) -> None:
        """The engine has computed something."""
        self.stall.stepped(has_work=bool(self._open))

    async def ask(self, prompt_tokens: int, max_tokens: int, salt: str) -> None:
        """Have the engine compute something for us, before what waits; returns when it has ended.
        What it says is of no interest."""
        item = self.new(None)
        self.submit(
            item,
            Generate(
                id=item.number,
                prompt_ids=[_TOKEN] * prompt_tokens,
                max_tokens=max_tokens,
                temperature=0.0,
                top_p=1.0,
                top_k=0,
                seed=None,
                ignore_eos=True,
                end_ids=self._end_ids,
                stop_token_ids=[],
                cache_salt=salt,
                priority=1.0,
            ),
        )
        await item.over.wait()
