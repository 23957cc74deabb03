"""What an engine of others tells, taken for what it can be: its types and ranges are not ours."""

from __future__ import annotations

import math
from typing import Any

from .backend import LoadError
from .messages import Start

#: Stands for a logprob of minus infinity or NaN, which JSON has not.
_LEAST_LOGPROB = -9999.0


def finite(value: Any) -> float:
    """A logprob as a number that JSON has."""
    number = float(value)
    return number if math.isfinite(number) else _LEAST_LOGPROB


def count(value: Any, before: int | None) -> int | None:
    """A number from 0 on; `before` where it is none."""
    return value if isinstance(value, int) and value >= 0 else before


def positive(owner: Any, name: str) -> int | None:
    """An attribute that is a number from 1 on, None where it is none."""
    value = getattr(owner, name, None)
    return value if isinstance(value, int) and value > 0 else None


def checked_version(package: Any, engine: str, start: Start) -> str:
    """The version of the package of `engine`, a name for people.

    Raises:
        LoadError: it is another one than the directory was built for.
    """
    version = str(getattr(package, "__version__", "unknown"))
    if start.engine_version not in (None, version.partition("+")[0]):
        raise LoadError(
            f"the environment has {engine} {version}, but the engine directory was built for "
            f"{start.engine_version}; make the environment anew, or build for this version"
        )
    return version
