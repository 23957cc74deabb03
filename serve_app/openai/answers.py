"""OpenAI's answer objects, made from engine events. stream.py calls this file; it does no I/O.

There is one class per endpoint, with the same methods: `prompt_pieces` makes the streamed choices
that echo the prompt, `piece` a streamed choice with new text, `last` the streamed choice that
carries the finish reason, `whole` the unstreamed choice. They make plain dicts, because one is
built for every message of every stream. How logprobs are written is in logprobs.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from deepseek.engine.request import TokenLogprob
from serve_app.engines.events import cached_prompt_tokens
from serve_app.engines.protocol import Done, Tokens
from serve_app.openai.echoed import EchoedPrompt
from serve_app.openai.logprobs import LogprobStyle, TextLogprobs

#: Logprobs in one streamed message of an echoed prompt, alternatives included.
PIECE_LOGPROBS = 2048


@dataclass(slots=True)
class ChoiceState:
    """One choice so far. `echo` is the prompt that comes first, None without `echo: true`;
    `text_offset` counts characters; `started` says that a piece is sent."""

    index: int
    echo: EchoedPrompt | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    text_offset: int = 0
    started: bool = False
    done: Done | None = None

    @property
    def num_logprobs(self) -> int:
        """Logprobs to write, alternatives included: what the answer's size goes by."""
        entries = [*(self.prompt_logprobs or ()), *self.logprobs]
        return sum(1 + len(entry.top) for entry in entries if entry is not None)


class Format(Protocol):
    """How one endpoint writes its answers. `prefix` begins the answer's id; a prompt has
    `num_choices`."""

    prefix: str
    num_choices: int

    def choice(self, index: int) -> ChoiceState:
        """A choice that has nothing yet."""
        ...

    def prompt_pieces(self, choice: ChoiceState) -> Iterator[dict[str, Any]]:
        """The prompt, if it is echoed, once its logprobs are known, if they are asked for."""
        ...

    def piece(self, choice: ChoiceState, tokens: Tokens) -> dict[str, Any]: ...

    def last(self, choice: ChoiceState, reason: str) -> dict[str, Any]: ...

    def whole(self, choice: ChoiceState, reason: str) -> dict[str, Any]: ...

    def envelope(self, *, streamed: bool) -> dict[str, Any]: ...

    def extras(self, choices: list[ChoiceState]) -> dict[str, Any]:
        """Fields of the unstreamed answer beside its choices."""
        ...


def usage(choices: list[ChoiceState], prompt_tokens: int, num_choices: int) -> dict[str, Any]:
    """Token counts of the whole request. A prompt counts once, however many choices it has:
    `num_choices`."""
    done = {choice.index: choice.done for choice in choices if choice.done is not None}
    completion = sum(item.completion_tokens for item in done.values())
    cached = {index: item.cached_tokens for index, item in done.items()}
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": cached_prompt_tokens(cached, num_choices)},
    }


class _Base:
    prefix = ""
    object_whole = ""
    object_piece = ""

    def __init__(
        self,
        request_id: str,
        model: str,
        style: LogprobStyle,
        echoes: tuple[EchoedPrompt, ...] = (),
        num_choices: int = 1,
    ) -> None:
        """`echoes` are the prompts to echo, in order; each has `num_choices` choices."""
        self._id = request_id
        self._model = model
        self._created = int(time.time())
        self._style = style
        self._echoes = echoes
        self.num_choices = num_choices

    def choice(self, index: int) -> ChoiceState:
        echo = self._echoes[index // self.num_choices] if self._echoes else None
        return ChoiceState(index, echo)

    def envelope(self, *, streamed: bool) -> dict[str, Any]:
        return {
            "id": f"{self.prefix}{self._id}",
            "object": self.object_piece if streamed else self.object_whole,
            "created": self._created,
            "model": self._model,
        }


class ChatFormat(_Base):
    prefix = "chatcmpl-"
    object_whole = "chat.completion"
    object_piece = "chat.completion.chunk"

    def prompt_pieces(self, choice: ChoiceState) -> Iterator[dict[str, Any]]:
        return iter(())

    def piece(self, choice: ChoiceState, tokens: Tokens) -> dict[str, Any]:
        delta: dict[str, Any] = {"content": tokens.text}
        if not choice.started:
            delta = {"role": "assistant", **delta}
        return {
            "index": choice.index,
            "delta": delta,
            "logprobs": self._style.chat(tokens.logprobs),
            "finish_reason": None,
        }

    def last(self, choice: ChoiceState, reason: str) -> dict[str, Any]:
        delta = {} if choice.started else {"role": "assistant", "content": ""}
        return {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": reason}

    def whole(self, choice: ChoiceState, reason: str) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": "".join(choice.text), "refusal": None},
            "logprobs": self._style.chat(choice.logprobs),
            "finish_reason": reason,
        }

    def extras(self, choices: list[ChoiceState]) -> dict[str, Any]:
        """vLLM's `prompt_logprobs`: all choices have the same prompt, so the first speaks."""
        if self._style.num_prompt is None:
            return {}
        return {"prompt_logprobs": self._style.prompt(choices[0].prompt_logprobs)}


class CompletionFormat(_Base):
    prefix = "cmpl-"
    object_whole = object_piece = "text_completion"

    def prompt_pieces(self, choice: ChoiceState) -> Iterator[dict[str, Any]]:
        echo = choice.echo
        if echo is None:
            return
        choice.text_offset = len(echo.text)
        if choice.prompt_logprobs is None or self._style.num_text is None:
            yield self._streamed(choice, echo.text, None)
            return
        size = max(1, PIECE_LOGPROBS // (1 + self._style.num_text))
        logprobs, begin = TextLogprobs(self._style), 0
        offsets = echo.offsets(choice.prompt_logprobs)
        for item, offset in zip(choice.prompt_logprobs, offsets, strict=True):
            if len(logprobs) == size:
                yield self._streamed(choice, echo.text[begin:offset], logprobs.fields())
                begin, logprobs = offset, TextLogprobs(self._style)
            logprobs.add_echoed(echo, item, offset)
        yield self._streamed(choice, echo.text[begin:], logprobs.fields())

    def piece(self, choice: ChoiceState, tokens: Tokens) -> dict[str, Any]:
        logprobs = TextLogprobs(self._style)
        choice.text_offset = logprobs.add_all(tokens.logprobs, choice.text_offset)
        return self._streamed(choice, tokens.text, logprobs.fields())

    def last(self, choice: ChoiceState, reason: str) -> dict[str, Any]:
        return {"index": choice.index, "text": "", "logprobs": None, "finish_reason": reason}

    def whole(self, choice: ChoiceState, reason: str) -> dict[str, Any]:
        logprobs = TextLogprobs(self._style)
        text, echo = "".join(choice.text), choice.echo
        if echo is not None:
            text = echo.text + text
            if choice.prompt_logprobs is not None and self._style.num_text is not None:
                logprobs.add_prompt(echo, choice.prompt_logprobs)
        logprobs.add_all(choice.logprobs, 0 if echo is None else len(echo.text))
        answer = {
            "index": choice.index,
            "text": text,
            "logprobs": logprobs.fields(),
            "finish_reason": reason,
        }
        if self._style.num_prompt is not None:
            answer["prompt_logprobs"] = self._style.prompt(choice.prompt_logprobs)
        return answer

    def extras(self, choices: list[ChoiceState]) -> dict[str, Any]:
        return {}

    def _streamed(
        self, choice: ChoiceState, text: str, logprobs: dict[str, Any] | None
    ) -> dict[str, Any]:
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": None}
