"""For the scripts that run in other projects' environments: try a feature, write down what came.

    from recording import feature, write

`feature` runs the function at once. An exception of the client is a result like any other: its
class, its HTTP status and its text.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

_results: dict[str, dict[str, Any]] = {}


def feature(function: Callable[[], Any]) -> Callable[[], Any]:
    """Run it and record what it returns, or what it raises, under its name."""
    try:
        result: dict[str, Any] = {"value": function()}
    except Exception as error:
        result = {
            "error": type(error).__name__,
            "status": getattr(error, "status_code", None),
            "code": getattr(error, "code", None),
            "message": str(error),
        }
    _results[function.__name__] = result
    return function


def write(output: str) -> None:
    """Write everything that was recorded, as JSON."""
    Path(output).write_text(json.dumps(_results, indent=2), encoding="utf-8")
