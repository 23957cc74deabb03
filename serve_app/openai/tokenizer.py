"""Text to token ids, in the ingress: prompts and chat templates. service.py calls it.

`HfTokenizer` is made of the tokenizer files that `build` copied into the engine directory, never of
remote code. `ByteTokenizer` goes with the echo engine: one token per UTF-8 byte, and nothing to
load. The engine turns token ids back into text.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from deepseek import untrusted
from deepseek.artifact.documents import COPIED_FILES
from deepseek.chat_template import MAX_SECONDS, ChatRenderer, ChatTemplate, ChatTemplateError
from deepseek.engine.token_names import TokenNames, added_text
from deepseek.errors import ArtifactError, first_line
from deepseek.tokenizer_file import missing_tokenizer, parse_tokenizer
from deepseek.untrusted import UnusableFileError
from serve_app.errors import InvalidRequest

#: Conversations that are rendered at one time: one that overruns its time holds up no other.
RENDERERS = 2


class Tokenizer(Protocol):
    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of a completion prompt, with the special tokens that the model expects in front."""
        ...

    def encode_chat(
        self,
        conversation: list[dict[str, str]],
        *,
        add_special_tokens: bool = False,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Ids of a conversation in the model's chat template, up to the assistant's turn.
        `add_special_tokens` puts the model's own around what the template wrote."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        ...

    def name(self, token_id: int) -> str:
        """The text of one token at the beginning of a text; see deepseek/engine/token_names.py."""
        ...

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The tokens as the vocabulary writes them; empty for an id that it does not have."""
        ...


class ByteTokenizer:
    """One token per byte; a conversation is its lines, `role: content`."""

    vocab_size = 256

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def encode_chat(
        self,
        conversation: list[dict[str, str]],
        *,
        add_special_tokens: bool = False,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        lines = [f"{message['role']}: {message['content']}" for message in conversation]
        return self.encode("\n".join(lines))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def name(self, token_id: int) -> str:
        return added_text(b"", bytes([token_id]))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [chr(token) if token < 0x80 else f"<0x{token:02X}>" for token in ids]


class HfTokenizer:
    """A Hugging Face fast tokenizer and its chat template, from the documents of an engine.

    `documents` are those that `admit` has verified; the engine's directory, which is named in
    errors, is not read again. transformers looks for further files by name (added tokens, special
    tokens), so it gets the verified bytes in a folder of their own. The template is rendered in
    helper processes, which get `max_seconds` for a conversation.

    Raises on opening:
        ArtifactError: there is no tokenizer.json, or one of the files cannot be used.
    """

    def __init__(
        self,
        directory: Path,
        documents: Mapping[str, bytes],
        *,
        max_seconds: float = MAX_SECONDS,
    ) -> None:
        if "tokenizer.json" not in documents:
            raise ArtifactError(
                f"{missing_tokenizer(directory)}; then build the engine from that checkpoint again"
            )
        try:
            template = ChatTemplate.from_documents(directory, documents)
        except UnusableFileError as error:
            raise ArtifactError(f"{error}; build the engine again") from error
        from transformers import PreTrainedTokenizerFast  # a second of import, only where needed

        try:
            parse_tokenizer(documents["tokenizer.json"])  # names what transformers would not
        except UnusableFileError as error:
            raise ArtifactError(f"{directory / 'tokenizer.json'} {error}") from error
        with tempfile.TemporaryDirectory(prefix="intserve-") as folder:
            for name, data in _without_paths(documents).items():
                (Path(folder) / name).write_bytes(data)
            try:
                self._tokenizer = PreTrainedTokenizerFast.from_pretrained(
                    folder, local_files_only=True
                )
            except Exception as error:  # of any type: a config may hold anything
                raise ArtifactError(
                    f"{directory} has a tokenizer that cannot be loaded ({first_line(error)}); "
                    "correct the source's tokenizer files and build again"
                ) from error
        # Texts are encoded as they are, whatever length the file fixes.
        self._tokenizer.backend_tokenizer.no_padding()
        self._tokenizer.backend_tokenizer.no_truncation()
        self._names = TokenNames(self._tokenizer.backend_tokenizer)
        self._renderer = (
            ChatRenderer(template, processes=RENDERERS, max_seconds=max_seconds)
            if template
            else None
        )

    @property
    def vocab_size(self) -> int:
        return len(self._tokenizer)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])

    def encode_chat(
        self,
        conversation: list[dict[str, str]],
        *,
        add_special_tokens: bool = False,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        if self._renderer is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions")
        try:
            text = self._renderer.render(conversation, add_generation_prompt=add_generation_prompt)
        except ChatTemplateError as error:
            raise InvalidRequest(f"the model's chat template {error}", param="messages") from error
        return self.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=False)

    def name(self, token_id: int) -> str:
        return self._names.name(token_id, ())[0]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self._tokenizer.backend_tokenizer.id_to_token(token) or "" for token in ids]


def _without_paths(documents: Mapping[str, bytes]) -> dict[str, bytes]:
    """The tokenizer files, and in tokenizer_config.json no key that names another file or code:
    what lies there is in no manifest."""
    files = {name: data for name, data in documents.items() if name in COPIED_FILES}
    name = "tokenizer_config.json"
    if name in files:
        config = untrusted.parse_json_object(files[name])
        kept = {key: value for key, value in config.items() if not _names_file(key)}
        files[name] = json.dumps(kept).encode()
    return files


def _names_file(key: str) -> bool:
    return key.endswith(("_file", "_files")) or key in ("auto_map", "name_or_path")
