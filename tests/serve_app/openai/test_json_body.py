"""Bodies as bytes: what is refused before any of it becomes an object, in sentences that repeat
nothing of it."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest

from serve_app.errors import InvalidRequest
from serve_app.limits import MAX_DEPTH, MAX_DIGITS, MAX_STRINGS, MAX_VALUES
from serve_app.openai.json_body import read_json_object

LIMIT = 4 * 2**20


def filled(head: bytes, item: bytes, tail: bytes) -> bytes:
    """A body of 4 MiB that repeats one item."""
    return head + item * ((LIMIT - len(head) - len(tail)) // len(item)) + tail


#: 4 MiB each, of the cheapest items to send and the dearest to make objects of.
HOSTILE = {
    "numbers": filled(b'{"messages": [', b"1,", b"1]}"),
    "objects": filled(b'{"messages": [', b"{},", b"{}]}"),
    "messages": filled(b'{"messages": [', b'{"role":"user"},', b"{}]}"),
    "strings": filled(b'{"prompt": [', b'"a",', b'"a"]}'),
    "lists": filled(b'{"prompt": [', b"[1],", b"[1]]}"),
    "keys": filled(b'{"a": {', b'"a":1,', b'"a":1}}'),
    "deep lists": b"[" * LIMIT,
    "deep objects": b'{"a":' * (LIMIT // 5),
    "a long integer": b'{"n": ' + b"1" * LIMIT + b"}",
    "a long float": b'{"n": 0.' + b"1" * LIMIT + b"}",
    "integers": filled(b'{"prompt": [', b"1" * 4000 + b",", b"1]}"),
    "quotes": b'"' * LIMIT,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_body_of_too_many_values_is_refused_before_it_is_parsed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parsed(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the body was parsed")

    monkeypatch.setattr(json, "loads", parsed)
    with pytest.raises(InvalidRequest, match=r"the body (holds|is nested)") as caught:
        read_json_object(HOSTILE[name])
    assert caught.value.code == "invalid_json"


@pytest.mark.parametrize("name", HOSTILE)
def test_refusing_a_body_takes_few_times_its_size(name: str) -> None:
    raw = HOSTILE[name]
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest):
            read_json_object(raw)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5 * len(raw)


def body(inner: str) -> bytes:
    return f'{{"a": {inner}}}'.encode()


def test_the_limits_count_what_is_outside_strings() -> None:
    marks = r"[{,:\\\"]" * (2 * MAX_STRINGS)
    assert read_json_object(body(f'"{marks}"')) == {"a": json.loads(f'"{marks}"')}
    assert read_json_object(body(f'"{"1" * 9999}"')) == {"a": "1" * 9999}
    numbers = ",".join("1" * (MAX_VALUES - 1))
    assert len(read_json_object(body(f"[{numbers}]"))["a"]) == MAX_VALUES - 1
    with pytest.raises(InvalidRequest, match=f"more than {MAX_VALUES} values"):
        read_json_object(body(f"[{numbers},1]"))


def test_a_body_may_be_as_deep_and_its_numbers_as_long_as_the_limits() -> None:
    depth = MAX_DEPTH - 1  # the body itself is one level
    read_json_object(body("[" * depth + "]" * depth))
    with pytest.raises(InvalidRequest, match=f"deeper than {MAX_DEPTH} levels"):
        read_json_object(body("[" * (depth + 1) + "]" * (depth + 1)))
    assert read_json_object(body("[" + "[]," * 99 + "1]"))  # many, and not deep
    read_json_object(body("1" * MAX_DIGITS))
    with pytest.raises(InvalidRequest, match="more than 128 digits"):
        read_json_object(body("1" * (MAX_DIGITS + 1)))


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b'{"SECRET": NaN}', "NaN is no JSON number"),
        (b'{"SECRET": -Infinity}', "-Infinity is no JSON number"),
        (b'{"a": 1, "b": 2, "a": 3}', "gives the key 'a' twice"),
        (b'{"a": "SECRET \\ud800"}', "half of a surrogate pair"),
        (b'{"\\udfff": 1}', "half of a surrogate pair"),
        (b'{"a": "SECRET\n"}', "Invalid control character"),
        (b'{"a": "SECRET" 1}', "Expecting ',' delimiter"),
        ('{"a": "é"}'.encode("latin-1"), r"not UTF-8 text \(byte 7\)"),
        ('{"a": 1}'.encode("utf-16"), r"not UTF-8 text \(byte 0\)"),
        (b"[1]", "must be a JSON object, not a list"),
        (b'"x"', "must be a JSON object, not a string"),
        (b"null", "must be a JSON object, not null"),
        (b'\\"{"a": 1}', "Expecting value"),
        (b'{"a": "\\\\"', "Expecting ',' delimiter"),
    ],
)
def test_what_json_does_not_have_is_refused_and_not_repeated(raw: bytes, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        read_json_object(raw)
    assert caught.value.code == "invalid_json"
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("key", ["k" * 2**20, "\u202e", "\x1b[2J"])
def test_a_key_given_twice_is_cut_and_printable(key: str) -> None:
    raw = f"{{{json.dumps(key)}: 1, {json.dumps(key)}: 2}}".encode()
    with pytest.raises(InvalidRequest, match="twice") as caught:
        read_json_object(raw)
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


def test_what_clients_write_oddly_is_read() -> None:
    assert read_json_object(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}
    assert read_json_object(b' \r\n\t{"a": "\\ud83d\\ude00\\u0000"} ') == {"a": "\U0001f600\x00"}
