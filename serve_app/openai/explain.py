"""Sentences for what is wrong with a body. None of them repeats a value, which may be part of a
prompt; names of fields are the client's text too, so they are cut and made printable."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from typing import Any

from deepseek.text import visible
from serve_app.errors import InvalidRequest

#: Longest name of a field that gets a suggestion; all real names are shorter.
_MAX_GUESSED = 64
#: Most characters of a client's own name for a field in a sentence.
_MAX_NAME = 100


def join_place(*parts: str | int) -> str:
    """The path of a field, like `messages.0.content`."""
    return ".".join(show_field(str(part)) for part in parts if part != "")


def show_field(name: str) -> str:
    """A name of a field, for a sentence: printable and of bounded length."""
    seen = visible(name[:_MAX_NAME])
    return seen if len(seen) <= _MAX_NAME and len(name) <= _MAX_NAME else f"{seen[:_MAX_NAME]}..."


def unsupported_field(place: str) -> InvalidRequest:
    return InvalidRequest(
        f"field '{place}' is not supported by this server; remove it",
        param=place,
        code="unsupported_field",
    )


def unknown_field(
    name: str, place: str, known: Collection[str], others: Collection[str]
) -> InvalidRequest:
    """`known` are the names of the object's fields that are implemented, `others` the rest."""
    path = join_place(place, name)
    near = []
    if len(name) <= _MAX_GUESSED:
        near = difflib.get_close_matches(name, known, n=1) or difflib.get_close_matches(
            name, others, n=1
        )
    hint = f"; did you mean {near[0]!r}?" if near else "; remove it"
    return InvalidRequest(f"unknown field '{path}'{hint}", param=path, code="unknown_field")


def misplaced_field(name: str, endpoint: str) -> InvalidRequest:
    return InvalidRequest(
        f"field {name!r} belongs to {endpoint}; send it there",
        param=name,
        code="unsupported_field",
    )


def missing_field(place: str) -> InvalidRequest:
    return InvalidRequest(f"field '{place}' is required", param=place, code="missing_field")


def wrong_value(place: str, reason: str) -> InvalidRequest:
    """`reason` ends the sentence that begins with the place: `must be ...`, `holds ...`."""
    return InvalidRequest(f"{place}: {reason}", param=place)


def explain(item: Any) -> InvalidRequest:
    """One sentence for one of pydantic's errors."""
    place = join_place(*item["loc"])
    if item["type"] == "missing":
        return missing_field(place)
    return wrong_value(place, item["msg"].removeprefix("Value error, "))
