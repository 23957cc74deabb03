"""How much memory this process may use. This file imports no torch."""

from __future__ import annotations

import os
from pathlib import Path

#: Limits of control groups, version 2 and 1, as a container sees its own.
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
#: Usage of the same groups, and where their statistics count the page cache: file, key.
_USAGE = (
    ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat", "file"),
    (
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
        "total_cache",
    ),
)


def host_memory_bytes(limits: tuple[str, ...] = _LIMITS) -> int:
    """The machine's memory in bytes, or what its container allows where that is less. `limits` are
    files that hold one number each, or a word where there is no limit."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([total, *(limit for name in limits if (limit := _number(name)) is not None)])


def available_memory_bytes(root: str = "/") -> int:
    """What this process may still take, with the page cache counted as free: of the machine, or of
    its container where that is less."""
    place = Path(root)
    available = host_memory_bytes(())
    for line in _lines(place / "proc/meminfo"):
        if line[0] == "MemAvailable:":
            available = 1024 * int(line[1])
    for limit_name, (usage_name, statistics, key) in zip(_LIMITS, _USAGE, strict=True):
        limit, usage = (_number(place / name.lstrip("/")) for name in (limit_name, usage_name))
        if limit is not None and usage is not None:
            cached = [
                int(line[1]) for line in _lines(place / statistics.lstrip("/")) if line[0] == key
            ]
            available = min(available, limit - usage + sum(cached))
    return max(available, 0)


def _number(name: str | Path) -> int | None:
    """The number that a file holds; None where there is no such file or number."""
    lines = _lines(name)
    return int(lines[0][0]) if lines and lines[0][0].isdecimal() else None


def _lines(name: str | Path) -> list[list[str]]:
    """The words of a file's lines; nothing where it cannot be read."""
    try:
        text = Path(name).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return []
    return [line.split() for line in text.splitlines() if line.strip()]
