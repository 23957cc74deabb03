"""Text to token ids, in the ingress: prompts and chat templates. prompts.py calls it, in threads.

`HfTokenizer` is made of the tokenizer files that `build` copied into the engine directory, never of
remote code. `ByteTokenizer` goes with the echo engine: one token per UTF-8 byte, and nothing to
load. The engine turns token ids back into text.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer as Tokenizers

from deepseek import untrusted
from deepseek.artifact.documents import COPIED_FILES
from deepseek.chat_template import MAX_SECONDS, ChatRenderer, ChatTemplate, ChatTemplateError
from deepseek.engine.token_names import TokenNames, added_text
from deepseek.errors import ArtifactError, first_line
from deepseek.tokenizer_file import missing_tokenizer, parse_tokenizer
from deepseek.untrusted import UnusableFileError
from serve_app.errors import InvalidRequest
from serve_app.openai.control_tokens import ControlTokens
from serve_app.openai.plain_tokenizer import open_plainly

#: Conversations that are rendered at one time: one that overruns its time holds up no other.
RENDERERS = 2
#: A text whose tokens are only counted is cut into pieces of so many characters, and may have so
#: many tokens more for each cut, and by this part, than the text as a whole.
PIECE_CHARACTERS = 16384
_SLACK_PER_CUT = 64
_SLACK_PART = 8


@dataclass(frozen=True, slots=True)
class PromptText:
    """A text that is to be encoded. `special_tokens` says that those which the model expects around
    a text are added; a conversation has them from its template. `protected`: control_tokens.py has
    rewritten it."""

    text: str
    special_tokens: bool = False
    protected: bool = False


class Tokenizer(Protocol):
    """Methods are called in threads, several at a time."""

    @property
    def vocab_size(self) -> int: ...

    def render(
        self, conversation: list[dict[str, str]], *, add_generation_prompt: bool = True
    ) -> PromptText:
        """A conversation in the model's chat template, up to the assistant's turn.

        Raises:
            InvalidRequest: there is no template, or it refuses the conversation.
        """
        ...

    def protect(
        self,
        conversation: list[dict[str, str]],
        rendered: PromptText,
        *,
        add_generation_prompt: bool = True,
    ) -> PromptText:
        """A rendered conversation in which control tokens in the messages are text.

        Raises:
            InvalidRequest: they cannot be.
        """
        ...

    def encode(self, prompt: PromptText) -> list[int]:
        """Token ids. Takes memory of about a hundred times the text's bytes."""
        ...

    def exceeds(self, prompt: PromptText, limit: int, abandoned: Callable[[], bool]) -> bool:
        """Whether the text has more than `limit` tokens beyond doubt. Takes the memory of a piece,
        and the time of about `limit` tokens, however long the text is. False does not say that it
        fits; nor does it when `abandoned` became true."""
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

    def render(
        self, conversation: list[dict[str, str]], *, add_generation_prompt: bool = True
    ) -> PromptText:
        lines = [f"{message['role']}: {message['content']}" for message in conversation]
        return PromptText("\n".join(lines))

    def protect(
        self,
        conversation: list[dict[str, str]],
        rendered: PromptText,
        *,
        add_generation_prompt: bool = True,
    ) -> PromptText:
        return rendered

    def encode(self, prompt: PromptText) -> list[int]:
        return list(prompt.text.encode())

    def exceeds(self, prompt: PromptText, limit: int, abandoned: Callable[[], bool]) -> bool:
        return len(prompt.text.encode()) > limit

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def name(self, token_id: int) -> str:
        return added_text(b"", bytes([token_id]))

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [chr(token) if token < 0x80 else f"<0x{token:02X}>" for token in ids]


class HfTokenizer:
    """A Hugging Face fast tokenizer and its chat template, from the documents of an engine.

    `documents` are those that `admit` has verified; the engine's directory, which is named in
    errors, is not read again. transformers, where it is needed (plain_tokenizer.py), looks for
    further files by name (added tokens, special tokens), so it gets the verified bytes in a folder
    of their own. The template is rendered in helper processes, which get `max_seconds` for a
    conversation.

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
        try:
            parse_tokenizer(documents["tokenizer.json"])  # names what others would not
        except UnusableFileError as error:
            raise ArtifactError(f"{directory / 'tokenizer.json'} {error}") from error
        files = _without_paths(documents)
        self._tokenizer = open_plainly(files) or _open_with_transformers(directory, files)
        self.vocab_size = self._tokenizer.get_vocab_size()
        # Texts are encoded as they are, whatever length the file fixes.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._names = TokenNames(self._tokenizer)
        self._control = ControlTokens(
            self._tokenizer, template.sources.values() if template else ()
        )
        self._renderer = (
            ChatRenderer(template, processes=RENDERERS, max_seconds=max_seconds)
            if template
            else None
        )

    def render(
        self, conversation: list[dict[str, str]], *, add_generation_prompt: bool = True
    ) -> PromptText:
        return PromptText(self._render(conversation, add_generation_prompt))

    def protect(
        self,
        conversation: list[dict[str, str]],
        rendered: PromptText,
        *,
        add_generation_prompt: bool = True,
    ) -> PromptText:
        text = self._control.protect(
            conversation, rendered.text, lambda marked: self._render(marked, add_generation_prompt)
        )
        return rendered if text is None else replace(rendered, text=text, protected=True)

    def _render(
        self, conversation: Sequence[Mapping[str, Any]], add_generation_prompt: bool
    ) -> str:
        if self._renderer is None:
            raise InvalidRequest("this model has no chat template; use /v1/completions")
        try:
            return self._renderer.render(conversation, add_generation_prompt=add_generation_prompt)
        except ChatTemplateError as error:
            raise InvalidRequest(f"the model's chat template {error}", param="messages") from error

    def encode(self, prompt: PromptText) -> list[int]:
        return self._encode(prompt, prompt.text)

    def exceeds(self, prompt: PromptText, limit: int, abandoned: Callable[[], bool]) -> bool:
        bare = replace(prompt, special_tokens=False)
        text, count, allowed = prompt.text, 0, limit + limit // _SLACK_PART
        for start in range(0, len(text), PIECE_CHARACTERS):
            if abandoned():
                return False
            count += len(self._encode(bare, text[start : start + PIECE_CHARACTERS]))
            allowed += _SLACK_PER_CUT
            if count > allowed:
                return True
        return False

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def name(self, token_id: int) -> str:
        return self._names.name(token_id, ())[0]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        return [self._tokenizer.id_to_token(token) or "" for token in ids]

    def _encode(self, prompt: PromptText, text: str) -> list[int]:
        """Token ids of a text that is part of the prompt."""
        if prompt.protected:
            return self._control.encode(text, special_tokens=prompt.special_tokens)
        # The method of batches lets other threads run, and the fast one counts no offsets.
        [encoding] = self._tokenizer.encode_batch_fast(
            [text], add_special_tokens=prompt.special_tokens
        )
        return list(encoding.ids)


def _open_with_transformers(directory: Path, files: Mapping[str, bytes]) -> Tokenizers:
    """Raises ArtifactError; `directory` is named in it, and not read."""
    from transformers import PreTrainedTokenizerFast  # a second of import, only where needed

    with tempfile.TemporaryDirectory(prefix="intserve-") as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        try:
            loaded = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # of any type: a config may hold anything
            raise ArtifactError(
                f"{directory} has a tokenizer that cannot be loaded ({first_line(error)}); "
                "correct the source's tokenizer files and build again"
            ) from error
    # Used without transformers, which makes lists of more than the ids.
    tokenizer: Tokenizers = loaded.backend_tokenizer
    tokenizer.encode_special_tokens = loaded.split_special_tokens
    return tokenizer


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
