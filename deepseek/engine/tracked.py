"""A request under way, as the engine tracks it: its sequence, and what its tokens add up to.

One token after the other, newly chosen or given (continuation.py), goes through `Tracked.push`: a
request that goes on elsewhere gets the text and the end that it would have had here.
"""

from __future__ import annotations

from dataclasses import dataclass

from deepseek.engine.continuation import unshown_text
from deepseek.engine.detokenizer import Detokenizer
from deepseek.engine.request import FinishReason, Sequence, StepOutput, TokenLogprob


@dataclass(slots=True)
class Tracked:
    """A sequence, the token ids that end it, the most tokens that it may have (prompt and output
    together), the logprobs of its prompt so far if they are asked for and not reported yet, and,
    where the engine has a tokenizer, the detokenizer of its text. `unshown` is final text that goes
    out with the next output."""

    sequence: Sequence
    detokenizer: Detokenizer | None
    end_token_ids: frozenset[int]
    max_model_len: int
    prompt_logprobs: list[TokenLogprob | None] | None
    unshown: str = ""

    def replay(self) -> FinishReason | None:
        """Take the tokens that the request comes with, and keep the text that was not passed on.
        Returns the reason if they end the request: nothing is left to compute then.

        Raises:
            RequestError: more text was passed on than these tokens have.
        """
        request = self.sequence.request
        pieces: list[str] = []
        reason: FinishReason | None = None
        for count, token_id in enumerate(request.output_ids, 1):
            reason, text = self.push(token_id)
            pieces.append(text)
            if reason is not None:
                # They all count, also any that a caller gives beyond the end.
                self.sequence.output_ids += request.output_ids[count:]
                break
        self.unshown = unshown_text("".join(pieces), request.num_shown)
        return reason

    def push(self, token_id: int) -> tuple[FinishReason | None, str]:
        """Append a token. Returns why the request ends with it, if it does, and the text that is
        final now."""
        self.sequence.output_ids.append(token_id)
        reason = self._stop_reason(token_id)
        detokenizer = self.detokenizer
        if detokenizer is None:
            return reason, ""
        is_end_token = reason == "stop"  # an end token has no text
        text = "" if is_end_token else detokenizer.push(token_id)
        if detokenizer.stopped:
            reason = "stop"
        elif reason is not None:
            text += detokenizer.flush()
            reason = "stop" if detokenizer.stopped else reason
        return reason, text

    def finish(self, reason: FinishReason) -> tuple[FinishReason, str]:
        """End a request for a reason that no token tells: an engine of another kind says so, or it
        is aborted. Returns the reason and the text that was held back; a stop string in it counts.
        """
        detokenizer = self.detokenizer
        if detokenizer is None or detokenizer.stopped:
            return reason, ""
        text = detokenizer.flush()
        return ("stop" if detokenizer.stopped and reason == "length" else reason), text

    def output(
        self,
        now_s: float,
        reason: FinishReason | None,
        token_ids: tuple[int, ...] = (),
        text: str = "",
        logprobs: tuple[TokenLogprob, ...] = (),
        error: str | None = None,
        retryable: bool = False,
    ) -> StepOutput:
        """What is told of the request now, counts and times included."""
        sequence = self.sequence
        text, self.unshown = self.unshown + text, ""
        queue_s, prefill_s, decode_s = sequence.phases(now_s)
        prompt_logprobs = None
        if self.prompt_logprobs is not None and reason not in ("abort", "error"):
            prompt_logprobs, self.prompt_logprobs = tuple(self.prompt_logprobs), None
        return StepOutput(
            request_id=sequence.request.request_id,
            token_ids=token_ids,
            text=text,
            logprobs=logprobs,
            finish_reason=reason,
            prompt_tokens=len(sequence.request.prompt_ids),
            completion_tokens=len(sequence.output_ids),
            queue_s=queue_s,
            prefill_s=prefill_s,
            decode_s=decode_s,
            cached_tokens=sequence.cached_prompt_tokens,
            error=error,
            retryable=retryable,
            prompt_logprobs=prompt_logprobs,
        )

    def _stop_reason(self, token_id: int) -> FinishReason | None:
        sequence = self.sequence
        if token_id in self.end_token_ids:
            return "stop"
        if len(sequence.output_ids) >= sequence.request.sampling.max_tokens:
            return "length"
        return "length" if sequence.num_tokens >= self.max_model_len else None
