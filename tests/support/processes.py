"""The processes below a command that was started: their CPU seconds, memory, files, and names."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[str]:
    text = Path(f"/proc/{pid}/stat").read_text()
    return text[text.rindex(")") + 2 :].split()


def tree(pid: int) -> list[int]:
    """The process and all of its descendants that are alive."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int(_stat(int(entry.name))[1])
            except (OSError, ValueError):
                continue
    found = [pid]
    for known in found:
        found.extend(child for child, parent in parents.items() if parent == known)
    return [known for known in found if known in parents]


def cpu_seconds(pids: list[int]) -> float:
    """User and system seconds of these processes, those that have ended left out."""
    total = 0
    for pid in pids:
        try:
            fields = _stat(pid)
        except OSError:
            continue
        total += int(fields[11]) + int(fields[12])
    return total / _TICKS


def title(pid: int) -> str:
    """What the process calls itself, as `ps` shows it."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
    except OSError:
        return ""


def cpu_by_part(
    pid: int, parts: Sequence[tuple[str, tuple[str, ...]]], others: str
) -> dict[str, float]:
    """CPU seconds of the process and its descendants by what they are: the first of `parts` (its
    name, and words of titles) that has words of a process's title, else `others`."""
    found: dict[str, float] = {}
    for child in tree(pid):
        words = title(child)
        part = next((name for name, marks in parts if any(mark in words for mark in marks)), others)
        found[part] = found.get(part, 0.0) + cpu_seconds([child])
    return found


def named(pid: int, words: str) -> list[int]:
    """Descendants of `pid` whose title has these words."""
    return [child for child in tree(pid) if words in title(child)]


def holding(pid: int, name: str) -> list[int]:
    """Descendants of `pid` that have a file of this name open."""
    return [child for child in tree(pid) if name in _open_names(child)]


def _open_names(pid: int) -> set[str]:
    folder = Path(f"/proc/{pid}/fd")
    names = set()
    try:
        for entry in folder.iterdir():
            with contextlib.suppress(OSError):
                names.add(entry.readlink().name)
    except OSError:
        pass
    return names


def memory_mb(pid: int) -> float:
    """Resident memory, 0 for a process that has ended."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return 0.0


def open_files(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0
