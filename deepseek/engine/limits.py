"""What a request must fulfill to be accepted by an engine. No torch is imported here."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass

from deepseek.engine.continuation import check_continuation, check_seed
from deepseek.engine.request import Request
from deepseek.errors import RequestError


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """Of one engine. `max_model_len` counts prompt and completion together; `is_cut_to_dense` says
    that it is what it is because the engine has no sparse attention."""

    max_model_len: int
    vocab_size: int
    has_tokenizer: bool
    is_cut_to_dense: bool

    def check(self, request: Request) -> None:
        """Raises:
        RequestError: the request can never be served.
        """
        least = min(1, request.sampling.max_tokens)  # the room that a completion needs
        self.check_tokens(request.prompt_ids, "prompt", limit=self.max_model_len - least)
        if request.sampling.stop and not self.has_tokenizer:
            raise RequestError("stop strings need a tokenizer, which this engine has not")
        check_continuation(request.sampling, request.output_ids, request.num_shown, self.vocab_size)
        check_seed(request.sampling, request.output_ids)
        total = len(request.prompt_ids) + len(request.output_ids)
        if total > self.max_model_len:
            raise RequestError(
                f"the prompt and output_ids have {total} tokens together, but this engine takes at "
                f"most {self.max_model_len}; give the output_ids of an engine with the same limit"
            )

    def check_tokens(self, tokens: Items[int], what: str, limit: int | None = None) -> None:
        """Raises:
        RequestError: there are none, more than `limit` (None: `max_model_len`), or ids that are
            not in the vocabulary.
        """
        limit = self.max_model_len if limit is None else limit
        if not tokens:
            raise RequestError(f"the {what} is empty; give at least one token")
        if len(tokens) > limit:
            raise RequestError(
                f"the {what} has {len(tokens)} tokens, but this engine takes at most {limit}"
                + (" (it has no sparse attention)" if self.is_cut_to_dense else "")
                + "; shorten it"
            )
        if not 0 <= min(tokens) <= max(tokens) < self.vocab_size:
            raise RequestError(f"the {what} holds a token id outside 0..{self.vocab_size - 1}")
