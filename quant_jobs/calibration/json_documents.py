"""Records in JSON: one a line, or the elements of one list.

Lines are found from any position. A list is read from its beginning, because nothing else shows
where an element begins; only those elements are parsed that are wanted.
"""

from __future__ import annotations

import codecs
import io
import json
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from deepseek.errors import CalibrationError
from quant_jobs.calibration.documents import MAX_DOCUMENT_BYTES, Document, DocumentFile, spread
from quant_jobs.calibration.records import Content, RecordError, read_record

#: Deepest nesting of an element of a list.
MAX_DEPTH = 64
_CHUNK_BYTES = 1 << 20
_SPACE = b" \t\r\n"
#: A string, whole or cut off by the end of the buffer; or a bracket.
_TOKEN = re.compile(rb'"(?:[^"\\]+|\\.)*+("?)|[\[\]{}]', re.DOTALL)


def open_json(kind: str, path: Path, file: io.BufferedReader) -> DocumentFile:
    """The reader of a file in JSON; a `.json` is looked at to see which form it has.

    Raises:
        CalibrationError: it is neither a list, nor lines, nor an object with a list `data`.
    """
    first = _skip_mark(file)
    while (byte := file.read(1)) and byte in _SPACE:
        first += 1
    if not byte:
        raise CalibrationError(f"{path} is empty; give a text file")
    if kind == "jsonl":
        return JsonLines(path, file)
    if byte == b"[":
        return JsonList(path, file, first, in_object=False)
    if byte != b"{":
        raise CalibrationError(
            f"{path} holds neither a list nor an object of JSON; give it a list of records"
        )
    file.seek(first)
    try:
        value = json.loads(file.readline(MAX_DOCUMENT_BYTES))
    except (ValueError, RecursionError):
        value = None  # an object over several lines
    if isinstance(value, dict) and not isinstance(value.get("data"), list):
        return JsonLines(path, file)
    return JsonList(path, file, first, in_object=True)


def _skip_mark(file: io.BufferedReader) -> int:
    """Go to the beginning of the text, behind a byte order mark, and return its position."""
    file.seek(0)
    if file.read(3) == codecs.BOM_UTF8:
        return 3
    file.seek(0)
    return 0


class JsonLines:
    """One record a line. Positions are bytes. Blank lines may stand at the end."""

    is_stream = False

    def __init__(self, path: Path, file: io.BufferedReader) -> None:
        self.path = path
        self.length = os.fstat(file.fileno()).st_size
        self._file = file
        self._first = _skip_mark(file)

    def fits(self, num_bytes: int) -> bool:
        return self.length <= num_bytes

    def starts(self, count: int) -> list[int]:
        return spread(self.length, count)

    def at(self, position: int, most: int) -> Document | None:
        begin = min(position, self.length)
        while begin > self._first:  # back to the end of the line before
            size = min(_CHUNK_BYTES, begin - self._first)
            self._file.seek(begin - size)
            found = self._file.read(size).rfind(b"\n")
            if found >= 0:
                begin += found + 1 - size
                break
            begin -= size
        return next(self.documents(begin, begin + 1, most), None)

    def documents(self, begin: int, end: int, most: int) -> Iterator[Document]:
        position = self._line_start(begin)
        blank: int | None = None
        while position < end:
            self._file.seek(position)
            line = self._file.readline(MAX_DOCUMENT_BYTES + 1)
            if len(line) > MAX_DOCUMENT_BYTES:
                raise CalibrationError(
                    f"{self._place(position)}: has more than {MAX_DOCUMENT_BYTES} bytes; split the "
                    "document, and end each with a line feed"
                )
            here, position = position, position + len(line)
            if not line.strip():
                blank = here if blank is None else blank
                continue
            if blank is not None:
                raise CalibrationError(
                    f"{self._place(blank)}: not JSON (a blank line before others); take it out"
                )
            place = partial(self._place, here)
            yield Document(here, position, _parse(line, place), place)

    def _line_start(self, position: int) -> int:
        """The first line that begins at `position` or behind it."""
        if position <= self._first:
            return self._first
        self._file.seek(position - 1)
        while piece := self._file.readline(_CHUNK_BYTES):
            if piece.endswith(b"\n"):
                break
        return self._file.tell()

    def _place(self, position: int) -> str:
        """File and line number; only made for an error, because lines must be counted for it."""
        self._file.seek(0)
        number, left = 1, position
        while left and (chunk := self._file.read(min(left, _CHUNK_BYTES))):
            number += chunk.count(b"\n")
            left -= len(chunk)
        return f"{self.path}, line {number}"


class JsonList:
    """The elements of a list, which is the whole text or stands under `data` of an object.
    Positions are bytes; what separates two elements belongs to the first."""

    is_stream = False

    def __init__(self, path: Path, file: io.BufferedReader, first: int, *, in_object: bool) -> None:
        self.path = path
        self.length = os.fstat(file.fileno()).st_size
        self._file = file
        self._first = first
        self._in_object = in_object
        self._elements: Iterator[tuple[int, int, bytes]] = iter(())
        #: Number, position and bytes of the element in hand, and of the one after it.
        self._current: tuple[int, int, bytes] | None = None
        self._following: tuple[int, int, bytes] | None = None

    def fits(self, num_bytes: int) -> bool:
        return self.length <= num_bytes

    def starts(self, count: int) -> list[int]:
        return spread(self.length, count)

    def at(self, position: int, most: int) -> Document | None:
        self._go_to(position)
        return self._document() if self._current else None

    def documents(self, begin: int, end: int, most: int) -> Iterator[Document]:
        self._go_to(begin)
        if self._current is not None and self._current[1] < begin:
            self._advance()
        while self._current is not None and self._current[1] < end:
            here = self._current[1]
            yield self._document()
            self._go_to(here)  # another reader may have been here meanwhile
            self._advance()

    def _go_to(self, position: int) -> None:
        """Take in hand the element at a position, or the first one where none is before it."""
        if self._current is None or position < self._current[1]:  # elements are found in order
            self._elements = _Scanner(self.path, self._file, self._first).elements(self._in_object)
            self._following = next(self._elements, None)
            self._advance()
        while self._following is not None and self._following[1] <= position:
            self._advance()

    def _advance(self) -> None:
        self._current = self._following
        self._following = next(self._elements, None)

    def _document(self) -> Document:
        assert self._current is not None
        number, here, data = self._current
        end = self.length if self._following is None else self._following[1]
        place = partial(str, f"{self.path}, element {number}")
        return Document(here, end, _parse(data, place), place)


class _Scanner:
    """Finds the elements of a list by their brackets, in a buffer that moves along the file."""

    def __init__(self, path: Path, file: io.BufferedReader, first: int) -> None:
        self._path = path
        self._file = file
        self._base = first  # position in the file of the buffer's first byte
        self._buffer = b""
        self._at = 0
        self._read = first

    def elements(self, in_object: bool) -> Iterator[tuple[int, int, bytes]]:
        """Number, position and bytes of each element."""
        if in_object:
            self._find_data()
        self._expect(b"[", "a list")
        number = 1
        if self._peek() == b"]":
            return
        while True:
            if self._peek() != b"{":
                raise self._error(f"element {number} is not an object; give a list of records")
            begin = self._base + self._at
            yield number, begin, self._take_value(f"element {number}")
            if self._peek() == b"]":
                return
            self._expect(b",", f"a comma or the list's end after element {number}")
            number += 1

    def _find_data(self) -> None:
        """Go to the value of the key `data` of the object that begins here."""
        self._expect(b"{", "an object")
        while self._peek() == b'"':
            key = self._take_value("a key")
            self._expect(b":", f"a colon after {key[:40]!r}")
            if key == b'"data"' and self._peek() == b"[":
                return
            self._skip_value()
            if self._peek() == b",":
                self._at += 1
        raise self._error('has no list under the key "data"; give a list of records, or one a line')

    def _skip_value(self) -> None:
        if self._peek() in (b"{", b"[", b'"'):
            self._take_value("a value")
            return
        while (byte := self._peek()) and byte not in (b",", b"}"):
            self._at += 1

    def _take_value(self, name: str) -> bytes:
        """The string, list or object that begins here; it stands in the buffer as a whole."""
        self._drop()
        depth, at = 0, 0
        while True:
            found = _TOKEN.search(self._buffer, at)
            if found is None or (found[0][:1] == b'"' and not found[1]):
                at = len(self._buffer) if found is None else found.start()
                if len(self._buffer) > MAX_DOCUMENT_BYTES:
                    raise self._error(f"{name} has more than {MAX_DOCUMENT_BYTES} bytes; split it")
                if not self._fill():
                    raise self._error(f"ends within {name}; the file is cut off")
                continue
            at = found.end()
            if found[0] in (b"{", b"["):
                depth += 1
            elif found[0] in (b"}", b"]"):
                depth -= 1
            if depth > MAX_DEPTH:
                raise self._error(f"{name} is nested deeper than {MAX_DEPTH} levels; correct it")
            if depth <= 0:
                self._at = at
                return self._buffer[:at]

    def _peek(self) -> bytes:
        """The next byte that is not white space, which is not taken; b"" at the end."""
        while True:
            while self._at < len(self._buffer):
                byte = self._buffer[self._at : self._at + 1]
                if byte not in _SPACE:
                    return byte
                self._at += 1
            self._drop()
            if not self._fill():
                return b""

    def _expect(self, byte: bytes, name: str) -> None:
        if self._peek() != byte:
            raise self._error(f"is not JSON: {name} is expected; correct it")
        self._at += 1

    def _drop(self) -> None:
        self._base += self._at
        self._buffer = self._buffer[self._at :]
        self._at = 0

    def _fill(self) -> bool:
        """Read on, more at a time where more had to be kept, so that no byte is copied often."""
        self._file.seek(self._read)
        chunk = self._file.read(max(_CHUNK_BYTES, len(self._buffer)))
        self._read += len(chunk)
        self._buffer += chunk
        return bool(chunk)

    def _error(self, message: str) -> CalibrationError:
        return CalibrationError(f"{self._path}, byte {self._base + self._at}: {message}")


def _parse(data: bytes, place: Callable[[], str]) -> Content:
    """The content of one record's JSON; `place()` opens the sentence of an error."""
    try:
        return read_record(json.loads(data.decode("utf-8")))
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{place()}: not UTF-8 text (its byte {error.start}); convert the file"
        ) from error
    except RecursionError as error:
        raise CalibrationError(f"{place()}: nested too deeply; correct it") from error
    except ValueError as error:
        reason = str(error).partition(" for integer")[0]  # of a number of thousands of digits
        raise CalibrationError(f"{place()}: not JSON ({reason}); correct it") from error
    except RecordError as error:
        raise CalibrationError(f"{place()}: {error}") from error
