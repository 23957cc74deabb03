"""Turns what an engine knows of a token's probability into what the API says, texts included.

The embedded engine and the adapters of others use it. It imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence as Items

from deepseek.engine.detokenizer import Tokenizer
from deepseek.engine.request import Choice, Sequence, TokenLogprob, TopLogprob
from deepseek.engine.token_names import TokenNames


class LogprobNamer:
    """Gives the tokens of a `Choice` their texts and bytes; empty without a tokenizer."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._names = None if tokenizer is None else TokenNames(tokenizer)

    def name_last(self, sequence: Sequence, choice: Choice) -> TokenLogprob:
        """Of the sequence's last token."""
        stop = sequence.num_tokens - 1
        return self.name(choice, sequence.tokens(max(0, stop - 4), stop))

    def name_prompt(
        self, sequence: Sequence, first: int, choices: Items[Choice]
    ) -> list[TokenLogprob]:
        """Of the prompt's tokens from position `first` on."""
        prompt = sequence.request.prompt_ids
        return [
            self.name(choice, prompt[max(0, position - 4) : position])
            for position, choice in enumerate(choices, first)
        ]

    def name(self, choice: Choice, context: Items[int]) -> TokenLogprob:
        """Of a token after the tokens of `context`."""
        assert choice.logprob is not None
        text, data = self._name(choice.token_id, context)
        top = []
        for token, logprob in choice.top:
            name = self._name(token, context)
            top.append(TopLogprob(token, name[0], logprob, name[1]))
        return TokenLogprob(choice.token_id, text, choice.logprob, tuple(top), data, choice.rank)

    def _name(self, token_id: int, context: Items[int]) -> tuple[str, bytes | None]:
        return ("", None) if self._names is None else self._names.name(token_id, context)
