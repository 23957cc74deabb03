"""Ends every process of an engine when its worker or its replica has ended, however they ended.

The guardian is the worker's parent and the replica's child. It does nothing but wait, so that
neither an engine which hangs in native code nor one that is out of memory can hold it up. It is the
subreaper of all processes below: rank processes come to it when the worker is killed. If the
guardian itself is killed, the kernel kills the worker, and the replica kills the rest.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time

from .processes import become_subreaper, descendants, die_with_parent, open_pidfd

#: Seconds between two looks where the kernel tells nothing at once.
_LOOK_S = 0.5
#: Seconds for killed processes to go. One that waits for a device cannot be waited for any longer.
_GONE_S = 10.0


def fork_guarded(replica: int, close: int) -> None:
    """Return in a child process, the worker. The calling process becomes its guardian and never
    returns: it ends with the worker's exit code, 128 + N for signal N, after everything below it.
    `close` is the worker's descriptor; `replica` is the process that started this one."""
    guardian = os.getpid()
    become_subreaper()
    replica_fd = open_pidfd(replica)
    worker = os.fork()
    if worker == 0:
        if replica_fd is not None:
            os.close(replica_fd)
        die_with_parent(guardian)
        return
    os.close(close)
    wake, told = os.pipe()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: os.write(told, b"."))
    poll = select.poll()
    for descriptor in (replica_fd, open_pidfd(worker), wake):
        if descriptor is not None:
            poll.register(descriptor, select.POLLIN)
    status = 0
    while os.getppid() == replica:
        ready = poll.poll(_LOOK_S * 1000)
        ended, status = os.waitpid(worker, os.WNOHANG)
        if ended or any(descriptor in (replica_fd, wake) for descriptor, _ in ready):
            break
    end_descendants()
    sys.stdout.flush()
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
        for process in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(process.pid, signal.SIGKILL)
        time.sleep(0.01)
