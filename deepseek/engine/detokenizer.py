"""Tokens to text, one at a time, showing only what is settled.

Two things are held back: the tail of the text that is not a whole UTF-8 character yet, and a tail
that might become a stop string. A stop string ends the text before its first character. Tokens are
decoded within a short window of their predecessors, since decoders look at neighbors (a leading
space, bytes of one character).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import tokenizers

from deepseek.errors import ArtifactError


class Tokenizer(Protocol):
    """What is used of a `tokenizers.Tokenizer` (or of transformers' fast tokenizers)."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str: ...


#: How an unfinished UTF-8 character decodes: once per byte in some decoders, so up to three times.
_UNFINISHED = "\ufffd"
_MAX_UNFINISHED = 3
#: Tokens of context kept, and the length from which the window is cut back to that.
_CONTEXT, _WINDOW = 8, 32


class Detokenizer:
    """The text of one request. `stopped` is set once a stop string has appeared."""

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int], stop: Sequence[str] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._window = list(prompt_ids[-_CONTEXT:])
        self._num_shown = len(self._settled())  # characters of the window's text already passed on
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that may be shown now, often empty."""
        assert not self.stopped
        self._window.append(token_id)
        text = self._settled()
        new, self._num_shown = text[self._num_shown :], max(self._num_shown, len(text))
        if len(self._window) > _WINDOW and not self._decode().endswith(_UNFINISHED):
            self._window = self._window[-_CONTEXT:]
            self._num_shown = len(self._settled())
        return self._release(new)

    def flush(self) -> str:
        """The rest, at the end of the request: what was held back cannot grow any more."""
        text = self._release(self._decode()[self._num_shown :])
        if self.stopped:
            return text
        rest, self._held = self._held, ""
        return text + rest

    def _decode(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=True)

    def _settled(self) -> str:
        text = self._decode()
        for _ in range(_MAX_UNFINISHED):
            text = text.removesuffix(_UNFINISHED)
        return text

    def _release(self, new: str) -> str:
        """Append to what is held and return what cannot be part of a stop string."""
        held = self._held + new
        found = [at for stop in self._stop if (at := held.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return held[: min(found)]
        keep = max((_overlap(held, stop) for stop in self._stop), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]


def load_tokenizer(directory: Path | str) -> Tokenizer | None:
    """DIR/tokenizer.json, or None where there is none.

    Raises:
        ArtifactError: the file is not a tokenizer.
    """
    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more specific
        raise ArtifactError(f"{path} is not a tokenizer of Hugging Face's: {error}") from error


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without being all of it."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0
