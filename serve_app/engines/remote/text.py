"""One request to a remote engine: its text, stops, limits, counts and phases, from token ids alone.

The engine's own text, counts and reasons are not used. Its tokens go one by one through the same
`Tracked` as those of the embedded engine, so that stop strings, end tokens and limits end a text
here as they do there, whatever the engine thinks of them.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from collections.abc import Sequence as Items

from deepseek.engine.detokenizer import Detokenizer, Tokenizer
from deepseek.engine.limits import RequestLimits
from deepseek.engine.logprob_names import LogprobNamer
from deepseek.engine.request import Choice, FinishReason, Sequence, TokenLogprob
from deepseek.engine.tracked import Tracked
from deepseek.errors import RequestError
from serve_app.engines.protocol import Event, GenerateRequest
from serve_app.engines.steps import to_engine, to_events
from serve_app.engines.worker.messages import End, Generate, Output, Score

#: The engine's words for an end that nobody here asked for.
_BROKEN_OFF = ("timeout", "cancelled", "abort", "error")


class Answer:
    """What a client has been told of one request. `reason` is set when it has ended.

    `engine_ends` says that the engine, too, must end it with the token that ended it here: there is
    nothing to abort then. `now_s` are seconds of the caller's clock.

    Raises:
        RequestError: no engine with these limits can serve the request.
    """

    def __init__(
        self,
        request: GenerateRequest,
        *,
        limits: RequestLimits,
        tokenizer: Tokenizer | None,
        namer: LogprobNamer,
        end_token_ids: frozenset[int],
        now_s: float,
    ) -> None:
        tracked = to_engine(request)
        limits.check(tracked)
        sampling = request.sampling
        if not sampling.max_tokens and len(request.prompt_ids) >= limits.max_model_len:
            raise RequestError(
                f"the prompt has {len(request.prompt_ids)} tokens, but this engine scores at most "
                f"{limits.max_model_len - 1}: it generates one token after them; shorten it"
            )
        self._vocab_size = limits.vocab_size
        self._namer = namer
        self._sequence = Sequence(tracked, arrived_s=now_s)
        ends = frozenset(sampling.stop_token_ids)
        detokenizer = None
        if tokenizer is not None:
            detokenizer = Detokenizer(tokenizer, request.prompt_ids, sampling.stop)
        self._tracked = Tracked(
            self._sequence,
            detokenizer,
            end_token_ids=ends if sampling.ignore_eos else ends | end_token_ids,
            max_model_len=limits.max_model_len,
            prompt_logprobs=None if sampling.prompt_logprobs is None else [None],
        )
        #: Set where the engine did not say why it ended.
        self.is_unnamed = False
        self.engine_ends = False
        self.reason: FinishReason | None = self._tracked.replay()
        #: Tokens that may still come, at least 1 while it has not ended.
        self.room = max(
            1,
            min(sampling.max_tokens - len(request.output_ids),
                limits.max_model_len - self._sequence.num_tokens),
        )  # fmt: skip

    @property
    def prompt_tokens(self) -> int:
        return len(self._sequence.request.prompt_ids)

    @property
    def cached_tokens(self) -> int:
        return self._sequence.cached_prompt_tokens

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far: what its KV cache holds."""
        return self._sequence.num_tokens

    @property
    def began_s(self) -> float | None:
        """When the engine gave it its first token."""
        return self._sequence.first_token_s

    def replayed(self, now_s: float) -> Iterator[Event]:
        """The end of a request that the tokens end which it came with."""
        assert self.reason is not None
        return to_events(self._tracked.output(now_s, self.reason))

    def take(self, output: Output, now_s: float) -> Iterator[Event]:
        """The events of new tokens; those beyond the end are dropped."""
        if self.reason is not None:
            return iter(())
        sequence, sampling = self._sequence, self._sequence.request.sampling
        if output.cached_tokens is not None:
            sequence.num_cached = output.cached_tokens
        try:
            if output.prompt_scores is not None:
                self._name_prompt(output.prompt_scores)
            if not output.token_ids:
                return iter(())
            self._require_prompt_logprobs()
            if sequence.first_token_s is None:
                sequence.scheduled_s, sequence.first_token_s = sequence.arrived_s, now_s
            if output.queue_s is not None:
                began_s = sequence.arrived_s + output.queue_s
                sequence.scheduled_s = min(began_s, sequence.first_token_s)
            if not sampling.max_tokens:  # its one token is of no use, the prompt was
                self.reason, self.engine_ends = "length", True
                return to_events(self._tracked.output(now_s, "length"))
            taken, text, logprobs = self._push(output)
        except _Unusable as error:
            return self.fail(str(error), now_s)
        return to_events(self._tracked.output(now_s, self.reason, taken, text, logprobs))

    def end(self, end: End, now_s: float) -> Iterator[Event]:
        """The events of the engine's end, unless it has ended before. The engine's word counts for
        why, but for what it breaks off itself: that is an error, which another may not have."""
        if self.reason is not None:
            return iter(())
        sequence, sampling = self._sequence, self._sequence.request.sampling
        if end.error is not None:
            return self.fail(end.error, now_s, retryable=end.fatal)
        word = end.finish_reason
        if word in _BROKEN_OFF:
            return self.fail(f"the engine broke off this request ({word})", now_s, retryable=True)
        try:
            self._require_prompt_logprobs()
        except _Unusable as error:
            return self.fail(str(error), now_s)
        full = len(sequence.output_ids) >= sampling.max_tokens
        reason: FinishReason = "length" if word == "length" or full else "stop"
        if word not in ("stop", "length"):
            self.is_unnamed = True
        self.reason, text = self._tracked.finish(reason)
        return to_events(self._tracked.output(now_s, self.reason, text=text))

    def abort(self, now_s: float) -> Iterator[Event]:
        """Its end, because the client or the service wants it; with the text held back."""
        self.reason, text = self._tracked.finish("abort")
        self.reason = "abort"
        return to_events(self._tracked.output(now_s, "abort", text=text))

    def fail(self, error: str, now_s: float, *, retryable: bool = False) -> Iterator[Event]:
        """Its end in an error; `retryable` where another engine may succeed."""
        self.reason = "error"
        output = self._tracked.output(now_s, "error", error=error, retryable=retryable)
        return to_events(output)

    def _push(self, output: Output) -> tuple[tuple[int, ...], str, tuple[TokenLogprob, ...]]:
        """Take tokens until one ends the request."""
        sampling = self._sequence.request.sampling
        scores = output.scores or []
        if sampling.logprobs is not None and len(scores) != len(output.token_ids):
            raise _Unusable("the engine told no logprobs of its tokens")
        taken: list[int] = []
        texts: list[str] = []
        logprobs: list[TokenLogprob] = []
        for index, token_id in enumerate(output.token_ids):
            if not 0 <= token_id < self._vocab_size:
                raise _Unusable(f"the engine gave token {token_id}, which the model has not")
            self.reason, text = self._tracked.push(token_id)
            taken.append(token_id)
            texts.append(text)
            if sampling.logprobs is not None:
                choice = _choice(token_id, scores[index], sampling.logprobs)
                logprobs.append(self._namer.name_last(self._sequence, choice))
            if self.reason is not None:
                self.engine_ends = (
                    token_id in self._tracked.end_token_ids
                    or len(self._sequence.output_ids) >= sampling.max_tokens
                    or self._sequence.num_tokens >= self._tracked.max_model_len
                )
                break
        return tuple(taken), "".join(texts), tuple(logprobs)

    def _name_prompt(self, scores: Items[Score | None]) -> None:
        """Keep the logprobs of the prompt, where they were asked for and not told yet."""
        told = self._tracked.prompt_logprobs
        if told is None or self._sequence.request.sampling.prompt_logprobs is None:
            return
        prompt = self._sequence.request.prompt_ids
        if len(scores) != len(prompt):
            raise _Unusable(
                f"the engine told {len(scores)} logprobs of {len(prompt)} prompt tokens"
            )
        num_top = self._sequence.request.sampling.prompt_logprobs
        choices = []
        for token_id, score in zip(prompt[1:], scores[1:], strict=True):
            if score is None:
                raise _Unusable("the engine told no logprob of a prompt token")
            choices.append(_choice(token_id, score, num_top))
        told[1:] = self._namer.name_prompt(self._sequence, 1, choices)

    def _require_prompt_logprobs(self) -> None:
        told = self._tracked.prompt_logprobs
        if told is not None and len(told) != self.prompt_tokens:
            raise _Unusable("the engine told no logprobs of the prompt")


class _Unusable(Exception):
    """What the engine told of a request cannot be passed on: one sentence."""


def _choice(token_id: int, score: Score, num_top: int) -> Choice:
    top = tuple((token, logprob) for token, logprob in score.top[:num_top])
    return Choice(token_id, score.logprob, top, score.rank)


def to_worker(
    request: GenerateRequest,
    number: int,
    *,
    room: int,
    end_token_ids: frozenset[int],
    salt: str,
    priority: float | None = None,
) -> Generate:
    """The request as the worker gets it: the tokens of a replica before are part of its prompt.

    A continued sample is drawn anew from where it stands, from the same distribution, not with the
    same numbers: another seed keeps it from using those again that drew its beginning.
    """
    sampling = request.sampling
    done = len(request.output_ids)
    seed = None
    if sampling.temperature > 0:
        given = secrets.randbits(63) if sampling.seed is None else sampling.seed
        seed = (given + done) % (1 << 63)
    return Generate(
        id=number,
        prompt_ids=[*request.prompt_ids, *request.output_ids],
        max_tokens=room,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=seed,
        ignore_eos=sampling.ignore_eos,
        end_ids=sorted(end_token_ids),
        stop_token_ids=list(sampling.stop_token_ids),
        cache_salt=salt,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
        trace_headers=dict(request.trace_context),
        priority=priority,
    )
