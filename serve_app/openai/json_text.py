"""JSON texts of answers. Large ones are written in a thread, list by list in slices.

`json.dumps` holds the interpreter for the whole text that it writes, also in a thread: half a
second for the logprobs of a long prompt, in which no other stream moves. A slice takes
milliseconds.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

#: Items of a list that are written at a time.
SLICE = 512
#: Logprobs above which an answer is made in a thread.
LARGE = 2048


def dumps(value: Any) -> str:
    """Compact JSON of dicts with string keys, of lists and of plain values.

    Raises:
        ValueError: it holds NaN or an infinity, which JSON has not.
    """
    if isinstance(value, dict) and any(isinstance(item, dict | list) for item in value.values()):
        return f"{{{','.join(f'{_plain(str(key))}:{dumps(item)}' for key, item in value.items())}}}"
    if isinstance(value, list) and len(value) > SLICE:
        slices = (value[begin : begin + SLICE] for begin in range(0, len(value), SLICE))
        return f"[{','.join(_plain(some)[1:-1] for some in slices)}]"
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return f"[{','.join(map(dumps, value))}]"
    return _plain(value)


async def make_text(make: Callable[[], Any], num_logprobs: int) -> bytes:
    """The JSON text of what `make` returns, in UTF-8; beside the event loop where `num_logprobs`
    make it large."""
    if num_logprobs > LARGE:
        return await asyncio.to_thread(lambda: dumps(make()).encode())
    return _plain(make()).encode()


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
