"""Documents to token ids, by the checkpoint's own tokenizer and chat template.

Text is tokenized without special tokens. A conversation goes through the chat template, without a
generation prompt, and its text is tokenized without special tokens too: the template writes those.
Ids are taken as they are. BOS at the head of a conversation or of given ids is taken off: a block
begins with BOS, and inside a block documents are separated by EOS alone.

The `tokenizers` library reads tokenizer.json directly. transformers' fast tokenizers wrap it (a
test compares the ids with AutoTokenizer's), and importing it is six seconds faster. A file of ids
needs no tokenizer. What tokenizer.json says about padding and truncation does not apply here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from deepseek import untrusted
from deepseek.chat_template import ChatRenderer, ChatTemplate, ChatTemplateError
from deepseek.config import ModelConfig
from deepseek.errors import CalibrationError, first_line
from deepseek.tokenizer_file import TOKENIZER_FILE, missing_tokenizer, parse_tokenizer
from deepseek.untrusted import UnusableFileError
from quant_jobs.calibration.documents import Document
from quant_jobs.calibration.records import Conversation, Text

#: Of a text from which N tokens are wanted, the first 6 N bytes are tokenized, then twice as many
#: while that was too little. Prose and code have 3 to 5 bytes per token.
_BYTES_PER_TOKEN = 6
#: Text with fewer tokens than one in so many bytes gives none beyond.
MAX_BYTES_PER_TOKEN = 64


#: The time for templates that write the date, 2025-01-01: a job may be resumed another day.
NOW = 1735689600.0
#: The last tokens of a text that was cut may be others than in the whole: so many are not used.
_MARGIN = 16
#: Longest word behind which a part begins that would begin inside of it.
_WORD_CHARACTERS = 64
_SPACE = re.compile(r"\s")
#: Everything else that `tokenizers` raises, its panics among it, comes from the tokenizer's file.
_INTERRUPTS = (KeyboardInterrupt, SystemExit)


@dataclass(frozen=True, slots=True)
class Encoded:
    """`ids` of a document, or of a part of it; `end` is the position behind that part."""

    ids: Sequence[int]
    end: int


class Encoder:
    """Makes ids of documents, for one checkpoint. Its tokenizer and its chat template are read when
    a document needs them. Close it, to end the chat template's process."""

    def __init__(self, directory: Path, config: ModelConfig) -> None:
        self._directory = directory
        self._config = config
        self._tokenizer: Tokenizer | None = None
        self._renderer: ChatRenderer | None = None
        #: Bytes of text that have been tokenized.
        self.num_bytes = 0

    def close(self) -> None:
        if self._renderer is not None:
            self._renderer.close()

    def encode(self, document: Document) -> Sequence[int]:
        """The ids of a document.

        Raises:
            CalibrationError: there is no tokenizer or chat template, it cannot be used or refuses
                the document; or an id is not the model's.
        """
        return self.encode_part(document, document.begin, document.end, None).ids

    def encode_part(self, document: Document, begin: int, end: int, most: int | None) -> Encoded:
        """Ids of the part of a document between two positions, with `most` no more than its first
        so many. Raises as `encode`."""
        content = document.content
        whole: str | Sequence[int]
        if isinstance(content, Text):
            whole = content.text
        elif isinstance(content, Conversation):
            whole = self._render(content, document)
        else:
            whole = content.ids
        first, last = _index(document, begin, len(whole)), len(whole)
        if end < document.end:
            last = _index(document, end, len(whole))
        is_head = not first and not document.continues
        if isinstance(whole, str):
            first = _between_words(whole, first)
            ids, used = self._tokenize(whole[first:last], most)
            if is_head and isinstance(content, Conversation):
                ids = self._without_bos(ids)
        else:
            first += is_head and whole[:1] == [self._config.bos_token_id]
            ids = whole[first : last if most is None else min(first + most, last)]
            self._check_ids(ids, first, document)
            used = len(ids)
        if first + used >= len(whole):
            return Encoded(ids, document.end)
        span = document.end - document.begin
        if isinstance(content, Text) and span == len(content.text.encode()):  # a piece of a stream
            return Encoded(ids, begin + len(content.text[first : first + used].encode()))
        return Encoded(ids, document.begin - (-(first + used) * span // len(whole)))

    def _check_ids(self, ids: Sequence[int], first: int, document: Document) -> None:
        """Given ids, number `first` of the document and on, must be the model's."""
        size = self._config.vocab_size
        if ids and (min(ids) < 0 or max(ids) >= size):
            index = next(index for index, token in enumerate(ids) if not 0 <= token < size)
            raise CalibrationError(
                f"{document.place()}: id {_short(ids[index])} (number {first + index}) is none of "
                f"the model's 0 to {size - 1}; tokenize with this model's own tokenizer"
            )

    def _tokenize(self, text: str, most: int | None) -> tuple[Sequence[int], int]:
        """Ids of a text, and how many of its characters they stand for."""
        tokenizer = self._tokenizer or self._load_tokenizer()
        per_token = _BYTES_PER_TOKEN
        while True:
            piece = text if most is None else _head(text, per_token * (most + _MARGIN))
            self.num_bytes += len(piece.encode())
            try:
                encoding = tokenizer.encode(piece, add_special_tokens=False)
            except _INTERRUPTS:
                raise
            except BaseException as error:  # bare Exception, or a panic that is none
                raise CalibrationError(
                    f"the tokenizer in {self._directory} fails ({first_line(error)[:200]}); "
                    "correct its tokenizer.json"
                ) from error
            ids = encoding.ids
            if most is None or len(piece) == len(text):
                break
            if len(ids) >= most + _MARGIN or per_token >= MAX_BYTES_PER_TOKEN:
                break
            per_token *= 2
        self._check_vocabulary(ids)
        if most is None or len(ids) <= most:
            return ids, len(piece)
        last = encoding.offsets[most - 1][1]
        return ids[:most], last if 0 < last <= len(piece) else len(piece)

    def _render(self, conversation: Conversation, document: Document) -> str:
        if self._renderer is None:
            self._renderer = ChatRenderer(self._load_template(document), now=NOW)
        try:
            return self._renderer.render(conversation.messages, tools=conversation.tools)
        except ChatTemplateError as error:
            raise CalibrationError(
                f"{document.place()}: the chat template in {self._directory} {error}"
            ) from error

    def _without_bos(self, ids: Sequence[int]) -> Sequence[int]:
        bos = self._config.bos_token_id
        return ids[1:] if ids and bos is not None and ids[0] == bos else ids

    def _check_vocabulary(self, ids: Sequence[int]) -> None:
        if (largest := max(ids, default=0)) >= self._config.vocab_size:
            raise CalibrationError(
                f"the tokenizer in {self._directory} gives the id {largest}, but the model has "
                f"only {self._config.vocab_size} tokens; tokenizer and model do not belong together"
            )

    def _load_tokenizer(self) -> Tokenizer:
        file = self._directory / TOKENIZER_FILE
        if not file.exists() and not file.is_symlink():
            raise CalibrationError(
                f"{missing_tokenizer(self._directory)}, or the file must hold input_ids"
            )
        try:
            self._tokenizer = parse_tokenizer(untrusted.read_bytes(file, root=self._directory))
        except UnusableFileError as error:
            raise CalibrationError(f"{file} {error}") from error
        return self._tokenizer

    def _load_template(self, document: Document) -> ChatTemplate:
        try:
            template = ChatTemplate.from_directory(self._directory)
        except UnusableFileError as error:
            raise CalibrationError(str(error)) from error
        if template is None:
            raise CalibrationError(
                f"{document.place()}: a conversation, but {self._directory} has no chat template; "
                "put a chat_template.jinja there, or give text"
            )
        return template


def _index(document: Document, position: int, length: int) -> int:
    """The character or id of a document, of `length` in all, where a position inside it is."""
    span = document.end - document.begin
    return min(-(-(position - document.begin) * length // span), length)


def _between_words(text: str, index: int) -> int:
    """The first white space at or behind a character, if there is some nearby."""
    found = _SPACE.search(text, index, index + _WORD_CHARACTERS) if index else None
    return found.start() if found else index


def _head(text: str, num_bytes: int) -> str:
    """The first characters of a text, in `num_bytes` bytes of UTF-8."""
    head = text[:num_bytes]
    if head.isascii():
        return head
    return head.encode()[:num_bytes].decode("utf-8", "ignore")


def _short(number: int) -> str:
    """A number as text; of a huge one only that it is huge."""
    return str(number) if abs(number) < 1 << 64 else "of more than 64 bits"
