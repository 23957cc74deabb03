"""What was done with the double, one JSON object a line, and what was done wrongly.

Several processes may append to one journal: each line is one write. A violation is an event of that
name with a `kind`; depending on TRTLLM_DOUBLE_STRICT it also ends the process (`exit`, the default:
a test whose worker misuses the engine cannot pass), raises, or is only recorded.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

_PATH = os.environ.get("TRTLLM_DOUBLE_JOURNAL")
_STRICT = os.environ.get("TRTLLM_DOUBLE_STRICT", "exit")
#: Exit status of a process that misused the double.
EXIT_STATUS = 86


class Violation(BaseException):
    """The double was used in a way that the real one answers with trouble later. No `Exception`, so
    that no handler of engine errors hides it."""


def record(event: str, **fields: Any) -> None:
    """Append one event; without a journal, do nothing."""
    if _PATH is None:
        return
    line = json.dumps({"event": event, "pid": os.getpid(), "at": time.monotonic(), **fields})
    descriptor = os.open(_PATH, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, f"{line}\n".encode())
    finally:
        os.close(descriptor)


def violate(kind: str, message: str, *, refused: bool = False, **fields: Any) -> None:
    """Record a violation, and answer it as TRTLLM_DOUBLE_STRICT says. One that is `refused` raises
    what the real one raises, after this returns.

    Raises:
        Violation: if it says `raise`, and the real one takes it in silence.
    """
    record("violation", kind=kind, message=message, **fields)
    if _STRICT == "raise" and not refused:
        raise Violation(f"{kind}: {message}")
    if _STRICT == "exit":
        print(f"tensorrt_llm double: {kind}: {message}", file=sys.stderr, flush=True)
        os._exit(EXIT_STATUS)
