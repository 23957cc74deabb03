"""Which tokens of a file become blocks: pieces that represent all of it, at a cost that follows the
tokens that are wanted.

**A file whose documents have at most WHOLE_BYTES, or 8 bytes per token that is wanted if that is
more**, is tokenized as a whole. Its ids are cut into pieces of equal length, of which the requested
number is taken, spread evenly.

**A longer file** is read at as many places as blocks are wanted, spread evenly over its bytes (rows
of a table). A block is the first tokens that are found from such a place on: from the next line of
plain text (the next character, where none begins nearby), or the next document; or from inside a
document that is so long that it covers the next place as well. A block begins no earlier than where
the block before it ended. Where this gives too few blocks, because little text follows the last
places, what was skipped gives the rest, from the front on. Blocks stand in the order of the file.
Where even that is too little, the file has hardly enough text: then blocks are its first tokens.

Either way documents are separated by EOS, if the model has one, and the same file gives the same
blocks: they depend on its bytes and on the numbers wanted, on nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek.errors import CalibrationError
from quant_jobs.calibration.documents import MAX_PIECE_BYTES, Document, DocumentFile
from quant_jobs.calibration.encoding import MAX_BYTES_PER_TOKEN, Encoder
from quant_jobs.calibration.records import Text

#: Files up to this size are always tokenized whole: a second or two.
WHOLE_BYTES = 1 << 20
_WHOLE_BYTES_PER_TOKEN = 8


def draw_blocks(
    file: DocumentFile,
    encoder: Encoder,
    num_blocks: int,
    length: int,
    eos: int | None,
    *,
    is_alone: bool,
) -> Tensor:
    """int64 [num_blocks, length]: distinct pieces of the documents' ids.

    `is_alone`: no other file shares the blocks (it only decides what an error recommends).

    Raises:
        CalibrationError: the file is empty, too short, or malformed where it is read.
    """
    wanted = num_blocks * length
    if file.fits(max(WHOLE_BYTES, _WHOLE_BYTES_PER_TOKEN * wanted)):
        return _cut(_read_ids(file, encoder, eos), file, num_blocks, length, is_alone=is_alone)
    blocks = _Sampler(file, encoder, num_blocks, length, eos).draw()
    if len(blocks) == num_blocks:
        return torch.tensor(blocks, dtype=torch.int64)
    return _cut(_read_ids(file, encoder, eos, wanted), file, num_blocks, length, is_alone=is_alone)


def _read_ids(
    file: DocumentFile, encoder: Encoder, eos: int | None, most: int | None = None
) -> list[int]:
    """The ids of all documents, EOS between them, or the first `most` of them."""
    ids: list[int] = []
    before: Document | None = None
    is_blank = True
    for document in file.documents(0, file.length, MAX_PIECE_BYTES):
        if _separated(ids, before, document, eos):
            ids.append(eos)  # type: ignore[arg-type]
        ids += encoder.encode(document)
        is_blank = is_blank and file.is_stream and _is_blank(document.content)
        before = document
        if most is not None and len(ids) >= most:
            return ids[:most]
    if is_blank:
        raise CalibrationError(f"{file.path} is empty; give a text file")
    return ids


def _cut(
    ids: list[int], file: DocumentFile, num_blocks: int, length: int, *, is_alone: bool
) -> Tensor:
    """int64 [num_blocks, length]: distinct pieces of the ids, spread evenly over them."""
    pieces = len(ids) // length
    if pieces < num_blocks:
        raise CalibrationError(
            f"{file.path} has {len(ids)} tokens, but {num_blocks} blocks of {length} tokens of "
            f"text need {num_blocks * length}; give a longer text"
            + (
                f" or lower num_blocks to {max(pieces, 1)}"
                + ("" if pieces else f" and block_tokens below {len(ids) + 1}")
                if is_alone
                else " or lower its weight"
            )
        )
    chosen = [index * pieces // num_blocks for index in range(num_blocks)]
    table = torch.tensor(ids[: pieces * length], dtype=torch.int64).view(pieces, length)
    return table[chosen]


class _Sampler:
    """Reads blocks here and there in one file."""

    def __init__(
        self, file: DocumentFile, encoder: Encoder, num_blocks: int, length: int, eos: int | None
    ) -> None:
        self._file = file
        self._encoder = encoder
        self._num_blocks = num_blocks
        self._length = length
        self._eos = eos
        self._max_bytes = encoder.num_bytes + MAX_BYTES_PER_TOKEN * num_blocks * length + (1 << 20)

    def draw(self) -> list[list[int]]:
        """As many blocks as there are, at most those that are wanted."""
        blocks: dict[int, list[int]] = {}
        skipped: list[tuple[int, int]] = []
        cursor, end = 0, self._file.length
        starts = self._file.starts(self._num_blocks)
        for start, following in zip(starts, [*starts[1:], end], strict=True):
            block = self._read(max(start, cursor), end, following)
            if block is None:
                break
            skipped.append((cursor, block.begin))
            blocks[block.begin], cursor = block.ids, block.end
        skipped.append((cursor, end))
        for begin, stop in skipped:
            while len(blocks) < self._num_blocks and begin < stop:
                block = self._read(begin, stop, begin)
                if block is None:
                    break
                blocks[block.begin], begin = block.ids, block.end
        return [blocks[begin] for begin in sorted(blocks)]

    def _read(self, begin: int, end: int, following: int) -> _Block | None:
        """The block between two positions; None where there are too few tokens. It begins inside a
        document only if that one reaches to `following`."""
        ids: list[int] = []
        before: Document | None = None
        first = begin
        for document in self._documents(begin, end, following):
            if _separated(ids, before, document, self._eos):
                ids.append(self._eos)  # type: ignore[arg-type]
            if before is None:
                first = max(begin, document.begin)
            part = self._encoder.encode_part(
                document, max(begin, document.begin), end, self._length - len(ids)
            )
            if self._encoder.num_bytes > self._max_bytes:
                raise CalibrationError(
                    f"{self._file.path} has fewer tokens than one in {MAX_BYTES_PER_TOKEN} bytes "
                    "where it was read; give a file that holds text"
                )
            ids += part.ids
            if len(ids) >= self._length:
                return _Block(first, part.end, ids[: self._length])
            before = document
        return None

    def _documents(self, begin: int, end: int, following: int) -> Iterator[Document]:
        """The documents from a position on, the first of which may begin before it."""
        most = MAX_BYTES_PER_TOKEN * self._length
        document = self._file.at(begin, most)
        if document is not None and document.begin < begin:
            if document.end >= following:
                yield document
            begin = document.end
        yield from self._file.documents(begin, end, most)


@dataclass(frozen=True, slots=True)
class _Block:
    """Ids that stand between two positions of a file."""

    begin: int
    end: int
    ids: list[int]


def _separated(ids: list[int], before: Document | None, after: Document, eos: int | None) -> bool:
    """Whether EOS stands between two documents. Conversations and given ids may end in theirs."""
    if eos is None or not ids or after.continues or before is None:
        return False
    return isinstance(before.content, Text) or ids[-1] != eos


def _is_blank(content: object) -> bool:
    return isinstance(content, Text) and not content.text.strip()
