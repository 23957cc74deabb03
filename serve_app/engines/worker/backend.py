"""What one engine must offer the worker's loop. A backend is a file here, with a function

    def make(module: str | None) -> Backend

whose `module` is the import path of the engine's package, None for the real one.

Errors say what they are about by their type. `LoadError` ends the loading in one sentence,
`Refused` and `RequestFailed` end one request, and every other exception of `submit` means that the
engine is dead. A backend whose processes print why they end may have a method `cause`, which gives
that as a `LoadError` or None; a thread calls it when one of them has ended while it loads.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from typing import Protocol

from .messages import End, Generate, Load, Output, Progress, Ready, Start


class LoadError(Exception):
    """The engine does not load: one sentence. `out_of_memory`: it might with less KV cache."""

    def __init__(self, message: str, *, out_of_memory: bool = False) -> None:
        super().__init__(message)
        self.out_of_memory = out_of_memory


class Refused(Exception):
    """The engine does not take this request, and never will: one sentence."""


class RequestFailed(Exception):
    """This request has failed in the engine, which goes on: one sentence."""


class Backend(Protocol):
    """One engine. Every method is called on the worker's one event loop, `start` first and once."""

    async def start(self, start: Start, report: Callable[[Progress], None]) -> Ready:
        """Load the engine. It may block the loop for as long as it takes; `report` may be called
        by any thread, for a phase that others cannot know. `Ready.pids` may stay empty: `pids` is
        asked afterwards.

        Raises:
            LoadError: it does not load. Any other exception means the same, in its own words.
        """
        ...

    def submit(self, request: Generate) -> AsyncGenerator[Output | End, None]:
        """The tokens of a request as they come, each once, and then its end. An `Output` holds new
        tokens only. Without an `End` the loop says one.

        Raises:
            Refused, RequestFailed: of this request. Anything else: the engine is dead.
        """
        ...

    async def abort(self, request_id: int) -> None:
        """Stop a request. Called at most once for each, and not after its end."""
        ...

    async def load(self) -> Load | None:
        """How busy it is, by its own figures; None while it has none."""
        ...

    async def healthy(self) -> str | None:
        """Why the engine is dead, None while it is not. It may take as long as it likes: the
        caller waits for a while only, and does not ask again before it has answered."""
        ...

    def cause(self) -> LoadError | None:
        """What its processes said of why one of them has ended; None where nothing was heard.
        Called by another thread while `start` is on."""
        ...

    def pids(self) -> list[int]:
        """Its rank processes, whose end is the engine's end."""
        ...

    def shutdown(self) -> None:
        """End the engine. Called in a thread; may block for ever."""
        ...
