"""The engine's nouns: requests, step outputs, and sequences.

serve_app uses SamplingParams, TokenLogprob and FinishReason too, from the HTTP body to the sampler,
so this file imports no torch. Lengths are derived, never stored twice. No tensors and no clock: the
engine passes times in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from deepseek.errors import RequestError

FinishReason = Literal["stop", "length", "abort", "error"]

#: Most alternatives per token that a request may ask for, as in OpenAI's completions.
MAX_LOGPROBS = 20

_Bytes = bytes  # below, `bytes` names a field


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose the tokens of one request, and when to stop.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 keep all tokens. Without `seed` the engine
    draws one. `logprobs` is the number of alternatives per token; 0 reports the chosen token only,
    None reports nothing. `prompt_logprobs` is the same for the tokens of the prompt. `max_tokens` 0
    computes the prompt and generates nothing. A `stop` string ends the text before its first
    character. The `stop_token_ids` and, without `ignore_eos`, the model's end token end the text
    and add nothing.

    Raises:
        RequestError: a value outside its range, named.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        _require(self.max_tokens >= 0, f"max_tokens must be at least 0, not {self.max_tokens}")
        _require(
            math.isfinite(self.temperature) and self.temperature >= 0,
            f"temperature must be a number of at least 0, not {self.temperature}",
        )
        _require(0 < self.top_p <= 1, f"top_p must lie in (0, 1], not {self.top_p}")
        _require(self.top_k >= 0, f"top_k must be at least 0 (0 keeps all), not {self.top_k}")
        _require("" not in self.stop, "stop must not hold an empty string")
        for name in ("logprobs", "prompt_logprobs"):
            count = getattr(self, name)
            _require(
                count is None or 0 <= count <= MAX_LOGPROBS,
                f"{name} must lie in 0..{MAX_LOGPROBS}, not {count}",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt to continue. `request_id` is the caller's and unique among unfinished requests.

    `output_ids` are tokens that an engine of the same model has generated for it already, and
    `num_shown` the characters of their text that were passed on: the engine goes on from there.
    Prefixes that are computed already are shared only among requests of equal `cache_salt`.
    """

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    output_ids: tuple[int, ...] = ()
    num_shown: int = 0
    cache_salt: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """One chosen or given token. Log-probabilities are natural, of the raw distribution; `logprob`
    is None when not asked for, `top` holds (token id, log-probability), best first, and `rank` is
    the number of tokens that are at least as likely."""

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None


class TopLogprob(NamedTuple):
    """One alternative at a position. Fields as in `TokenLogprob`."""

    token_id: int
    token: str
    logprob: float
    bytes: _Bytes | None = None


class TokenLogprob(NamedTuple):
    """Natural-log probabilities under the model's own distribution, before temperature and cuts.

    `token` is the text that the token adds where it stands: empty for a token that ends within a
    character, and the whole character for the one that completes it (token_names.py). `bytes` are
    the token's own, also where they are part of a character; None where the vocabulary has none for
    it. `rank` is the number of tokens that are at least as likely, itself included; None where it
    is not counted. `top` holds the best alternatives, best first. A tuple, because a long prompt
    has hundreds of thousands of them, which cross a process boundary.
    """

    token_id: int
    token: str
    logprob: float
    top: tuple[TopLogprob, ...] = ()
    bytes: _Bytes | None = None
    rank: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """What one step added to one request. The last output of a request has a `finish_reason`.

    `text` may lag behind `token_ids`, because the detokenizer holds text back until it is final.
    Counts are totals so far; times are seconds spent in each phase so far. `prompt_logprobs` comes
    once, when the prompt is computed, to a request that asks for it: an entry per prompt token, the
    first one None, because nothing predicts it. `cached_tokens` of the prompt were found computed
    when the request first ran. `retryable` says of an error that another engine may succeed where
    this one failed: a step failed, and not this request.
    """

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None
    prompt_tokens: int
    completion_tokens: int
    queue_s: float
    prefill_s: float
    decode_s: float
    cached_tokens: int = 0
    error: str | None = None
    retryable: bool = False
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None


@dataclass(slots=True, eq=False)
class Sequence:
    """A request under way. The latents of its first `num_computed` tokens are in its KV `pages`.

    The page pool gives it pages and takes them back (pages.py). After a preemption `num_computed`
    is 0 again and the tokens generated so far are computed anew, like a longer prompt, but for the
    pages that are still found; a request that another engine began starts like that. The logprobs
    of the first `num_scored` prompt tokens are known; a preemption loses none of them.

    `prefix_root` begins the keys of its pages (prefix.py); None shares no pages. `page_keys` are
    those made so far. `num_cached` tokens were found computed when it first ran, None before that.
    """

    request: Request
    arrived_s: float
    output_ids: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_scored: int = 1
    seed: int = 0
    scheduled_s: float | None = None
    first_token_s: float | None = None
    prefix_root: bytes | None = None
    page_keys: list[bytes] = field(default_factory=list)
    num_cached: int | None = None

    def __post_init__(self) -> None:
        assert self.request.prompt_ids

    @property
    def num_tokens(self) -> int:
        """Prompt and output together."""
        return len(self.request.prompt_ids) + len(self.output_ids)

    @property
    def cached_prompt_tokens(self) -> int:
        """Prompt tokens that were found computed when it first ran."""
        return min(self.num_cached or 0, len(self.request.prompt_ids))

    @property
    def num_to_compute(self) -> int:
        """Number of tokens whose latents are missing; 1 while decoding."""
        return self.num_tokens - self.num_computed

    def rows_to_score(self, start: int, stop: int) -> range:
        """Positions in [start, stop) whose logits score a prompt token that has no logprob yet: the
        logits at position p score token p + 1."""
        if self.request.sampling.prompt_logprobs is None:
            return range(0)
        return range(max(start, self.num_scored - 1), min(stop, len(self.request.prompt_ids) - 1))

    def tokens(self, start: int, stop: int) -> list[int]:
        """Token ids of the positions [start, stop)."""
        prompt = self.request.prompt_ids
        if start >= len(prompt):
            return self.output_ids[start - len(prompt) : stop - len(prompt)]
        head = list(prompt[start:stop])
        return head + self.output_ids[: max(0, stop - len(prompt))]

    def phases(self, now_s: float) -> tuple[float, float, float]:
        """Seconds so far in queue, prefill and decode."""
        if self.scheduled_s is None:
            return now_s - self.arrived_s, 0.0, 0.0
        queue_s = self.scheduled_s - self.arrived_s
        if self.first_token_s is None:
            return queue_s, now_s - self.scheduled_s, 0.0
        return queue_s, self.first_token_s - self.scheduled_s, now_s - self.first_token_s


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RequestError(message)
