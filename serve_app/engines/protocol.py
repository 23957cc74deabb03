"""The engine protocol: the few words that the ingress and any engine share.

Two implementations stand behind it, the embedded engine and an echo engine for tests and overhead
benchmarks; TensorRT-LLM in its own process is a later issue. Plain dataclasses cross the actor
hop: they pickle cheaply and hide no iterators.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to choose tokens. `temperature` 0 is greedy. `logprobs` is the number of alternatives
    per token, None for no logprobs at all; 0 gives the chosen token's only."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One sequence to generate. `n` choices are `n` requests with ids `ID-0`, `ID-1`, ..."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    #: W3C trace context (`traceparent`, `tracestate`), empty when the request is not traced.
    trace_context: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probability of one token and its best alternatives, under the model's own
    distribution (before temperature, top-k and top-p)."""

    token_id: int
    token: str
    logprob: float
    top: tuple[tuple[int, str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Tokens:
    """New tokens since the last event. `text` is what may be shown now: a piece that could still
    become a stop string, or half a UTF-8 character, is held back."""

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Done:
    """The one final event of every accepted request. Times are seconds spent in each phase."""

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    error: str | None = None


Event = Tokens | Done


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What admission and autoscaling look at."""

    running: int
    waiting: int
    kv_tokens_used: int
    kv_tokens_total: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What the engine serves, known once it has started. `max_model_len` counts prompt and
    completion together."""

    model_id: str
    max_model_len: int
    kv_tokens_total: int
    recipe: str
    artifact_digest: str
    engine: str
    #: Whether the accuracy gate passed for exactly this artifact; an echo has nothing to gate.
    gated: bool


class Engine(Protocol):
    """One model behind one replica."""

    async def start(self) -> EngineInfo:
        """Load the model. Raises an IntServeError that says why it cannot."""
        ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Events in order, the last one `Done`. Closing the iterator early aborts the request and
        frees its KV pages. Raises RequestError before the first event if it can never be served."""
        ...

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Stop these requests; their streams end in `Done("abort")`. Unknown ids are ignored."""
        ...

    def load(self) -> Load: ...

    async def check(self) -> None:
        """Raise when the engine must be restarted."""
        ...

    async def shutdown(self) -> None: ...


@dataclass(frozen=True, slots=True)
class ReplicaStatus:
    """What one engine replica says of itself."""

    replica_id: str
    info: EngineInfo
    load: Load


class EngineClient(Protocol):
    """What the ingress needs of the engines behind it."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Events of one request from some engine. Closing it aborts the request."""
        ...

    async def statuses(self) -> list[ReplicaStatus]:
        """Of every replica that is alive. Raises EngineUnavailable where none is."""
        ...

    async def info(self) -> EngineInfo:
        """What is served; all replicas serve the same. Raises EngineUnavailable."""
        ...
