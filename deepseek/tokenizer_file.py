"""tokenizer.json, the one form of tokenizer that is read: by the `tokenizers` library, never by
code of a checkpoint.

The file is anybody's. Padding and truncation that it fixes do not apply, because texts are encoded
as they are, and a padding of thousands of millions of tokens would fill the memory; a normalizer
that makes texts much longer is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from deepseek import untrusted
from deepseek.errors import first_line
from deepseek.untrusted import UnusableFileError

TOKENIZER_FILE = "tokenizer.json"
TIKTOKEN_FILE = "tiktoken.model"

#: How many times longer the normalizer may make a text, in characters.
_MAX_GROWTH = 64


def parse_tokenizer(data: bytes) -> Tokenizer:
    """The tokenizer in a tokenizer.json, without padding and truncation.

    Raises:
        UnusableFileError: it is not JSON, or not a tokenizer that can be used.
    """
    _check_growth(untrusted.parse_json_object(data))
    try:
        tokenizer = Tokenizer.from_buffer(data)
        tokenizer.no_padding()
        tokenizer.no_truncation()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the library's Rust code is no Exception
        raise UnusableFileError(f"is not a tokenizer: {first_line(error)[:200]}") from error
    return tokenizer


def missing_tokenizer(directory: Path) -> str:
    """Why the directory's tokenizer cannot be read, and what to do: a sentence without its end.

    Kimi-K2 and Moonlight come with a vocabulary of tiktoken and code that reads it.
    """
    path = directory / TOKENIZER_FILE
    if (directory / TIKTOKEN_FILE).exists():
        return (
            f"{path} is absent, and {TIKTOKEN_FILE} is read by code of the checkpoint only, which "
            "is never run; make a tokenizer.json from it once, as docs/tokenizer.md says"
        )
    return f"{path} is absent; the model directory must hold its tokenizer"


def _check_growth(parsed: dict[str, Any]) -> None:
    """Refuse a normalizer that replaces characters by ever longer texts: what that takes of memory
    is the library's to say once it runs."""
    growth = 1
    steps = [parsed.get("normalizer")]
    while steps:
        step = steps.pop()
        if isinstance(step, dict):
            content = step.get("content") if step.get("type") == "Replace" else None
            growth *= max(len(content), 1) if isinstance(content, str) else 1
            steps += step["normalizers"] if isinstance(step.get("normalizers"), list) else []
        if growth > _MAX_GROWTH:
            raise UnusableFileError(
                f"is not a tokenizer: its normalizer makes text more than {_MAX_GROWTH} times "
                "longer"
            )
