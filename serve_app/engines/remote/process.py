"""The processes of one worker: started, heard, and killed to the last one.

The outer guardian (worker/guardian.py) is this process's child, in a session of its own, and does
the killing as long as it lives. Behind it stand the inner one, the process group, and the pids that
the worker has told.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from deepseek.text import printable
from serve_app.engines.remote.launch import Launch
from serve_app.engines.worker import processes

log = logging.getLogger("ray.serve")

WORKER = Path(processes.__file__).with_name("__main__.py")
#: A progress bar writes over itself.
_ENDS_OF_LINES = re.compile(rb"[\r\n]")
#: What a worker does not inherit: paths of this environment's Python, what Ray, MPI and
#: OpenTelemetry say of this process.
_OWN = ("PYTHON", "RAY_", "OMPI_", "PMI_", "PMIX_", "PRTE_", "OTEL_", "VIRTUAL_ENV", "CONDA_")
#: Characters of a line of its output that are logged, and lines a second.
_LINE, _LINES_PER_S = 500, 50
#: Last lines that are kept for a sentence on its end.
_KEPT = 40
#: Seconds for what was killed to go when the guardian was killed itself.
_LOOK_S = 0.02


class WorkerProcess:
    """A running worker. `ended` is called on the event loop once, with how it ended."""

    def __init__(self, launch: Launch, ended: Callable[[str], None]) -> None:
        loop = asyncio.get_running_loop()
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._process = subprocess.Popen(
                [str(launch.python), str(WORKER), str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                env=worker_environment(os.environ) | free_ports(launch.ports) | dict(launch.env),
            )
        except OSError:
            self.socket.close()
            raise
        finally:
            theirs.close()
        self.pid = self._process.pid
        self._told: dict[int, int | None] = {}
        self._gone = False
        #: How it ended, None while it runs.
        self.exit: str | None = None
        self._tail: deque[str] = deque(maxlen=_KEPT)
        self._exited = asyncio.Event()
        self._reader = threading.Thread(target=self._read_output, daemon=True)
        self._reader.start()
        threading.Thread(target=self._wait, args=(loop, ended), daemon=True).start()

    @property
    def last_lines(self) -> list[str]:
        """What it printed last."""
        return list(self._tail)

    def note_pids(self, pids: Iterable[int]) -> None:
        """Processes that the worker has told of: killed even if they left its group."""
        self._told |= {pid: processes.start_of(pid) for pid in pids}

    async def wait(self, timeout_s: float) -> bool:
        """Whether it has ended, after at most so many seconds."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._exited.wait()
        except TimeoutError:
            return False
        return True

    async def kill(self, within_s: float) -> None:
        """End all of its processes; returns when they have gone, or after `within_s` seconds with
        an error in the log."""
        deadline = time.monotonic() + within_s
        known = self._known()
        if not self._exited.is_set():
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGTERM)  # the guardian kills and waits
            await self.wait(within_s / 2)
        self.kill_at_once(known)
        while left := [pid for pid, start in known.items() if processes.start_of(pid) == start]:
            if time.monotonic() > deadline:
                log.error("processes %s of the engine were killed and have not ended", left)
                return
            await asyncio.sleep(_LOOK_S)
        await self.wait(max(0.1, deadline - time.monotonic()))
        self._gone = True

    def kill_at_once(self, known: Mapping[int, int] | None = None) -> None:
        """Send SIGKILL to everything that is known, without waiting."""
        if self._gone:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        for pid, start in (self._known() if known is None else known).items():
            if processes.start_of(pid) == start:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)

    def _known(self) -> dict[int, int]:
        """Pids and starts of what was told and of what is found now."""
        told = {pid: start for pid, start in self._told.items() if start is not None}
        below = {p.pid: p.started for p in processes.descendants(self.pid) if p.status is None}
        return told | below

    def _wait(self, loop: asyncio.AbstractEventLoop, ended: Callable[[str], None]) -> None:
        code = self._process.wait()
        self._reader.join(timeout=0.5)  # its last words, unless a process below holds the pipe

        def tell() -> None:
            self.exit = exit_words(code)
            self._exited.set()
            ended(self.exit)

        with contextlib.suppress(RuntimeError):  # the loop has ended with the replica
            loop.call_soon_threadsafe(tell)

    def _read_output(self) -> None:
        """Log its lines; a loader's progress bar and a flood are cut."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        second, lines, dropped, rest = 0, 0, 0, b""
        while chunk := os.read(descriptor, 1 << 16):
            *ready, rest = _ENDS_OF_LINES.split(rest + chunk)
            rest = rest[-_LINE:]
            for raw in ready:
                line = printable(raw.decode(errors="replace"))[:_LINE].strip()
                if not line:
                    continue
                self._tail.append(line)
                if (now := int(time.monotonic())) != second:
                    if dropped:
                        log.info("engine[%d]: %d lines left out", self.pid, dropped)
                    second, lines, dropped = now, 0, 0
                lines += 1
                if lines <= _LINES_PER_S:
                    log.info("engine[%d]: %s", self.pid, line)
                else:
                    dropped += 1
        self._process.stdout.close()


def worker_environment(own: Mapping[str, str]) -> dict[str, str]:
    """The environment of a worker, of this process's."""
    kept = {name: value for name, value in own.items() if not name.startswith(_OWN)}
    return kept | {"PYTHONUNBUFFERED": "1", "PYTHONNOUSERSITE": "1"}


def free_ports(names: Iterable[str]) -> dict[str, str]:
    """A TCP port of this node for each name, all different, that nobody uses now."""
    with contextlib.ExitStack() as stack:
        sockets = {name: stack.enter_context(socket.socket()) for name in names}
        for each in sockets.values():
            each.bind(("127.0.0.1", 0))
        return {name: str(each.getsockname()[1]) for name, each in sockets.items()}


def exit_words(code: int) -> str:
    """`was killed by SIGKILL`, `ended with exit code 1`: the guardian passes on its worker's."""
    number = -code if code < 0 else code - 128
    if code < 0 or code > 128:
        return f"was killed by {processes.signal_name(number)}"
    return f"ended with exit code {code}"
