"""OpenAI's answer objects, made from engine events. stream.py calls this file; it does no I/O.

There is one class per endpoint, with the same three methods: `piece` makes a streamed choice with
new text, `last` the streamed choice that carries the finish reason, `whole` the unstreamed choice.
They make plain dicts, because one is built for every message of every stream.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from deepseek.engine.request import TokenLogprob
from serve_app.engines.protocol import Done, Tokens


@dataclass(slots=True)
class ChoiceState:
    """One choice so far. `text_offset` counts characters; `started` says that a piece is sent."""

    index: int
    text: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    text_offset: int = 0
    started: bool = False
    done: Done | None = None


class Format(Protocol):
    """How one endpoint writes its answers. `prefix` begins the answer's id."""

    prefix: str

    def piece(self, choice: ChoiceState, tokens: Tokens) -> dict[str, Any]: ...

    def last(self, choice: ChoiceState, reason: str) -> dict[str, Any]: ...

    def whole(self, choice: ChoiceState, reason: str) -> dict[str, Any]: ...

    def envelope(self, *, streamed: bool) -> dict[str, Any]: ...


def usage(choices: list[ChoiceState], prompt_tokens: int) -> dict[str, Any]:
    """Token counts of the whole request. A prompt counts once, however many choices it has."""
    done = [choice.done for choice in choices if choice.done is not None]
    completion = sum(item.completion_tokens for item in done)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": max((d.cached_tokens for d in done), default=0)},
    }


class _Base:
    prefix = ""
    object_whole = ""
    object_piece = ""

    def __init__(self, request_id: str, model: str) -> None:
        self._id = request_id
        self._model = model
        self._created = int(time.time())

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

    def piece(self, choice: ChoiceState, tokens: Tokens) -> dict[str, Any]:
        delta: dict[str, Any] = {"content": tokens.text}
        if not choice.started:
            delta = {"role": "assistant", **delta}
        return {
            "index": choice.index,
            "delta": delta,
            "logprobs": _chat_logprobs(tokens.logprobs),
            "finish_reason": None,
        }

    def last(self, choice: ChoiceState, reason: str) -> dict[str, Any]:
        delta = {} if choice.started else {"role": "assistant", "content": ""}
        return {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": reason}

    def whole(self, choice: ChoiceState, reason: str) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": "".join(choice.text), "refusal": None},
            "logprobs": _chat_logprobs(choice.logprobs),
            "finish_reason": reason,
        }


class CompletionFormat(_Base):
    prefix = "cmpl-"
    object_whole = object_piece = "text_completion"

    def piece(self, choice: ChoiceState, tokens: Tokens) -> dict[str, Any]:
        logprobs = _text_logprobs(tokens.logprobs, choice.text_offset)
        choice.text_offset += sum(len(item.token) for item in tokens.logprobs)
        return {
            "index": choice.index,
            "text": tokens.text,
            "logprobs": logprobs,
            "finish_reason": None,
        }

    def last(self, choice: ChoiceState, reason: str) -> dict[str, Any]:
        return {"index": choice.index, "text": "", "logprobs": None, "finish_reason": reason}

    def whole(self, choice: ChoiceState, reason: str) -> dict[str, Any]:
        return {
            "index": choice.index,
            "text": "".join(choice.text),
            "logprobs": _text_logprobs(choice.logprobs, 0),
            "finish_reason": reason,
        }


def _bytes(data: bytes | None) -> list[int] | None:
    return None if data is None else list(data)


def _chat_logprobs(logprobs: list[TokenLogprob] | tuple[TokenLogprob, ...]) -> Any:
    if not logprobs:
        return None
    return {
        "content": [
            {
                "token": item.token,
                "logprob": item.logprob,
                "bytes": _bytes(item.bytes),
                "top_logprobs": [
                    {"token": top.token, "logprob": top.logprob, "bytes": _bytes(top.bytes)}
                    for top in item.top
                ],
            }
            for item in logprobs
        ],
        "refusal": None,
    }


def _text_logprobs(
    logprobs: list[TokenLogprob] | tuple[TokenLogprob, ...], offset: int
) -> dict[str, Any] | None:
    """Logprobs as the completions endpoint writes them. Offsets count characters of the tokens,
    from `offset` on."""
    if not logprobs:
        return None
    offsets = []
    for item in logprobs:
        offsets.append(offset)
        offset += len(item.token)
    return {
        "tokens": [item.token for item in logprobs],
        "token_logprobs": [item.logprob for item in logprobs],
        "top_logprobs": [{top.token: top.logprob for top in item.top} for item in logprobs],
        "text_offset": offsets,
    }
