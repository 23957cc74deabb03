"""The worker's one event loop: takes requests, passes on tokens, answers pings, and ends.

The engine is imported, made and used on this loop's thread, the main one: engines install signal
handlers, and choose their queues by the loop that runs when a request is made. A thread beside it
receives, because the loop is held up while the engine loads. When anything says that the engine is
dead the process tells it and ends, without a word to the engine: the guardian does the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.util
import os
import platform
import socket
import sys
import threading
import time
import traceback
from collections.abc import Coroutine, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, NoReturn

import msgspec

from .backend import Backend, LoadError, Refused, RequestFailed
from .channel import ChannelError, WorkerChannel
from .loading import LoadingWatch
from .messages import (
    PROTOCOL,
    Abort,
    End,
    Failed,
    Fatal,
    Generate,
    Hello,
    Ping,
    Pong,
    Progress,
    Start,
    Stop,
    ToWorker,
)
from .processes import ended_words, is_alive, open_pidfd, rank_words, status_of
from .said import drain

#: Exit codes: orderly, nobody listens any more, the engine did not load, the engine is dead.
STOPPED, LEFT, NOT_LOADED, DEAD = 0, 3, 4, 5
#: Most characters of what an exception says.
_SENTENCE = 2000
#: Seconds for the last words to leave.
_LAST_WORDS_S = 5.0
#: Seconds for requests to end that are stopped because the engine is.
_ABORTED_S = 1.0
#: Seconds between two looks at the ranks where the kernel tells of no process that ends.
_RANKS_S = 0.5

Channel = WorkerChannel[ToWorker]


def run(descriptor: int) -> NoReturn:
    """Be the worker of the connected socket `descriptor`, until the process ends."""
    sock = socket.socket(fileno=descriptor)
    sock.set_inheritable(False)
    channel: Channel = WorkerChannel(sock, ToWorker)
    received = channel.receive()
    try:
        channel.send([Hello(protocol=PROTOCOL, pid=os.getpid(), python=platform.python_version())])
        start = next(received, None)
    except (OSError, ChannelError) as error:
        print(f"the worker cannot start: {error}", file=sys.stderr)
        _exit(LEFT)
    if start is None:
        _exit(LEFT)
    if not isinstance(start, Start) or start.protocol != PROTOCOL:
        other = getattr(start, "protocol", "none")
        _last_words(
            channel,
            Failed(
                phase="starting",
                error=f"the worker speaks protocol {PROTOCOL}, not {other}; start both from one "
                "installation",
            ),
        )
        _exit(NOT_LOADED)
    sys.path[:0] = start.path
    asyncio.run(_Worker(channel, start).serve(received))
    raise AssertionError("the worker's loop ended")


@dataclass
class _Running:
    aborted: bool = False
    ended: bool = False


class _Worker:
    def __init__(self, channel: Channel, start: Start) -> None:
        self._channel = channel
        self._start = start
        self._backend: Backend | None = None
        self._running: dict[int, _Running] = {}
        self._unsent: list[msgspec.Struct] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._health: asyncio.Task[None] | None = None
        self._health_since = 0.0
        self._stopping = False

    @property
    def _engine(self) -> Backend:
        assert self._backend is not None, "nothing is asked of an engine that was not made"
        return self._backend

    async def serve(self, received: Iterator[ToWorker]) -> None:
        self._loop = asyncio.get_running_loop()
        self._ready = False
        threading.Thread(target=self._receive, args=(received,), daemon=True).start()
        watch = LoadingWatch(self._start.weight_bytes, self._tell, self._lost_while_loading)
        watch.start()

        def report(progress: Progress) -> None:
            watch.report(progress)
            self._tell(progress)

        try:
            backend = self._backend = _make_backend(self._start)
            ready = await backend.start(self._start, report)
        except BaseException as error:
            watch.end()
            traceback.print_exc()
            self._fail(error)
        watch.end()
        if not ready.pids:
            ready.pids = backend.pids()
        self._ready = True
        for pid in ready.pids:
            self._watch_rank(pid)
        self._put(ready)
        self._spawn(self._tell_load())
        await asyncio.Event().wait()  # `_exit` ends the process

    # The thread that receives.

    def _receive(self, received: Iterator[ToWorker]) -> None:
        try:
            for message in received:
                if isinstance(message, Stop) and not self._ready:
                    _exit(STOPPED)  # the constructor cannot be interrupted
                self._loop.call_soon_threadsafe(self._take, message)
        except ChannelError as error:
            print(f"the worker ends: {error}", file=sys.stderr)
        if not self._stopping:
            _exit(LEFT)

    def _lost_while_loading(self, what: str) -> None:
        """Called by the watch's thread: the constructor may never notice."""
        failed = Failed(phase="loading", error=f"{what} while the engine loaded")
        if self._backend is not None and (cause := self._backend.cause()) is not None:
            failed.error = f"{_sentence(cause)} ({what})"
            failed.retry_with_less_memory = cause.out_of_memory
        _last_words(self._channel, failed)
        _exit(NOT_LOADED)

    def _tell(self, progress: Progress) -> None:
        with contextlib.suppress(OSError):
            self._channel.send([progress])

    # The loop.

    def _take(self, message: ToWorker) -> None:
        if self._stopping:
            return
        if isinstance(message, Generate):
            self._running[message.id] = _Running()
            self._spawn(self._generate(message))
        elif isinstance(message, Abort):
            self._spawn(self._abort(message.id))
        elif isinstance(message, Ping):
            self._pong(message.n)
        elif isinstance(message, Stop):
            self._stopping = True
            self._spawn(self._stop())
        else:
            self._die("the adapter started this worker twice")

    async def _generate(self, request: Generate) -> None:
        state = self._running[request.id]
        end: End | None = None
        try:
            async with aclosing(self._engine.submit(request)) as items:
                async for item in items:
                    if isinstance(item, End):
                        end = item
                        break
                    self._put(item)
        except Refused as error:
            end = End(request.id, error=_sentence(error), refused=True)
        except RequestFailed as error:
            end = End(request.id, error=_sentence(error))
        except Exception as error:  # whatever else it raises: the engine is dead
            traceback.print_exc()
            self._die(_with_causes(error))
        state.ended = True
        del self._running[request.id]
        self._put(end or End(request.id))

    async def _abort(self, request_id: int) -> None:
        state = self._running.get(request_id)
        if state is None or state.aborted or state.ended:
            return
        state.aborted = True
        try:
            await self._engine.abort(request_id)
        except Exception as error:
            traceback.print_exc()
            self._die(f"an abort failed with {type(error).__name__}: {_sentence(error)}")

    def _pong(self, n: int) -> None:
        """Answer at once, and ask the engine meanwhile, which may take long to say."""
        why = None
        if self._health is None or self._health.done():
            self._health_since = time.monotonic()
            self._health = self._spawn(self._ask_health())
        elif time.monotonic() - self._health_since > self._start.health_s:
            why = f"its health check has not returned in {self._start.health_s:g} s"
        self._put(Pong(n, healthy=why is None, why=why))

    async def _ask_health(self) -> None:
        try:
            why = await self._engine.healthy()
        except Exception as error:
            why = f"its health check raised {type(error).__name__}: {_sentence(error)}"
        if why is not None:
            self._die(why)

    async def _tell_load(self) -> None:
        """Pass on the engine's own figures. Without them nothing is amiss: the adapter counts."""
        warned = False
        while True:
            await asyncio.sleep(self._start.load_every_s)
            try:
                load = await self._engine.load()
            except Exception as error:
                if not warned:
                    print(f"the engine's figures cannot be read: {error!r}", file=sys.stderr)
                warned = True
                continue
            if load is not None:
                self._put(load)

    def _watch_rank(self, pid: int) -> None:
        words = rank_words(pid)
        descriptor = open_pidfd(pid)
        if descriptor is not None:
            self._loop.add_reader(descriptor, self._rank_ended, pid, words, descriptor)
        else:
            self._spawn(self._poll_rank(pid, words))

    async def _poll_rank(self, pid: int, words: str) -> None:
        while is_alive(pid):
            await asyncio.sleep(_RANKS_S)
        self._rank_ended(pid, words)

    def _rank_ended(self, pid: int, words: str, descriptor: int | None = None) -> None:
        if descriptor is not None:
            self._loop.remove_reader(descriptor)
        if not self._stopping:
            self._die(f"{words} {ended_words(status_of(pid))}")

    def _put(self, message: msgspec.Struct) -> None:
        """Send a message with all others of this turn of the loop."""
        if not self._unsent:
            self._loop.call_soon(self._flush)
        self._unsent.append(message)

    def _flush(self) -> None:
        messages, self._unsent = self._unsent, []
        try:
            self._channel.send(messages)
        except OSError:
            _exit(LEFT)
        except ChannelError as error:
            self._die(str(error))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # The end.

    async def _stop(self) -> None:
        """Stop what runs, then the engine: in a thread, because that may block for ever."""
        for request_id in list(self._running):
            await self._abort(request_id)
        end = time.monotonic() + _ABORTED_S
        while self._running and time.monotonic() < end:
            await asyncio.sleep(0.01)
        ending = threading.Thread(target=self._shut_down, daemon=True)
        ending.start()
        end = time.monotonic() + self._start.shutdown_s
        while ending.is_alive() and time.monotonic() < end:
            await asyncio.sleep(0.01)
        if ending.is_alive():
            print(
                f"the engine's shutdown has not returned in {self._start.shutdown_s:g} s; killed",
                file=sys.stderr,
            )
        _exit(STOPPED)

    def _shut_down(self) -> None:
        try:
            self._engine.shutdown()
        except BaseException:
            traceback.print_exc()

    def _fail(self, error: BaseException) -> NoReturn:
        _last_words(
            self._channel,
            Failed(
                phase="loading",
                error=_sentence(error) if isinstance(error, LoadError) else _with_causes(error),
                retry_with_less_memory=getattr(error, "out_of_memory", False)
                or is_out_of_memory(error),
            ),
        )
        _exit(NOT_LOADED)

    def _die(self, why: str) -> NoReturn:
        print(f"the engine is dead: {why}", file=sys.stderr)
        _last_words(self._channel, *self._unsent, Fatal(why))
        _exit(DEAD)


def _make_backend(start: Start) -> Backend:
    """From the file of that name here, else from a module of `Start.path`."""
    beside = importlib.util.find_spec(f".{start.backend}", __package__) is not None
    module = importlib.import_module(f".{start.backend}" if beside else start.backend, __package__)
    backend: Backend = module.make(start.module)
    return backend


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception, or one that it came from, says that memory ran out."""
    seen: BaseException | None = error
    while seen is not None:
        words = f"{type(seen).__name__} {seen}".lower()
        if isinstance(seen, MemoryError) or "out of memory" in words or "outofmemory" in words:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _sentence(error: BaseException) -> str:
    """The message of an exception in one line of bounded length, the name of its type without."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:_SENTENCE] or type(error).__name__


def _with_causes(error: BaseException) -> str:
    """What an exception says, and what those say that it came from: an engine's constructor tells
    that a rank failed, and only the cause why."""
    told: list[str] = []
    seen: BaseException | None = error
    while seen is not None and len(told) < 4:
        words = f"{type(seen).__name__}: {_sentence(seen)}"
        if not any(_sentence(seen) in other for other in told):
            told.append(words)
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
    return ", because of ".join(told)[:_SENTENCE]


def _last_words(channel: Channel, *messages: msgspec.Struct) -> None:
    """Send them after what was printed: who hears that an engine is dead kills its processes, and
    what they have not passed on by then is lost."""
    _pass_on_prints()
    with contextlib.suppress(OSError, ChannelError):
        channel.send(messages, within_s=_LAST_WORDS_S)


def _exit(code: int) -> NoReturn:
    _pass_on_prints()
    os._exit(code)


def _pass_on_prints() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    drain()
