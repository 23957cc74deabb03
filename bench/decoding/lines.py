"""A worker's side of the conversation: a JSON object per line in, one per line out.

`{"call": "decode", "batch": 4}` is answered by what the function `decode` returns. A worker reads
only while it has nothing to do, so between two calls its process sleeps. What libraries print goes
to stderr. Standard library alone: a worker of another project's environment imports this file too.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any


def answer(calls: dict[str, Callable[..., Any]]) -> None:
    """Answer calls until the input ends. An exception ends the process, with its traceback."""
    with os.fdopen(os.dup(1), "w") as output:
        os.dup2(2, 1)
        for line in sys.stdin:
            message = json.loads(line)
            answer = calls[message.pop("call")](**message)
            output.write(json.dumps(answer) + "\n")
            output.flush()
