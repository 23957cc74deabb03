"""What an engine's processes print: passed on, and their last errors kept.

vLLM's constructor runs in processes of its own and says of a failure only that it is told above.
What is told there, one line of a traceback of a rank, is what a person needs.
"""

from __future__ import annotations

import array
import fcntl
import os
import re
import termios
import threading
import time
from collections.abc import Iterator

#: `(Worker_TP3 pid=12) ERROR 11-26 20:46:32 [FILE:LINE] ` before a line of a log.
_HEAD = re.compile(r"^\(([\w-]+) pid=(\d+)\) (?:[A-Z]+ [\d-]+ [\d:]+ \[[^\]]*\] ?)?")
#: The last line of a traceback, or a line of a log that names an exception at its beginning.
_ERROR = re.compile(r"^(?:[a-z_]\w*\.)*([A-Z]\w*(?:Error|Exception|Interrupt|Exit)): (.+)")
#: Errors that only say that there was another.
_ECHO = (
    "root cause above",
    "see stack trace",
    "initialization failed",
    "encountered an issue",
    "executor failed",
)
_OUT_OF_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "is less than requested memory",
    "is less than desired gpu memory utilization",
)
#: Characters of a line that are looked at, and errors that are kept.
_LINE, _KEPT = 2000, 16
_LATE_S = 0.5
#: Seconds for what this process printed itself to be passed on before it ends.
_DRAIN_S = 0.5
#: Reading ends of the pipes of this process.
_PIPES: list[int] = []


class Said:
    """Reads what this process and those below it print from `tee` on; `cause` is the first error
    since. `late_s` is for the last words of a process that has ended to arrive."""

    def __init__(self, late_s: float = _LATE_S) -> None:
        self._late_s = late_s
        self._errors: list[tuple[str, str]] = []
        self._rest = b""

    def tee(self) -> None:
        """Put a pipe in the place of stdout and stderr, whose reader passes everything on."""
        reader, writer = os.pipe()
        out = os.dup(1)
        for number in (1, 2):
            os.dup2(writer, number)
        os.close(writer)
        _PIPES.append(reader)
        threading.Thread(target=self._pass_on, args=(reader, out), daemon=True).start()

    def cause(self) -> tuple[str, bool] | None:
        """The first error that is told, with the process that told it, and whether it says that
        memory ran out; None without any."""
        time.sleep(self._late_s)
        for who, what in self._errors:
            said = f"{who}: {what}" if who else what
            return said, is_out_of_memory(what)
        return None

    def forget(self) -> None:
        """What was said so far had no consequence."""
        self._errors.clear()

    def read(self, data: bytes) -> None:
        """Note the errors in what was printed."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        self._rest = self._rest[-_LINE:]
        for raw in lines:
            self._errors += self._error(raw[:_LINE].decode(errors="replace").rstrip())
        del self._errors[_KEPT:]

    def _error(self, line: str) -> Iterator[tuple[str, str]]:
        head = _HEAD.match(line)
        found = _ERROR.match(line[head.end() :] if head else line)
        if found and not any(word in found[2].lower() for word in _ECHO):
            yield (f"{head[1]} (process {head[2]})" if head else ""), f"{found[1]}: {found[2]}"

    def _pass_on(self, reader: int, out: int) -> None:
        while data := os.read(reader, 1 << 16):
            self.read(data)
            view = memoryview(data)
            while view:
                view = view[os.write(out, view) :]


def drain() -> None:
    """Wait until what was printed is passed on, before `os._exit` ends the thread that does it."""
    deadline = time.monotonic() + _DRAIN_S
    for reader in _PIPES:
        left = array.array("i", [1])
        while left[0] and time.monotonic() < deadline:
            fcntl.ioctl(reader, termios.FIONREAD, left)
            time.sleep(0.01)  # also for what the thread has taken and not written yet


def is_out_of_memory(sentence: str) -> bool:
    """Whether an error says that memory ran out."""
    return any(words in sentence.lower() for words in _OUT_OF_MEMORY) or "OutOfMemory" in sentence
