"""For the scripts that read answers while the replica that makes them is killed.

    from disturbing import twice, write

The test that started the script reads its stdout and kills; it says when on its stdin. `ready`: the
next question is about to be asked, and waits for a line. `begun`: its answer is on the way.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

#: Pieces of a stream after which it has begun.
BEGUN = 5

_results: dict[str, Any] = {}


def twice(ask: Callable[[Callable[[], None]], dict[str, Any]]) -> None:
    """Ask, and ask again for the one answer that is disturbed; record both under the function's
    name. `ask` calls what it is given when its answer is on the way. An exception of the client is
    recorded as what it is."""
    calm = _told(ask, lambda: None)
    print("ready", flush=True)
    sys.stdin.readline()
    disturbed = _told(ask, lambda: print("begun", flush=True))
    _results[ask.__name__] = {"calm": calm, "disturbed": disturbed}


def _told(ask: Callable[..., dict[str, Any]], begun: Callable[[], None]) -> dict[str, Any]:
    try:
        return ask(begun)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def noticing(pieces: Iterable[Any], begun: Callable[[], None]) -> Iterable[Any]:
    """The pieces, with a word when the stream has begun."""
    for number, piece in enumerate(pieces, 1):
        if number == BEGUN:
            begun()
        yield piece


def counts(usage: Any) -> list[int]:
    """Tokens of prompt, completion and both."""
    return [usage.prompt_tokens, usage.completion_tokens, usage.total_tokens]


def write(output: str) -> None:
    """Write everything that was recorded, as JSON."""
    Path(output).write_text(json.dumps(_results), encoding="utf-8")
