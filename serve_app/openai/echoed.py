"""The prompt as `echo: true` gives it back, and where its tokens stand in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from deepseek.engine.request import TokenLogprob
from serve_app.openai.tokenizer import Tokenizer

#: Characters ahead that are searched for a token which is not where it should be.
_WINDOW = 16


@dataclass(frozen=True, slots=True)
class EchoedPrompt:
    """A prompt's text, exactly as it was sent, or decoded where it was sent as token ids; and its
    first token, which no logprob names."""

    text: str
    first_id: int
    first_token: str

    @classmethod
    def of(cls, prompt: str | list[int], ids: Sequence[int], tokenizer: Tokenizer) -> EchoedPrompt:
        """Of a prompt as sent, and the token ids that were made of it. Slow for long prompts: call
        it in a thread."""
        text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
        return cls(text, ids[0], tokenizer.name(ids[0]))

    def offsets(self, logprobs: Sequence[TokenLogprob | None]) -> Iterator[int]:
        """Where each token begins in `text`, in characters.

        A token that the text does not have, such as the begin-of-sentence token that a tokenizer
        puts in front, takes no room."""
        at = 0
        for item in logprobs:
            token = self.first_token if item is None else item.token
            begin = self.text.find(token, at, at + len(token) + _WINDOW)
            yield max(at, begin)
            if begin >= 0:
                at = begin + len(token)
