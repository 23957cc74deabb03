"""The access log: one JSON line per request, without a word of its prompt or its answer.

`AccessLog.write` never waits: a thread writes what a bounded queue holds. What finds no room there,
and what a full disk does not take, is lost, counted and told once a minute; no request waits or
fails for it.

Each line is one `write` to a file that is open for appending, so that all ingress replicas of a
node may share it. A file that was moved away or deleted (log rotation) is noticed within a second,
and made again. telemetry/request.py says what is in a line.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import queue
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from deepseek.errors import ConfigError

log = logging.getLogger("ray.serve")

#: Lines that wait for the thread.
MAX_WAITING = 8192
#: Bytes of a line at most: what a pipe, too, takes whole. A longer one has its lists cut.
MAX_LINE_BYTES = 4096
#: Seconds between two looks whether the file is still the one that is open.
REOPEN_S = 1.0
#: Seconds between two warnings of lost lines, and for which `close` waits for the thread.
_WARN_S = 60.0
_CLOSE_S = 2.0

Target = Path | Literal["stderr"]


def check_target(target: Target | None) -> None:
    """Raises ConfigError, in one sentence, if lines cannot be appended to `target`. Makes it."""
    if target is not None and target != "stderr":
        os.close(_open(Path(target)))


def _open(path: Path) -> int:
    # Without waiting: a named pipe that nobody reads would hold the opener for good.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY | os.O_NONBLOCK
    try:
        return os.open(path, flags, 0o640)
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        if error.errno == errno.ENXIO:
            reason = "a pipe that nobody reads"
        raise ConfigError(
            f"telemetry.access_log: {path} cannot be appended to ({reason}); name a file in a "
            "directory that exists and may be written"
        ) from error


class AccessLog:
    """Writes lines to one file, or to stderr. `note_lost` is called with each number of lines that
    are lost, in whichever thread notices it.

    Raises:
        ConfigError: the file cannot be opened.
    """

    def __init__(
        self,
        target: Target,
        note_lost: Callable[[int], None] = lambda number: None,
        *,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        self._path = None if target == "stderr" else Path(target)
        self._file = 2 if self._path is None else _open(self._path)
        self._note_lost = note_lost
        self._lost = 0
        self._warned = -_WARN_S
        self._checked = time.monotonic()
        #: Whether the last line in the file may lack its end.
        self._torn = False
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue(max_waiting)
        self._thread = threading.Thread(target=self._run, name="access-log", daemon=True)
        self._thread.start()

    def write(self, record: dict[str, Any]) -> None:
        """Log one request. Returns at once. `record` must not change any more."""
        try:
            self._lines.put_nowait(record)
        except queue.Full:
            self._lose("the thread that writes it does not keep up")

    def close(self) -> None:
        """Write what waits, for a moment at most. Idempotent."""
        try:
            self._lines.put(None, timeout=_CLOSE_S)
        except queue.Full:
            return
        self._thread.join(_CLOSE_S)

    def _run(self) -> None:
        while (record := self._lines.get()) is not None:
            try:
                self._reopen_moved()
                self._append(make_line(record))
            except (OSError, ConfigError, ValueError, TypeError) as error:
                self._lose(str(error))
        if self._path is not None:
            os.close(self._file)

    def _append(self, line: bytes) -> None:
        data = b"\n" + line if self._torn else line
        written = os.write(self._file, data)
        self._torn = written != len(data)
        if self._torn:
            raise OSError(errno.ENOSPC, "only a part of the line could be written")

    def _reopen_moved(self) -> None:
        """Open the path again if another file, or none, lies there."""
        now = time.monotonic()
        if self._path is None or now - self._checked < REOPEN_S:
            return
        self._checked = now
        mine = os.fstat(self._file)
        if not stat.S_ISREG(mine.st_mode):
            return
        try:
            there = os.stat(self._path)
            if (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino):
                return
        except FileNotFoundError:
            pass
        file = _open(self._path)
        os.close(self._file)
        self._file, self._torn = file, False

    def _lose(self, reason: str) -> None:
        self._lost += 1
        self._note_lost(1)
        now = time.monotonic()
        if now - self._warned >= _WARN_S:
            self._warned = now
            log.warning("the access log has lost %d lines so far: %s", self._lost, reason)


def make_line(record: dict[str, Any]) -> bytes:
    """The record as one line of JSON, of at most MAX_LINE_BYTES."""
    line = _dump(record)
    if len(line) > MAX_LINE_BYTES:
        line = _dump({name: _cut(value) for name, value in record.items()} | {"cut": True})
    return line


def _dump(record: dict[str, Any]) -> bytes:
    # ASCII: a line is a line to every reader, whatever a name holds.
    return json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _cut(value: Any) -> Any:
    if isinstance(value, str):
        return value[:24]
    return value[:4] if isinstance(value, list) else value
