"""How much memory this process may use. This file imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

#: Limits of control groups, version 2 and 1, as a container sees its own.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def host_memory_bytes(limits: tuple[str, ...] = _LIMITS) -> int:
    """The machine's memory in bytes, or what its container allows where that is less. `limits` are
    files that hold one number each, or a word where there is no limit."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in limits:
        try:
            text = Path(name).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            continue
        if text.isdecimal():
            total = min(total, int(text))
    return total
