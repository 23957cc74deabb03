"""An event loop for one command, which SIGINT and SIGTERM end in order."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any, TypeVar

Result = TypeVar("Result")


async def together(coroutines: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """The results of all, which run at the same time. The first failure ends the others, and is
    raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def run_in_order(main: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    """`asyncio.run` that SIGINT and SIGTERM end in order. Left to themselves, they would raise in
    whatever callback is under way, where asyncio logs an exception and goes on."""
    received: list[int] = []

    async def guarded() -> Result:
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()

        def stop(signum: int) -> None:
            received.append(signum)
            task.cancel()

        with _handled(loop, stop):
            return await main()

    try:
        return asyncio.run(guarded())
    except asyncio.CancelledError:
        if received:
            signal.raise_signal(received[0])  # now, for the handler that was there before
        raise


@contextlib.contextmanager
def _handled(loop: asyncio.AbstractEventLoop, stop: Callable[[int], None]) -> Iterator[None]:
    before = {}
    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(signum) not in (signal.SIG_IGN, None):
                before[signum] = signal.getsignal(signum)
                loop.add_signal_handler(signum, stop, signum)
    try:
        yield
    finally:
        for signum, handler in before.items():
            loop.remove_signal_handler(signum)
            signal.signal(signum, handler)
