"""Calibration files as streams of documents, read from any place on.

`open_documents` chooses the reader by the file's ending, in any case; never by guessing, so that a
table is not taken for prose:

    .txt .text .md, no ending    plain text in UTF-8: one document, cut anywhere
    .jsonl .ndjson               one record a line
    .json                        a list of records, an object with such a list under `data`, or
                                 records line by line (as the `datasets` library reads it)
    .parquet                     one record a row
    .safetensors                 a tensor `input_ids`, int32 or int64: [N], or [B, T], B documents

Records are described in `records.py`. Every reader knows positions, bytes or rows, from which it
can read on, so that a long file costs what is read of it and not what it holds. What is wrong with
a document is said with the file and the line, row or element.
"""

from __future__ import annotations

import codecs
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from deepseek.errors import CalibrationError
from deepseek.untrusted import UnusableFileError, open_regular
from quant_jobs.calibration.records import Content, Text

#: Largest document that is read, in bytes of its record.
MAX_DOCUMENT_BYTES = 32 << 20
#: Plain text is decoded and tokenized in pieces of at most this many bytes.
MAX_PIECE_BYTES = 1 << 20
_LINE_SEARCH_BYTES = 1 << 16
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".zip", ".7z", ".tar", ".tgz", ".lz4")


@dataclass(frozen=True, slots=True)
class Document:
    """One document, or a piece of one, at the positions from `begin` to `end`. `place` says where
    it is, for errors. `continues`: it belongs to the document before it."""

    begin: int
    end: int
    content: Content
    place: Callable[[], str]
    continues: bool = False


class DocumentFile(Protocol):
    """A file of documents at positions 0 to `length`. `is_stream`: it is a single document, whose
    positions count its bytes or ids, so that one can read on from any of them."""

    path: Path
    length: int
    is_stream: bool

    def fits(self, num_bytes: int) -> bool:
        """Whether all documents together have at most so many bytes."""
        ...

    def starts(self, count: int) -> list[int]:
        """Positions to read from, in ascending order, spread evenly over the file."""
        ...

    def documents(self, begin: int, end: int, most: int) -> Iterator[Document]:
        """The documents that begin at `begin` or later, and before `end`. Of a document that can be
        cut no more than `most` bytes come at a time.

        Raises:
            CalibrationError: a document is malformed.
        """
        ...

    def at(self, position: int, most: int) -> Document | None:
        """The document that a position is in; None in a stream and behind the last document. Raises
        as `documents`."""
        ...


def kind_of(path: Path) -> str:
    """The kind of a file by its ending: text, jsonl, json, parquet or safetensors.

    Raises:
        CalibrationError: it has an ending that is not known.
    """
    kinds = {"": "text", ".txt": "text", ".text": "text", ".md": "text", ".ndjson": "jsonl"}
    kinds |= {f".{kind}": kind for kind in ("jsonl", "json", "parquet", "safetensors")}
    suffix = path.suffix.lower()
    if suffix in _COMPRESSED:
        raise CalibrationError(
            f"{path} is compressed ({suffix}); unpack it and give what was in it"
        )
    if suffix not in kinds:
        known = ", ".join(ending for ending in kinds if ending)
        raise CalibrationError(
            f"{path} has the ending {path.suffix}, which says nothing about its content; rename it "
            f"to one of {known}, or to no ending for plain text"
        )
    return kinds[suffix]


@contextmanager
def open_documents(path: Path) -> Iterator[tuple[DocumentFile, io.BufferedReader]]:
    """The documents of a file, and the open file itself.

    Raises:
        CalibrationError: it is absent, not a regular file, empty, or not what its ending says.
    """
    kind = kind_of(path)
    try:
        descriptor = open_regular(path)
    except UnusableFileError as error:
        remedy = "" if "; " in str(error) else "; give a text file"
        raise CalibrationError(f"{path} {error}{remedy}") from error
    with os.fdopen(descriptor, "rb") as file:
        if not os.fstat(descriptor).st_size:
            raise CalibrationError(f"{path} is empty; give a text file")
        yield _reader(kind, path, file), file


def _reader(kind: str, path: Path, file: io.BufferedReader) -> DocumentFile:
    # Imported here: each of them builds on this file, and pyarrow takes a while.
    if kind in ("jsonl", "json"):
        from quant_jobs.calibration.json_documents import open_json

        return open_json(kind, path, file)
    if kind == "parquet":
        from quant_jobs.calibration.table_documents import ParquetRows

        return ParquetRows(path, file)
    if kind == "safetensors":
        from quant_jobs.calibration.table_documents import IdRows

        return IdRows(path, file)
    return PlainText(path, file)


def spread(length: int, count: int) -> list[int]:
    """`count` positions below `length`, spread evenly."""
    return [index * length // count for index in range(count)]


class PlainText:
    """One document of UTF-8 text. From a position inside, it is read on from the next line, or the
    next character where no line begins nearby. A byte order mark is no part of the text."""

    is_stream = True

    def __init__(self, path: Path, file: io.BufferedReader) -> None:
        self.path = path
        self.length = os.fstat(file.fileno()).st_size
        self._file = file
        file.seek(0)
        self._first = 3 if file.read(3) == codecs.BOM_UTF8 else 0

    def fits(self, num_bytes: int) -> bool:
        return self.length <= num_bytes

    def starts(self, count: int) -> list[int]:
        return spread(self.length, count)

    def documents(self, begin: int, end: int, most: int) -> Iterator[Document]:
        position = self._boundary(begin)
        continues = False
        while position < end:
            self._file.seek(position)
            data = self._file.read(min(most, MAX_PIECE_BYTES, end - position))
            if position + len(data) < self.length:
                data = data[: _last_boundary(data)]
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError as error:
                raise CalibrationError(
                    f"{self.path} is not UTF-8 text (byte {position + error.start}); convert it, "
                    "or give another file"
                ) from error
            if (index := data.find(0)) >= 0:
                raise CalibrationError(
                    f"{self.path} is not text: byte {position + index} is NUL; if it is UTF-16, "
                    "convert it to UTF-8"
                )
            here, position = position, position + len(data)
            yield Document(here, position, Text(text), lambda: str(self.path), continues)
            continues = True

    def at(self, position: int, most: int) -> Document | None:
        return None

    def _boundary(self, position: int) -> int:
        """The first place at `position` or behind it where text may be cut."""
        if position <= self._first:
            return self._first
        self._file.seek(position - 1)
        nearby = self._file.read(_LINE_SEARCH_BYTES + 1)
        line = nearby.find(b"\n")
        if line >= 0:
            return position + line
        within = 1  # nearby[0] is the byte before the position
        while within < len(nearby) and nearby[within] & 0xC0 == 0x80:
            within += 1
        return position - 1 + within


def _last_boundary(data: bytes) -> int:
    """Where the last line of `data` ends, unless that cuts off more than half of it; otherwise
    where its last whole character ends."""
    line = data.rfind(b"\n") + 1
    if line > len(data) // 2:
        return line
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 == 0x80:
            continue
        size = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
        return len(data) - back if size > back else len(data)
    return len(data)
