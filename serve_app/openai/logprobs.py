"""Logprobs as OpenAI's endpoints and vLLM's extensions write them. answers.py calls this file.

JSON has no infinity: a logprob below -9999 is written as -9999, as vLLM does. Completions key the
alternatives by their text, and texts can collide (tokens that are parts of characters): the more
likely token stays, so that the largest value is always that of the most likely token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from deepseek.engine.request import TokenLogprob
from serve_app.openai.echoed import EchoedPrompt

#: The least logprob that is written.
MIN_LOGPROB = -9999.0


@dataclass(frozen=True, slots=True)
class LogprobStyle:
    """What of the engine's logprobs an answer shows, and how.

    `num_text` is the number of alternatives per token in `logprobs`, `num_prompt` that in
    `prompt_logprobs`; None leaves the field out. `as_token_ids` writes tokens as `token_id:N`.
    """

    num_text: int | None = None
    num_prompt: int | None = None
    as_token_ids: bool = False

    def token(self, token_id: int, text: str) -> str:
        return f"token_id:{token_id}" if self.as_token_ids else text

    def chat(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """`logprobs` of a chat choice; None where there are none."""
        if not logprobs:
            return None
        return {
            "content": [
                {
                    "token": self.token(item.token_id, item.token),
                    "logprob": max(item.logprob, MIN_LOGPROB),
                    "bytes": _bytes(item.bytes),
                    "top_logprobs": [
                        {
                            "token": self.token(top.token_id, top.token),
                            "logprob": max(top.logprob, MIN_LOGPROB),
                            "bytes": _bytes(top.bytes),
                        }
                        for top in item.top
                    ],
                }
                for item in logprobs
            ],
            "refusal": None,
        }

    def prompt(
        self, logprobs: Iterable[TokenLogprob | None] | None
    ) -> list[dict[int, dict[str, Any]] | None] | None:
        """vLLM's `prompt_logprobs`: for each token of the prompt the token itself and the best
        alternatives by id; None for the first token, which nothing predicts."""
        if logprobs is None:
            return None
        return [None if item is None else self._by_id(item) for item in logprobs]

    def _by_id(self, item: TokenLogprob) -> dict[int, dict[str, Any]]:
        entries = {item.token_id: _entry(item.logprob, item.rank, item.token)}
        for rank, top in enumerate(item.top[: self.num_prompt], start=1):
            entries[top.token_id] = _entry(top.logprob, rank, top.token)
        return entries


class TextLogprobs:
    """`logprobs` of a completion choice, token by token. Offsets count characters of the text."""

    def __init__(self, style: LogprobStyle) -> None:
        self._style = style
        self._tokens: list[str] = []
        self._logprobs: list[float | None] = []
        self._top: list[dict[str, float] | None] = []
        self._offsets: list[int] = []

    def __len__(self) -> int:
        return len(self._tokens)

    def fields(self) -> dict[str, Any] | None:
        """The object of the answer; None without tokens."""
        if not self._tokens:
            return None
        return {
            "tokens": self._tokens,
            "token_logprobs": self._logprobs,
            "top_logprobs": self._top,
            "text_offset": self._offsets,
        }

    def add(self, item: TokenLogprob, offset: int) -> None:
        """A token and its alternatives; the token itself is always among them."""
        style = self._style
        own = style.token(item.token_id, item.token)
        logprob = max(item.logprob, MIN_LOGPROB)
        top = {own: logprob}
        for other in item.top[: style.num_text]:
            name = style.token(other.token_id, other.token)
            top[name] = max(top.get(name, MIN_LOGPROB), other.logprob)
        self._append(own, logprob, top, offset)

    def add_all(self, logprobs: Iterable[TokenLogprob], offset: int) -> int:
        """Tokens whose texts follow each other from `offset` on; returns where they end."""
        for item in logprobs:
            self.add(item, offset)
            offset += len(item.token)
        return offset

    def add_prompt(self, echo: EchoedPrompt, logprobs: Sequence[TokenLogprob | None]) -> None:
        """All tokens of an echoed prompt."""
        for item, offset in zip(logprobs, echo.offsets(logprobs), strict=True):
            self.add_echoed(echo, item, offset)

    def add_echoed(self, echo: EchoedPrompt, item: TokenLogprob | None, offset: int) -> None:
        """One token of an echoed prompt; None is the first, which nothing predicts."""
        if item is None:
            self._append(self._style.token(echo.first_id, echo.first_token), None, None, offset)
        else:
            self.add(item, offset)

    def _append(
        self, token: str, logprob: float | None, top: dict[str, float] | None, offset: int
    ) -> None:
        self._tokens.append(token)
        self._logprobs.append(logprob)
        self._top.append(top)
        self._offsets.append(offset)


def _entry(logprob: float, rank: int | None, token: str) -> dict[str, Any]:
    return {"logprob": max(logprob, MIN_LOGPROB), "rank": rank, "decoded_token": token}


def _bytes(data: bytes | None) -> list[int] | None:
    return None if data is None else list(data)
