"""Records in Parquet, and ready token ids in safetensors."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from deepseek.errors import CalibrationError, first_line
from deepseek.tensor_files import DamagedFileError, TensorEntry, read_header
from quant_jobs.calibration.documents import MAX_DOCUMENT_BYTES, Document, spread
from quant_jobs.calibration.records import (
    KEYS,
    OTHER_KEYS,
    RecordError,
    Text,
    TokenIds,
    read_record,
)

#: Rows that are decoded at a time: documents may be long.
_BATCH_ROWS = 64
#: Largest lists and strings in a Parquet footer, which is read as a whole.
_FOOTER_LIMIT = 64 << 20
#: Positions in one row of a Parquet file.
ROW = 1 << 20
_IDS = "input_ids"


class ParquetRows:
    """One record a row. Positions are rows times ROW, to name places inside one too. Row groups are
    read one after the other, of their columns only those that a record may need."""

    is_stream = False

    def __init__(self, path: Path, file: io.BufferedReader) -> None:
        import pyarrow.parquet as parquet

        self.path = path
        file.seek(0)
        try:
            self._table = parquet.ParquetFile(
                file,
                thrift_string_size_limit=_FOOTER_LIMIT,
                thrift_container_size_limit=_FOOTER_LIMIT,
                memory_map=False,
                pre_buffer=False,
            )
            metadata = self._table.metadata
            rows = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
            names = self._table.schema_arrow.names
        except Exception as error:  # pyarrow has a dozen kinds, and OSError among them
            raise self._damaged(error) from error
        self.length = sum(rows) * ROW
        #: First row of each row group, and the end.
        self._firsts = [sum(rows[:index]) for index in range(len(rows) + 1)]
        if not self.length:
            raise CalibrationError(f"{path} has no rows; give a file with documents")
        self._columns = _needed(names, self._has_nulls)
        if not self._columns:
            shown = ", ".join(repr(name[:40]) for name in names[:8])
            raise CalibrationError(
                f"{path} has the columns {shown}; name one of them {', '.join(KEYS)}"
            )
        self._row = sum(rows)  # the first one of `_batch`
        self._group = len(rows)

    def fits(self, num_bytes: int) -> bool:
        """By what the documents hold, not by the file, which may be compressed a thousandfold."""
        total = 0
        for document in self.documents(0, self.length, num_bytes):
            content = document.content
            total += 8
            if isinstance(content, Text):
                total += len(content.text.encode())
            elif isinstance(content, TokenIds):
                total += 4 * len(content.ids)
            else:
                total += sum(len(str(message)) for message in content.messages)
            if total > num_bytes:
                return False
        return True

    def starts(self, count: int) -> list[int]:
        """First rows of row groups, if there are enough: a row costs decoding those before it."""
        groups = len(self._firsts) - 1
        if groups >= count:
            return [self._firsts[index] * ROW for index in spread(groups, count)]
        return spread(self.length, count)

    def at(self, position: int, most: int) -> Document | None:
        row = position // ROW
        return next(self.documents(row * ROW, row * ROW + 1, most), None)

    def documents(self, begin: int, end: int, most: int) -> Iterator[Document]:
        for row, record in self._from(-(-begin // ROW), -(-end // ROW)):
            place = f"{self.path}, row {row + 1}"
            try:
                content = read_record(record)
            except RecordError as error:
                raise CalibrationError(f"{place}: {error}") from error
            yield Document(row * ROW, (row + 1) * ROW, content, partial(str, place))

    def _from(self, begin: int, end: int) -> Iterator[tuple[int, Any]]:
        """Rows `begin` to `end`. Goes on in the row group that is open where that leads there."""
        for group in range(len(self._firsts) - 1):
            first, last = self._firsts[group], self._firsts[group + 1]
            if last <= begin or first >= end:
                continue
            if group != self._group or self._row > max(begin, first):
                self._group, self._row = group, first
                self._batches = self._open(group)
                self._batch: Any = None
            yield from self._rows_of_group(max(begin, first), min(end, last))

    def _rows_of_group(self, begin: int, end: int) -> Iterator[tuple[int, Any]]:
        """`_row` is the first row of `_batch`, the batch in hand."""
        while self._row < end:
            if self._batch is None:
                self._batch = self._next_batch()
            batch, row = self._batch, self._row
            if row + batch.num_rows <= begin:
                self._row, self._batch = row + batch.num_rows, None
                continue
            for index in range(max(begin - row, 0), min(end - row, batch.num_rows)):
                yield row + index, self._record(batch, index, row + index)
            if row + batch.num_rows > end:
                return
            self._row, self._batch = row + batch.num_rows, None

    def _open(self, group: int) -> Iterator[Any]:
        try:
            return iter(
                self._table.iter_batches(
                    _BATCH_ROWS, row_groups=[group], columns=self._columns, use_threads=False
                )
            )
        except Exception as error:
            raise self._damaged(error) from error

    def _next_batch(self) -> Any:
        try:
            batch = next(self._batches)
        except StopIteration:
            raise CalibrationError(
                f"{self.path} has fewer rows than its footer says; it is damaged"
            ) from None
        except Exception as error:
            raise self._damaged(error) from error
        return batch

    def _record(self, batch: Any, index: int, row: int) -> dict[str, Any]:
        """One row as JSON has it: structs without their null fields."""
        try:
            return {name: _plain(batch.column(name)[index].as_py()) for name in batch.schema.names}
        except Exception as error:  # text that is not UTF-8
            raise CalibrationError(
                f"{self.path}, row {row + 1}: cannot be decoded ({first_line(error)}); correct it"
            ) from error

    def _has_nulls(self, name: str) -> bool:
        """Whether a column may have nulls, by the statistics of the file."""
        metadata = self._table.metadata
        for group in range(metadata.num_row_groups):
            for index in range(metadata.num_columns):
                column = metadata.row_group(group).column(index)
                if column.path_in_schema == name:
                    known = column.statistics is not None and column.statistics.has_null_count
                    if not known or column.statistics.null_count:
                        return True
                elif column.path_in_schema.startswith(f"{name}."):
                    return True
        return False

    def _damaged(self, error: Exception) -> CalibrationError:
        return CalibrationError(
            f"{self.path} is not a Parquet file, or is damaged ({first_line(error)[:200]}); give "
            "another file"
        )


def _needed(names: list[str], has_nulls: Callable[[str], bool]) -> list[str]:
    """The columns that records need: those of the first key, and of the next where it has nulls."""
    columns: list[str] = []
    for key in KEYS:
        if key not in names:
            continue
        wanted = (key, *OTHER_KEYS.get(key, ()))
        columns += [name for name in wanted if name in names and name not in columns]
        if not has_nulls(key):
            break
    return columns


def _plain(value: Any) -> Any:
    """A value as JSON would have it. A struct has all fields in every row; those that are null were
    not given."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)


class IdRows:
    """A tensor `input_ids`: [N] is one document that can be cut anywhere, [B, T] are B documents.
    Positions count ids. A tensor `attention_mask` [B, T] leaves out padding."""

    def __init__(self, path: Path, file: io.BufferedReader) -> None:
        self.path = path
        self._file = file
        try:
            tensors = read_header(path).tensors
        except (OSError, DamagedFileError) as error:
            raise CalibrationError(f"{path} {error}; give another file") from error
        if _IDS not in tensors:
            names = ", ".join(repr(name[:40]) for name in sorted(tensors)[:8]) or "no tensor"
            raise CalibrationError(f"{path} holds {names}; it must hold the tensor {_IDS!r}")
        self._ids = tensors[_IDS]
        shape = self._ids.shape
        self._mask = tensors.get("attention_mask") if len(shape) == 2 else None
        if str(self._ids.dtype) not in ("torch.int32", "torch.int64") or len(shape) not in (1, 2):
            raise CalibrationError(
                f"{path}: {_IDS} is {_name(self._ids)}; it must be int32 or int64, [N] or [B, T]"
            )
        if not self._ids.num_bytes:
            raise CalibrationError(f"{path}: {_IDS} holds no ids; give a file with some")
        if self._mask is not None and (
            self._mask.shape != shape
            or str(self._mask.dtype) not in ("torch.int32", "torch.int64", "torch.bool")
        ):
            raise CalibrationError(
                f"{path}: attention_mask is {_name(self._mask)}, but {_IDS} is {_name(self._ids)}; "
                "give it the same shape, as integers or booleans, or leave it out"
            )
        self.is_stream = len(shape) == 1
        self._width = shape[1] if len(shape) == 2 else 1
        self.length = shape[0] * self._width

    def fits(self, num_bytes: int) -> bool:
        return 4 * self.length <= num_bytes

    def starts(self, count: int) -> list[int]:
        return spread(self.length, count)

    def at(self, position: int, most: int) -> Document | None:
        if self.is_stream or position >= self.length:
            return None
        return self._row(position // self._width)

    def documents(self, begin: int, end: int, most: int) -> Iterator[Document]:
        if self.is_stream:
            step = max(most // 4, 1)
            for position in range(begin, end, step):
                stop = min(position + step, end)
                place = partial(str, f"{self.path}, {_IDS}[{position}:{stop}]")
                ids = TokenIds(self._read(position, stop - position))
                yield Document(position, stop, ids, place, position > begin)
            return
        for row in range(-(-begin // self._width), -(-end // self._width)):
            yield self._row(row)

    def _row(self, row: int) -> Document:
        first = row * self._width
        if 4 * self._width > MAX_DOCUMENT_BYTES:
            raise CalibrationError(
                f"{self.path}: a row of {_IDS} has {self._width} ids, more than "
                f"{MAX_DOCUMENT_BYTES // 4}; give it the shape [N]"
            )
        ids = TokenIds(self._read(first, self._width))
        place = partial(str, f"{self.path}, row {row + 1}")
        return Document(first, first + self._width, ids, place)

    def _read(self, first: int, count: int) -> list[int]:
        ids = self._values(self._ids, first, count)
        if self._mask is not None:
            ids = ids[self._values(self._mask, first, count) != 0]
        return [int(token) for token in ids]

    def _values(self, entry: TensorEntry, first: int, count: int) -> np.ndarray[Any, Any]:
        dtype = {"torch.int32": "<i4", "torch.int64": "<i8"}.get(str(entry.dtype), "u1")
        size = np.dtype(dtype).itemsize
        data = os.pread(self._file.fileno(), count * size, entry.begin + first * size)
        return np.frombuffer(data, dtype)


def _name(entry: TensorEntry) -> str:
    return f"{str(entry.dtype).removeprefix('torch.')} {list(entry.shape)}"
