"""The processes below one, from /proc: which there are, what they read, how they ended.

A launcher may put rank processes into a group or session of its own (MPI's does), so groups do not
find them all. What is below a process does, as long as nobody between has ended; then the nearest
subreaper inherits them, which the guardian is.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from typing import NamedTuple

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
#: Signals that no process ends by in an orderly way.
_FATAL = {
    *(signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE),
}
#: In the command lines of Python processes that help a rank and are none.
_HELPERS = ("resource_tracker", "forkserver", "compile_worker")

#: Where launchers tell a process its number.
_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "RANK")


class Process(NamedTuple):
    """`started` tells apart processes of one pid. `status` is as `os.waitpid` gives it, of one that
    has ended and was not waited for; None while it runs."""

    pid: int
    parent: int
    started: int
    status: int | None


def descendants(root: int) -> list[Process]:
    """Every process below `root`, parents before their children."""
    children: dict[int, list[Process]] = {}
    for process in _all():
        children.setdefault(process.parent, []).append(process)
    found: list[Process] = []
    parents = [root]
    while parents:
        below = [child for parent in parents for child in children.get(parent, ())]
        found += below
        parents = [child.pid for child in below]
    return found


def below_guardian() -> list[Process]:
    """Of the worker, which is the guardian's child: every process that there is for its sake, those
    included whose launcher has left them to the guardian."""
    return [process for process in descendants(os.getppid()) if process.pid != os.getpid()]


def command(pid: int) -> str:
    """The command line, its words joined by spaces; empty of a process that has ended."""
    return _read(f"/proc/{pid}/cmdline").replace("\0", " ").strip()


def is_rank(pid: int) -> bool:
    """Whether a process below the worker computes: one of MPI's, or one with the worker's own
    interpreter that is no helper of Python's or torch's."""
    words = command(pid)
    if any(helper in words for helper in _HELPERS):
        return False
    return "mpi4py" in words or _executable(pid) == _executable(os.getpid())


def rank_words(pid: int) -> str:
    """`rank 3 (process 123)` where its launcher has numbered it, else `process 123`."""
    for entry in _read(f"/proc/{pid}/environ").split("\0"):
        name, _, value = entry.partition("=")
        if name in _RANK_VARIABLES and value.isdigit():
            return f"rank {value} (process {pid})"
    return f"process {pid}"


def bytes_moved(pid: int, thread: int | None = None) -> int:
    """Bytes that a process (or one thread of it) has read and written so far, through the page
    cache or past it; 0 where the kernel does not tell."""
    path = f"/proc/{pid}/io" if thread is None else f"/proc/{pid}/task/{thread}/io"
    counts = {
        name: int(value)
        for name, _, value in (line.partition(": ") for line in _read(path).splitlines())
        if value.isdigit()
    }
    read = max(counts.get("rchar", 0), counts.get("read_bytes", 0))
    return read + counts.get("wchar", 0)


def ended_words(status: int | None) -> str:
    """`was killed by SIGKILL`, `ended with exit code 1`: of a status as `os.waitpid` gives it."""
    if status is None:
        return "ended"
    if os.WIFSIGNALED(status):
        return f"was killed by {signal_name(os.WTERMSIG(status))}"
    return f"ended with exit code {os.WEXITSTATUS(status)}"


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def is_disaster(status: int) -> bool:
    """Whether a process of this status ended by a signal that no process ends by on purpose."""
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) in _FATAL


def become_subreaper() -> None:
    """Inherit the processes whose parents, below this one, end."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent(parent: int) -> None:
    """Be killed when the thread ends that started this process; at once if `parent` has gone."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def open_pidfd(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends; None where the kernel has none, or
    where the process has gone already."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def status_of(pid: int) -> int | None:
    """How a process ended that was not waited for, None while it runs or where nobody knows. The
    process stays for its parent to wait for."""
    process = _stat(pid)
    return None if process is None else process.status


def is_alive(pid: int) -> bool:
    process = _stat(pid)
    return process is not None and process.status is None


def start_of(pid: int) -> int | None:
    """When a process started, in ticks since the boot: tells it from a later one of its pid. None
    where it has ended."""
    process = _stat(pid)
    return None if process is None or process.status is not None else process.started


def _all() -> Iterator[Process]:
    for name in os.listdir("/proc"):
        if name.isdigit() and (process := _stat(int(name))) is not None:
            yield process


def _stat(pid: int) -> Process | None:
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    if len(fields) < 20:
        return None
    ended = fields[0] in "ZX"
    status = int(fields[49]) if ended and len(fields) > 49 else None
    return Process(pid, int(fields[1]), int(fields[19]), 0 if ended and status is None else status)


def _executable(pid: int) -> str | None:
    try:
        return os.path.realpath(os.readlink(f"/proc/{pid}/exe"))
    except OSError:
        return None


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
