"""From the start of a worker's process until its engine is ready, or has failed in one sentence.

A constructor may return after minutes, never, or with an error that names nothing. Whatever
happens, no process is left behind: `Loader.load` returns a worker that is ready, or raises after it
has killed it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from deepseek.errors import DeployError
from serve_app.engines.protocol import LoadProgress
from serve_app.engines.remote.channel import AdapterChannel
from serve_app.engines.remote.launch import Deadlines, Launch, Plan
from serve_app.engines.remote.process import WorkerProcess
from serve_app.engines.worker.messages import (
    PROTOCOL,
    Failed,
    FromWorker,
    Hello,
    Progress,
    Ready,
    Start,
)

log = logging.getLogger("ray.serve")

#: What a worker calls its phases -> what people read.
_PHASES = {
    "starting": "starting the engine's process",
    "importing": "importing the engine",
    "weights": "reading the weights",
    "warming": "warming up",
}
#: Seconds from the end of a worker's socket to that of its process.
_EXIT_S = 1.0
#: Words of a line of output that says why loading failed.
_TELLING = ("error", "exception", "out of memory", "failed", "cannot", "abort")


class Worker:
    """A worker's process and the socket to it. What it says goes to `inbox` until `listen` names
    another place; so does, as a string, how it ended."""

    def __init__(self, launch: Launch) -> None:
        self.inbox: asyncio.Queue[FromWorker | str] = asyncio.Queue()
        self._handle: Callable[[FromWorker | str], None] | None = None
        self.process = WorkerProcess(launch, lambda how: self._put(f"its process {how}"))
        self.channel: AdapterChannel

    async def connect(self) -> None:
        self.channel = await AdapterChannel.connect(self.process.socket, self._put, self._put)

    def listen(self, handle: Callable[[FromWorker | str], None]) -> None:
        """From now on call `handle` with what it says, first with what it has said."""
        self._handle = handle
        while not self.inbox.empty():
            handle(self.inbox.get_nowait())

    def _put(self, item: FromWorker | str) -> None:
        if self._handle is not None:
            self._handle(item)
        else:
            self.inbox.put_nowait(item)

    async def ending(self, what: str) -> str:
        """How it ended, of which `what` is the first sign: a socket closes a little sooner than
        its process ends."""
        await self.process.wait(_EXIT_S)
        return what if self.process.exit is None else f"its process {self.process.exit}"

    async def end(self, within_s: float) -> None:
        """Kill whatever is left of it."""
        if hasattr(self, "channel"):
            self.channel.close()
        else:
            self.process.socket.close()
        await self.process.kill(within_s)


class _OutOfMemory(Exception):
    """The engine did not load, and may with less: the worker's sentence."""


class Loader:
    """Starts workers until one is ready, at most twice. `progress` is how far it is."""

    def __init__(self, plan: Plan, launch: Launch, deadlines: Deadlines) -> None:
        self._plan = plan
        self._launch = launch
        self._deadlines = deadlines
        self.progress = LoadProgress(_PHASES["starting"])
        self._worker: Worker | None = None
        self._stopped = False

    async def stop(self) -> None:
        """End whatever is loading: `load` then raises."""
        self._stopped = True
        if self._worker is not None:
            await self._worker.process.kill(self._deadlines.kill_s)

    async def load(self) -> tuple[Worker, Ready]:
        """Start a worker and wait until its engine is ready.

        Raises:
            DeployError: it is not, in one sentence that says why.
        """
        plan = self._plan
        try:
            return await self._try(plan.arguments)
        except _OutOfMemory as error:
            if plan.less_memory is None:
                raise self._error(str(error)) from error
            first, second = plan.memory
            log.warning(
                "the engine ran out of memory with %s (%s); trying once more with %s",
                first, error, second,
            )  # fmt: skip
        try:
            return await self._try(plan.less_memory)
        except _OutOfMemory as error:
            raise self._error(
                f"it ran out of GPU memory with {first}, and again with {second} ({error}); give "
                "it fewer KV tokens or a smaller max_batch_size or max_num_tokens"
            ) from error

    async def _try(self, arguments: Mapping[str, Any]) -> tuple[Worker, Ready]:
        if self._stopped:
            raise self._error("it was stopped before it was ready")
        try:
            worker = self._worker = Worker(self._launch)
        except OSError as error:
            raise DeployError(
                f"{self._launch.python} cannot be started ({error.strerror}); make the engine's "
                f"environment with `make engine-env TARGET={self._plan.engine}`"
            ) from error
        try:
            await worker.connect()
            ready = await self._talk(worker, arguments)
        except BaseException:
            await worker.end(self._deadlines.kill_s)
            raise
        worker.process.note_pids(ready.pids)
        return worker, ready

    async def _talk(self, worker: Worker, arguments: Mapping[str, Any]) -> Ready:
        plan, deadlines = self._plan, self._deadlines
        try:
            async with asyncio.timeout(deadlines.hello_s):
                hello = await worker.inbox.get()
        except TimeoutError as error:
            raise self._error(
                f"its process has said nothing in {deadlines.hello_s:g} s; look at "
                f"{self._launch.python}"
            ) from error
        if not isinstance(hello, Hello):
            raise await self._ended(worker, hello)
        if hello.protocol != PROTOCOL:
            raise self._error(
                f"its worker speaks protocol {hello.protocol}, not {PROTOCOL}; start both from one "
                "installation"
            )
        worker.process.note_pids([hello.pid])
        worker.channel.send(
            Start(
                protocol=PROTOCOL,
                backend=self._launch.backend,
                module=self._launch.module,
                path=list(self._launch.path),
                directory=str(plan.directory),
                arguments=dict(arguments),
                engine_version=plan.engine_version,
                max_model_len=plan.max_model_len,
                weight_bytes=plan.weight_bytes,
                load_every_s=deadlines.load_every_s,
                health_s=deadlines.health_s,
                shutdown_s=deadlines.shutdown_s,
            )
        )
        return await self._wait_ready(worker)

    async def _wait_ready(self, worker: Worker) -> Ready:
        deadlines = self._deadlines
        began = stirred = time.monotonic()
        last: Progress | None = None
        while True:
            now = time.monotonic()
            left_s = min(began + deadlines.load_s, stirred + deadlines.load_stall_s) - now
            try:
                async with asyncio.timeout(max(0.0, left_s)):
                    message = await worker.inbox.get()
            except TimeoutError as error:
                raise self._error(self._overdue(began, stirred)) from error
            if isinstance(message, Ready):
                return message
            if isinstance(message, Failed):
                if message.retry_with_less_memory:
                    raise _OutOfMemory(message.error)
                raise self._error(message.error)
            if not isinstance(message, Progress):
                raise await self._ended(worker, message)
            if message != last:
                last, stirred = message, time.monotonic()
            phase = _PHASES.get(message.phase, message.phase)
            is_read = message.phase == "weights"
            self.progress = LoadProgress(
                phase, message.done if is_read else 0, message.total if is_read else 0
            )

    def _overdue(self, began: float, stirred: float) -> str:
        """Which deadline has passed, and what it was doing."""
        now, deadlines, progress = time.monotonic(), self._deadlines, self.progress
        doing = progress.phase
        if progress.total_bytes:
            doing += f" ({progress.done_bytes / 1e9:.1f} of {progress.total_bytes / 1e9:.1f} GB)"
        if now - began >= deadlines.load_s:
            return (
                f"its constructor has not returned in {deadlines.load_s:g} s, while {doing}; raise "
                "load_timeout_s if it is only slow"
            )
        return (
            f"its constructor has shown no sign of work for {now - stirred:.0f} s, while {doing}: "
            "the start of its ranks (MPI) or a rank hangs; look at the engine's lines in this log"
        )

    async def _ended(self, worker: Worker, what: object) -> DeployError:
        """The worker has ended, or said what it may not."""
        if not isinstance(what, str):
            return self._error(f"its worker said {type(what).__name__} before it was ready")
        what = await worker.ending(what)
        lines = worker.process.last_lines
        telling = [line for line in lines if any(word in line.lower() for word in _TELLING)]
        said = (telling or lines)[-1:]
        hint = ""
        if "SIGKILL" in what:
            hint = ", which the kernel does when a node's memory runs out"
        return self._error(
            f"{what} while it loaded{hint}" + (f"; it said: {said[0][:300]}" if said else "")
        )

    def _error(self, what: str) -> DeployError:
        if "No module named" in what:
            what += (
                f"; name the Python that `make engine-env TARGET={self._plan.engine}` makes, not "
                f"{self._launch.python}"
            )
        return DeployError(f"{self._plan.directory} did not load in {self._plan.engine}: {what}")
