"""What to say where a directory has no tokenizer.json, the one form of tokenizer that is read."""

from __future__ import annotations

from pathlib import Path

TOKENIZER_FILE = "tokenizer.json"
TIKTOKEN_FILE = "tiktoken.model"


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
