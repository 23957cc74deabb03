"""The deadline that a client sets for its request: the header `X-Request-Deadline: SECONDS`."""

from __future__ import annotations

import re

from starlette.datastructures import Headers

from serve_app.errors import InvalidRequest

HEADER = "X-Request-Deadline"

#: A decimal number: no sign, no exponent, no infinity.
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?", re.ASCII)


def own_deadline_s(headers: Headers) -> float | None:
    """Seconds from the request's arrival within which its client wants the whole answer; None
    without the header.

    Raises:
        InvalidRequest: the header is no positive number, or there are several.
    """
    values = headers.getlist(HEADER)
    if not values:
        return None
    text = values[0].strip(" \t")
    if len(values) > 1 or not _SECONDS.fullmatch(text) or float(text) <= 0.0:
        raise InvalidRequest(
            f"the header {HEADER} is no single positive number of seconds, such as 12.5; correct "
            "or remove it",
            param=HEADER,
        )
    return float(text)
