"""Text to token ids, in the ingress: prompts and chat templates. routes.py calls it.

`HfTokenizer` reads the tokenizer files that `build` copied into the engine directory, never remote
code. `ByteTokenizer` goes with the echo engine: one token per UTF-8 byte, and nothing to load. The
engine turns token ids back into text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from deepseek.errors import ArtifactError
from deepseek.tokenizer_files import missing_tokenizer
from serve_app.errors import InvalidRequest


class Tokenizer(Protocol):
    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> list[int]:
        """Ids of a completion prompt, with the special tokens that the model expects in front."""
        ...

    def encode_chat(self, conversation: list[dict[str, str]]) -> list[int]:
        """Ids of a conversation in the model's chat template, up to the assistant's turn."""
        ...


class ByteTokenizer:
    """One token per byte; a conversation is its lines, `role: content`."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_chat(self, conversation: list[dict[str, str]]) -> list[int]:
        lines = [f"{message['role']}: {message['content']}" for message in conversation]
        return self.encode("\n".join(lines))


class HfTokenizer:
    """A Hugging Face fast tokenizer and its chat template, from local files only."""

    def __init__(self, directory: Path) -> None:
        if not (directory / "tokenizer.json").is_file():
            raise ArtifactError(
                f"{missing_tokenizer(directory)}; then build the engine from that checkpoint again"
            )
        from transformers import PreTrainedTokenizerFast  # a second of import, only where needed

        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(str(directory))

    @property
    def vocab_size(self) -> int:
        return len(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])

    def encode_chat(self, conversation: list[dict[str, str]]) -> list[int]:
        import jinja2

        if self._tokenizer.chat_template is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions")
        try:
            text = self._tokenizer.apply_chat_template(
                conversation, add_generation_prompt=True, tokenize=False
            )
        except jinja2.TemplateError as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
