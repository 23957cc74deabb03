"""Text that others wrote, made fit for a terminal, a log or a sentence.

Names of tensors, files, recipes and keys may hold anything: escape sequences that rewrite a
terminal, line breaks that forge a line of a log, letters that turn the direction of writing, a
megabyte. `printable` is applied where text leaves the program: to every error of ours
(`errors.IntServeError`), to the lines that commands print (`cli.py`) and to lines of the log.
"""

from __future__ import annotations

import re

#: Longest run without a space, in characters. A path or a tensor's name is shorter; the middle of a
#: longer one is left out.
MAX_WORD = 400
#: Longest sentence.
MAX_TEXT = 4000

_LONG_WORD = re.compile(rf"\S{{{MAX_WORD + 1},}}")


def printable(text: str) -> str:
    r"""`text` in one line of characters that can be seen: others become escapes as in `\x1b`, `\n`
    or `\u202e`, and what is too long loses its middle. Applied twice it changes nothing more."""
    # Cut first: escapes make text up to ten times as long.
    text = _LONG_WORD.sub(lambda match: _shorten(match[0], MAX_WORD), _shorten(text, MAX_TEXT))
    return text if text.isprintable() else printable(visible(text))


def visible(text: str, keep: str = "") -> str:
    """`text` with escapes for what cannot be seen, the characters of `keep` excepted."""
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode()
        for char in text
    )


def _shorten(text: str, limit: int) -> str:
    """`text` of at most `limit` characters, its middle left out where it is longer."""
    if len(text) <= limit:
        return text
    half = (limit - 1) // 2
    return f"{text[:half]}…{text[len(text) - half :]}"
