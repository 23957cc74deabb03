"""The bytes of a body to a JSON object, at a cost that is bounded before anything is built.

requests.py calls it. A body of 4 MiB can hold two million values, which cost many times its size as
Python objects; they are counted in the bytes first. What JSON does not have, or what has no single
meaning, is refused: NaN, a key given twice, half of a surrogate pair. No sentence repeats a value.
"""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from deepseek.untrusted import json_kind
from serve_app.errors import InvalidRequest
from serve_app.limits import MAX_DEPTH, MAX_DIGITS, MAX_STRINGS, MAX_VALUES
from serve_app.openai.explain import show_field

_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_DIGITS_TO_ZERO = bytes.maketrans(b"123456789", b"000000000")
_LONG_NUMBER = b"0" * (MAX_DIGITS + 1)


class _Refused(ValueError):
    """Raised by the hooks of the JSON parser, with the end of a sentence about the body."""


def read_json_object(raw: bytes) -> dict[str, Any]:
    """The JSON object that a body holds.

    Raises:
        InvalidRequest: it is no JSON object, or holds more values or deeper nesting than the limits
            allow; code `invalid_json`.
    """
    raw = raw.removeprefix(b"\xef\xbb\xbf")  # a byte order mark, which some writers put first
    try:
        text = raw.decode("utf-8")
        _check_structure(raw)
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
        if _SURROGATE_ESCAPE.search(raw):
            _check_surrogates(value)
    except UnicodeDecodeError as error:
        raise _invalid(
            f"is not UTF-8 text (byte {error.start}), which JSON must be; convert it"
        ) from None
    except json.JSONDecodeError as error:
        raise _invalid(f"is not valid JSON: {error}") from None
    except _Refused as error:
        raise _invalid(str(error)) from None
    if not isinstance(value, dict):
        raise _invalid(f"must be a JSON object, not {json_kind(value)}")
    return value


def _invalid(reason: str) -> InvalidRequest:
    return InvalidRequest(f"the body {reason}", code="invalid_json")


def _check_structure(raw: bytes) -> None:
    """Count values, nesting and digits in the bytes. Exact for valid JSON; for anything else the
    parser that comes next finds the fault, at a cost that the counts bound too."""
    plain = raw.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in raw else raw
    _check_count(plain.count(b'"') // 2, MAX_STRINGS, "strings")
    outside = b"".join(plain.split(b'"')[::2])
    openings = outside.count(b"[") + outside.count(b"{")
    _check_count(openings, MAX_STRINGS, "objects and lists")
    _check_count(outside.count(b",") + openings, MAX_VALUES, "values")
    if _LONG_NUMBER in outside.translate(_DIGITS_TO_ZERO):
        raise _Refused(f"holds a number of more than {MAX_DIGITS} digits; shorten it")
    if openings > MAX_DEPTH:
        depth = 0
        for char in re.findall(rb"[\[\]{}]", outside):
            depth += 1 if char in b"[{" else -1
            if depth > MAX_DEPTH:
                raise _Refused(f"is nested deeper than {MAX_DEPTH} levels of JSON; flatten it")


def _check_count(count: int, limit: int, what: str) -> None:
    if count > limit:
        raise _Refused(f"holds more than {limit} {what} of JSON; split it into several requests")


def _refuse_constant(name: str) -> NoReturn:
    raise _Refused(f"is not valid JSON: {name} is no JSON number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        keys: set[str] = set()
        for key, _ in pairs:
            if key in keys:
                raise _Refused(
                    f"gives the key '{show_field(key)}' twice in one JSON object; remove one"
                )
            keys.add(key)
    return value


def _check_surrogates(value: Any) -> None:
    """Refuse halves of surrogate pairs, which no encoder can write: only an escape makes one."""
    values = [value]
    while values:
        item = values.pop()
        if isinstance(item, dict):
            values += item.keys()
            values += item.values()
        elif isinstance(item, list):
            values += item
        elif isinstance(item, str) and not item.isascii():
            try:
                item.encode()
            except UnicodeEncodeError:
                raise _Refused(
                    "is not valid JSON: a string holds half of a surrogate pair, which is no "
                    "character; cut texts between characters"
                ) from None
