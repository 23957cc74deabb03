"""Text to token ids, in the ingress: prompts and chat templates. routes.py calls it.

`HfTokenizer` reads the tokenizer files that `build` copied into the engine directory, never remote
code. `ByteTokenizer` goes with the echo engine: one token per UTF-8 byte, and nothing to load. The
engine turns token ids back into text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from deepseek.chat_template import MAX_SECONDS, ChatRenderer, ChatTemplate, ChatTemplateError
from deepseek.errors import ArtifactError
from deepseek.untrusted import UnusableFileError
from serve_app.errors import InvalidRequest

#: Conversations that are rendered at one time: one that overruns its time holds up no other.
RENDERERS = 2


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
    """A Hugging Face fast tokenizer and its chat template, from local files only. The template is
    rendered in helper processes, which get `max_seconds` for a conversation."""

    def __init__(self, directory: Path, *, max_seconds: float = MAX_SECONDS) -> None:
        if not (directory / "tokenizer.json").is_file():
            raise ArtifactError(
                f"{directory} has no tokenizer.json; build the engine from a checkpoint with one"
            )
        try:
            template = ChatTemplate.from_directory(directory)
        except UnusableFileError as error:
            raise ArtifactError(f"{error}; build the engine again") from error
        from transformers import PreTrainedTokenizerFast  # a second of import, only where needed

        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(str(directory))
        self._renderer = (
            ChatRenderer(template, processes=RENDERERS, max_seconds=max_seconds)
            if template
            else None
        )

    @property
    def vocab_size(self) -> int:
        return len(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text)["input_ids"])

    def encode_chat(self, conversation: list[dict[str, str]]) -> list[int]:
        if self._renderer is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions")
        try:
            text = self._renderer.render(conversation, add_generation_prompt=True)
        except ChatTemplateError as error:
            raise InvalidRequest(f"the model's chat template {error}", param="messages") from error
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
