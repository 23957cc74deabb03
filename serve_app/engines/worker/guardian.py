"""Ends every process of an engine when its worker or its replica has ended, however they ended.

    replica > outer guardian > inner guardian > worker > ranks ...

A guardian does nothing but wait, so that neither an engine which hangs in native code nor one that
is out of memory can hold it up. Both are subreapers: processes below whose parents end come to
them, also those of a launcher that has made a session of its own. There are two because Ray kills
the children of an actor that it kills: the inner one then still sees the replica end, and the outer
one sees the inner one end.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from collections.abc import Iterable
from typing import NoReturn

from .processes import become_subreaper, descendants, die_with_parent, open_pidfd

#: Seconds between two looks where the kernel tells nothing at once.
_LOOK_S = 0.5
#: Seconds for killed processes to go. One that waits for a device cannot be waited for any longer.
_GONE_S = 10.0


def fork_guarded(replica: int, close: int) -> None:
    """Return in a process below, the worker. The calling process becomes the outer guardian and
    never returns: it ends with the worker's exit code, 128 + N for signal N, after everything below
    it. `close` is the worker's descriptor; `replica` is the process that started this one."""
    outer = os.getpid()
    inner = _fork()
    if inner:
        os.close(close)
        _guard(inner, [replica])
    guardian = os.getpid()
    worker = _fork()
    if worker:
        os.close(close)
        _guard(worker, [outer, replica])
    die_with_parent(guardian)


def _fork() -> int:
    """Fork, as a subreaper; 0 in the child."""
    become_subreaper()
    sys.stdout.flush()
    return os.fork()


def _guard(child: int, above: list[int]) -> NoReturn:
    """Wait until the child has ended, or any process of `above`, the first of which is the parent;
    then end everything below, and this process."""
    wake, told = os.pipe()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: os.write(told, b"."))
    poll = select.poll()
    watched = {open_pidfd(pid): pid for pid in above}
    for descriptor in (*watched, open_pidfd(child), wake):
        if descriptor is not None:
            poll.register(descriptor, select.POLLIN)
    status = 0
    while os.getppid() == above[0]:
        ready = {descriptor for descriptor, _ in poll.poll(_LOOK_S * 1000)}
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended or wake in ready or ready & watched.keys():
            break
    end_descendants()
    os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


def end_descendants() -> None:
    """Kill everything below this process, and wait until it has gone."""
    deadline = time.monotonic() + _GONE_S
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        left = descendants(os.getpid())
        if not left:
            return
        if time.monotonic() > deadline:
            pids = ", ".join(str(process.pid) for process in left)
            print(f"processes {pids} were killed and have not ended", file=sys.stderr)
            return
        _kill(process.pid for process in left)
        time.sleep(0.01)


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
