"""The text and the bytes of single tokens, as logprobs name them.

A token's bytes are its own, also where they are part of a character: in byte-level BPE through its
alphabet of 256 printable characters, elsewhere through pieces like `<0xE3>`. A token's text is what
it adds where it stands: a token that ends within a character leaves that character to the token
that completes it (as vLLM does), so the texts of consecutive tokens join to the text of all. The
engine names tokens with it, and the service what of a prompt no logprob names. It imports no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import tokenizers

from deepseek.engine.detokenizer import Tokenizer

#: Tokens before a token that are looked at: a UTF-8 character has at most four bytes.
_MAX_CONTEXT = 4

_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
#: A space in the pieces of sentencepiece.
_SPACE_PIECE = "\u2581"


class TokenNames:
    """Names tokens of one tokenizer. Remembers the bytes of every token that it has named."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bytes | None] = {}
        self._steps: frozenset[str] = frozenset()
        self._added: dict[int, Any] = {}
        if isinstance(tokenizer, tokenizers.Tokenizer):
            self._steps = _decoder_steps(tokenizer)
            self._added = tokenizer.get_added_tokens_decoder()

    def name(self, token_id: int, context: Sequence[int]) -> tuple[str, bytes | None]:
        """Text and bytes of a token after the tokens of `context`, of which the last few count.

        The bytes are None, and the text is empty, where the vocabulary has none for the id."""
        data = self.bytes_of(token_id)
        if data is None:
            return "", None
        return added_text(self._bytes_before(context), data), data

    def bytes_of(self, token_id: int) -> bytes | None:
        """The token's own bytes; a special token's are those of its text."""
        if token_id not in self._known:
            self._known[token_id] = self._find_bytes(token_id)
        return self._known[token_id]

    def _bytes_before(self, context: Sequence[int]) -> bytes:
        return b"".join(self.bytes_of(token_id) or b"" for token_id in context[-_MAX_CONTEXT:])

    def _find_bytes(self, token_id: int) -> bytes | None:
        if token_id in self._added:
            return str(self._added[token_id].content).encode()
        if not isinstance(self._tokenizer, tokenizers.Tokenizer):
            return self._tokenizer.decode([token_id], skip_special_tokens=False).encode()
        piece = self._tokenizer.id_to_token(token_id)
        if piece is None:
            return None
        if "ByteLevel" in self._steps:
            return _byte_level(piece)
        if "ByteFallback" in self._steps:
            byte = _BYTE_PIECE.fullmatch(piece)
            if byte is not None:
                return bytes([int(byte[1], 16)])
            return piece.replace(_SPACE_PIECE, " ").encode()
        return self._tokenizer.decode([token_id], skip_special_tokens=False).encode()


def added_text(before: bytes, data: bytes) -> str:
    """The text that the bytes `data` add after the bytes `before`: the characters that they
    complete. What is no UTF-8 becomes U+FFFD."""
    begun = before[len(before) - _num_unfinished(before) :]
    joined = begun + data
    return joined[: len(joined) - _num_unfinished(joined)].decode(errors="replace")


def _num_unfinished(data: bytes) -> int:
    """Number of bytes at the end that begin a UTF-8 character without completing it, 0..3."""
    for count in range(1, min(3, len(data)) + 1):
        byte = data[-count]
        if byte >= 0xC0:  # begins a character of two to four bytes
            return count if count < (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4) else 0
        if byte < 0x80:
            break
    return 0


def _decoder_steps(tokenizer: tokenizers.Tokenizer) -> frozenset[str]:
    """Types of the steps of a tokenizer's decoder, such as ByteLevel."""
    if tokenizer.decoder is None:
        return frozenset()
    steps = [json.loads(tokenizer.decoder.__getstate__())]
    types: set[str] = set()
    while steps:
        step = steps.pop()
        types.add(step["type"])
        steps += step.get("decoders", ())
    return frozenset(types)


def _byte_level(piece: str) -> bytes:
    """The bytes of a token of byte-level BPE. A character outside its alphabet stands for itself,
    as the decoder has it."""
    try:
        return bytes([_BYTE_OF[char] for char in piece])
    except KeyError:
        return piece.encode()


def _make_alphabet() -> dict[str, int]:
    """Character -> byte. Bytes that print stand for themselves; the others, in order, for the
    characters from U+0100 on (GPT-2's `bytes_to_unicode`)."""
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {
        chr(0x100 + index): byte for index, byte in enumerate(others)
    }


_BYTE_OF = _make_alphabet()
