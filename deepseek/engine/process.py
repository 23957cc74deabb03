"""What an engine sets of the process that it runs in: the threads that compute, and how freed
memory is kept.

A step allocates and frees megabytes of temporaries. glibc gives freed memory back to the kernel as
soon as it is worth it, so that the next step maps and faults in every page again: tens of
thousands of page faults a step. `keep_freed_memory` makes it keep what a step has used for the
next one, so the process stays as large as its largest step. Variables of glibc's own that the user
has set are left as they are.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os

import torch

LOG = logging.getLogger(__name__)

#: glibc's numbers of the parameters, from malloc.h.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -2, -3, -8
#: Free memory at the end of the heap that is kept, and the largest piece that comes from the heap,
#: in bytes: more than a step's temporaries.
_KEPT = 1 << 30
#: Other threads than the main one, and steps run in one, would get an arena of heaps of 64 MiB,
#: which glibc unmaps when they are empty, whatever the threshold. So there is one arena for all; a
#: process that has many already keeps them, and then empty heaps, by a pad as long as a heap.
_ARENAS, _PAD = 1, 64 << 20
_GLIBC_VARIABLES = (
    *("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_ARENA_MAX"),
)


def prepare_process(num_threads: int | None) -> None:
    """Choose the number of threads (`choose_threads`), keep freed memory, and log both.

    The threads are torch's, which all kernels share; both hold for the whole process.
    """
    torch.set_num_threads(choose_threads(num_threads))
    kept = "kept for the next step" if keep_freed_memory() else "given back as malloc does"
    LOG.info(
        "the engine computes with %d of %d cores; memory of a step is %s",
        torch.get_num_threads(), num_cores(), kept,
    )  # fmt: skip


def choose_threads(requested: int | None) -> int:
    """`requested`; None takes torch's setting, but leaves one core to other work on the machine
    (HTTP, Ray)."""
    return requested or min(torch.get_num_threads(), max(1, num_cores() - 1))


def share_of_cores(cpus: float) -> int:
    """Threads for a process that so many CPUs are reserved for. Below one it is no share but a
    place in a queue: all cores but one, as if nothing were reserved. Never more than there are,
    because a thread without a core delays all others."""
    cores = num_cores()
    return min(int(cpus), cores) if cpus >= 1 else max(1, cores - 1)


def num_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def keep_freed_memory() -> bool:
    """Make malloc keep freed memory. False where the C library is not glibc, or where one of
    glibc's variables says what to do."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if any(os.environ.get(name) for name in _GLIBC_VARIABLES) or "glibc.malloc." in tunables:
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return False
    settings = (
        *((_MMAP_THRESHOLD, _KEPT), (_TRIM_THRESHOLD, _KEPT)),
        *((_ARENA_MAX, _ARENAS), (_TOP_PAD, _PAD)),
    )
    taken = [mallopt(name, value) == 1 for name, value in settings]
    return all(taken)


def give_back_freed_memory() -> None:
    """Give the kernel what `keep_freed_memory` keeps, once: after a load, which frees more than a
    step will use. Nothing happens where the C library is not glibc."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
