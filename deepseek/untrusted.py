"""Reads small files that IntServe did not write: config, index, tokenizer files, recipes, records.

Such a file may be anything: a FIFO, a device, a link to a private key, text in another encoding,
JSON that is nested without end. `read_bytes` and `parse_json` refuse all of that in one sentence
before memory or time is spent on it. Tensor data is read by `tensor_files.py`. This file imports no
torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

#: Largest JSON or template file that is read. The largest of the release's own is its index, 8.9 MB
#: for 91,991 names; tokenizer files of the family have at most 20 MB.
MAX_FILE_BYTES = 64 << 20
#: Deepest nesting of objects and lists; the release's tokenizer.json has 7.
MAX_DEPTH = 64
#: Most characters of a value or a name in a sentence.
_SHOWN = 120


class UnusableFileError(Exception):
    """Why a file cannot be used, and what to change. The caller puts the file's name before it and
    raises its own kind of error.

    `masked` is the sentence for a file of secrets: it repeats nothing that the file holds. Whoever
    reads such a file shows it in place of the message, and drops the traceback's cause.
    """

    def __init__(self, message: str, *, masked: str | None = None) -> None:
        super().__init__(message)
        self.masked = message if masked is None else masked


def read_bytes(path: Path, *, root: Path | None = None, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """The content of a regular file of at most `max_bytes`.

    `root` is the directory that the file belongs to: a symbolic link must then end inside it (see
    `check_inside`). Without `root` links are followed, for files that the user named.

    Raises:
        UnusableFileError: absent, unreadable, not a regular file, too large, or a link that leaves
            its directory.
    """
    with contextlib.ExitStack() as stack:
        descriptor = open_regular(path, root=root)
        stack.callback(os.close, descriptor)
        size = os.fstat(descriptor).st_size
        if size > max_bytes:
            raise UnusableFileError(
                f"has {size} bytes, more than the {max_bytes} that such a file may have"
            )
        chunks: list[bytes] = []
        total = 0
        while total <= max_bytes:  # a file may grow while it is read
            try:
                chunk = os.read(descriptor, min(max_bytes + 1 - total, 1 << 22))
            except OSError as error:
                raise UnusableFileError(f"cannot be read ({error.strerror})") from error
            if not chunk:
                return b"".join(chunks)
            chunks.append(chunk)
            total += len(chunk)
    raise UnusableFileError(f"has more than the {max_bytes} bytes that such a file may have")


def open_regular(path: Path, *, root: Path | None = None) -> int:
    """Open a regular file for reading and return its descriptor, which the caller closes. Never
    blocks, which opening a FIFO would.

    Raises:
        UnusableFileError: as `read_bytes`, except for the size.
    """
    if root is not None:
        check_inside(path, root)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UnusableFileError(f"cannot be read ({error.strerror})") from error
    except ValueError as error:  # a NUL byte in the name
        raise UnusableFileError("is no name of a file") from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise UnusableFileError(f"is {_kind(mode)}, not a regular file; replace it")
    return descriptor


def check_inside(path: Path, root: Path) -> None:
    """Check that `path`, all links followed, lies in the directory `root`.

    A snapshot of the Hugging Face hub's cache (`models--*/snapshots/REVISION`) consists of links
    into `blobs` of the same repository, which is allowed too.

    Raises:
        UnusableFileError: it lies elsewhere.
    """
    try:
        target, inside = path.resolve(), root.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: links in a circle
        raise UnusableFileError(f"cannot be read ({error})") from error
    allowed = [inside]
    if inside.parent.name == "snapshots":
        allowed.append(inside.parent.parent / "blobs")
    if not any(target.is_relative_to(folder) for folder in allowed):
        raise UnusableFileError(
            "is a link to a file outside its directory, which is not followed; put the file itself "
            "there"
        )


def decode_text(data: bytes) -> str:
    """The text of a file in UTF-8; a byte order mark is its first character.

    Raises:
        UnusableFileError: it is in another encoding.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnusableFileError(
            f"is not UTF-8 text (byte {error.start}); convert it to UTF-8"
        ) from error


def parse_json(data: bytes) -> Any:
    """The value of a JSON text (RFC 8259) in UTF-8, with or without a byte order mark.

    Refuses what JSON does not have or what has no single meaning: NaN and Infinity, a key given
    twice in one object, half of a surrogate pair, nesting deeper than MAX_DEPTH.

    Raises:
        UnusableFileError: it is not such a text; the sentence says where.
    """
    text = decode_text(data).removeprefix("\ufeff")
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)
    except RecursionError as error:
        raise UnusableFileError(f"is nested deeper than {MAX_DEPTH} levels") from error
    except ValueError as error:  # also an integer of more digits than Python converts
        raise UnusableFileError(f"is not valid JSON: {error}") from error
    _check_values(value)
    return value


def parse_json_object(data: bytes) -> dict[str, Any]:
    """Like `parse_json`, for a text whose value must be an object.

    Raises:
        UnusableFileError: it is not JSON, or is a value of another kind.
    """
    value = parse_json(data)
    if not isinstance(value, dict):
        raise UnusableFileError(f"must hold a JSON object, not {json_kind(value)}")
    return value


def read_json_object(
    path: Path, *, root: Path | None = None, max_bytes: int = MAX_FILE_BYTES
) -> dict[str, Any]:
    """The JSON object that a file holds; see `read_bytes` and `parse_json` for the errors."""
    return parse_json_object(read_bytes(path, root=root, max_bytes=max_bytes))


def show(value: Any) -> str:
    """A value of a file that others wrote, for a sentence: as Python writes it, on one line, and
    not longer than a sentence bears."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python converts
        text = f"an integer of {value.bit_length()} bits"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 4]}..."


def show_name(name: str) -> str:
    """A name in a file that others wrote, for a sentence: as it is where it is harmless text."""
    return name if name.isprintable() and len(name) <= _SHOWN else show(name)


def json_kind(value: Any) -> str:
    """What JSON calls a value: `null`, `a list`, `a string`, ..."""
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    kinds |= {list: "a list", dict: "an object"}
    return "null" if value is None else kinds[type(value)]


def _check_values(value: Any) -> None:
    """Refuse deep nesting and halves of surrogate pairs, which cannot be written anywhere."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH + 1):
        children: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                children += item.keys()
                children += item.values()
            elif isinstance(item, list):
                children += item
            elif isinstance(item, str) and not item.isascii():
                _check_characters(item)
        if not children:
            return
        level = children
    raise UnusableFileError(f"is nested deeper than {MAX_DEPTH} levels")


def _check_characters(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UnusableFileError(
            f"holds half of a surrogate pair in {text[:40]!r}, which is no character; correct it"
        ) from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {twice[:80]!r} is given twice")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a directory"
    if stat.S_ISFIFO(mode):
        return "a pipe"
    if stat.S_ISSOCK(mode):
        return "a socket"
    return "a device"
