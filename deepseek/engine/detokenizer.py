"""Turns the tokens of one request into text, one at a time, and returns only final text.

Two tails are held back: bytes that are not a whole UTF-8 character yet, and text that may become a
stop string. A stop string ends the text before its first character. Each token is decoded in a
short window of its predecessors, because decoders look at neighbors (a leading space, the bytes of
one character). The engine calls `push` for every token and `flush` at the end of the request.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from deepseek import untrusted
from deepseek.errors import ArtifactError
from deepseek.tokenizer_file import parse_tokenizer
from deepseek.untrusted import UnusableFileError


class Tokenizer(Protocol):
    """The part of `tokenizers.Tokenizer` (and of transformers' fast tokenizers) that is used."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


#: What an unfinished UTF-8 character decodes to: one per byte in some decoders, so up to three.
_UNFINISHED = "\ufffd"
_MAX_UNFINISHED = 3
#: The window is cut back to `_CONTEXT` tokens when it has more than `_WINDOW`.
_CONTEXT, _WINDOW = 8, 32


class Detokenizer:
    """The text of one request. `stopped` is set once a stop string has appeared."""

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._window = list(prompt_ids[-_CONTEXT:])
        self._num_shown = len(self._final_text())  # characters of the window already passed on
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Add a token and return the text that is final now, often empty."""
        assert not self.stopped
        self._window.append(token_id)
        text = self._final_text()
        new, self._num_shown = text[self._num_shown :], max(self._num_shown, len(text))
        if len(self._window) > _WINDOW and not self._decode().endswith(_UNFINISHED):
            self._window = self._window[-_CONTEXT:]
            self._num_shown = len(self._final_text())
        return self._release(new)

    def flush(self) -> str:
        """Return the held text at the end of the request, when no token can follow it."""
        text = self._release(self._decode()[self._num_shown :])
        if self.stopped:
            return text
        rest, self._held = self._held, ""
        return text + rest

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=True)

    def _final_text(self) -> str:
        """The window's text without an unfinished UTF-8 character."""
        text = self._decode()
        for _ in range(_MAX_UNFINISHED):
            text = text.removesuffix(_UNFINISHED)
        return text

    def _release(self, new: str) -> str:
        """Append to the held text and return the part of it that no stop string can begin in."""
        held = self._held + new
        stops = [start for stop in self._stop if (start := held.find(stop)) >= 0]
        if stops:
            self.stopped = True
            self._held = ""
            return held[: min(stops)]
        num_held = max((_overlap(held, stop) for stop in self._stop), default=0)
        self._held = held[len(held) - num_held :]
        return held[: len(held) - num_held]


def load_tokenizer(directory: Path | str) -> Tokenizer | None:
    """Load DIR/tokenizer.json of a source; None where the directory has none.

    Raises:
        ArtifactError: the file cannot be read, or is not a tokenizer.
    """
    path = Path(directory) / "tokenizer.json"
    if not os.path.lexists(path):
        return None
    try:
        return parse_tokenizer(untrusted.read_bytes(path, root=path.parent))
    except UnusableFileError as error:
        raise ArtifactError(f"{path} {error}") from error


def engine_tokenizer(directory: Path, documents: Mapping[str, bytes]) -> Tokenizer | None:
    """The tokenizer among the verified documents of an engine; None where it has none.

    Raises:
        ArtifactError: tokenizer.json is not a tokenizer.
    """
    data = documents.get("tokenizer.json")
    if data is None:
        return None
    try:
        return parse_tokenizer(data)
    except UnusableFileError as error:
        raise ArtifactError(f"{directory / 'tokenizer.json'} {error}") from error


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0
