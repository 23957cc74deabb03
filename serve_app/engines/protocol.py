"""The engine protocol: what the ingress, the replica and every engine adapter say to each other.

An adapter implements `Engine`; `EngineReplica` owns one and drives it; the ingress sees all
replicas through `EngineClient`. What a token, a sampling parameter or a load is, the ground floor
defines (deepseek/engine/request.py and options.py); this file adds only what belongs to a service:
ids, trace context, events, status. It imports neither torch nor Ray, and knows nothing of gates.

Everything here that is not a Protocol crosses the actor hop and is a plain dataclass: it pickles
without running its constructor, so values are checked once, where the request is admitted.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from deepseek.engine.options import EngineLoad
from deepseek.engine.request import FinishReason, SamplingParams, TokenLogprob, TopLogprob
from serve_app.setting_types import POOL


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """One sequence to generate. `n` choices are `n` requests with ids `ID-0`, `ID-1`, ..."""

    request_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    #: What another replica has generated already, and how many characters of its text were passed
    #: on: the engine goes on from there as if it had generated them, and counts them in `Done`.
    output_ids: tuple[int, ...] = ()
    num_shown: int = 0
    #: Prefixes are shared only among requests of equal salt: one per API key.
    cache_salt: str = ""
    #: The replica that admission chose, and those that must not get it.
    replica_id: str | None = None
    avoid: tuple[str, ...] = ()
    #: W3C trace context (`traceparent`, `tracestate`), empty when the request is not traced.
    trace_context: dict[str, str] = field(default_factory=dict)
    #: The pools that may take it, its home first.
    pools: tuple[str, ...] = (POOL,)
    #: Names its session, where it has one: a digest, never what a client sent.
    affinity: str = ""
    #: When its HTTP request arrived, on the ingress's monotonic clock. No replica gets it.
    arrived: float | None = None


@dataclass(frozen=True, slots=True)
class Placed:
    """The request runs on this replica, of this pool; before its first event from there. `attempt`
    counts from 1; a later one goes on where the last replica ended."""

    replica_id: str
    attempt: int = 1
    pool: str = ""


@dataclass(frozen=True, slots=True)
class Tokens:
    """New tokens since the last event. `text` may be shown now: the engine holds back a piece that
    could still become a stop string, and half of a UTF-8 character."""

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """The prompt's own logprobs, for a request that asks for them: at most once, before the first
    `Tokens`. One entry per prompt token; the first is None, because nothing predicts it.

    A long prompt has hundreds of thousands of entries, and pickling holds up everything else in the
    process: they cross as plain tuples, which takes half the time.
    """

    logprobs: tuple[TokenLogprob | None, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        return _prompt_logprobs, (tuple(map(_plain, self.logprobs)),)


def _plain(item: TokenLogprob | None) -> tuple[Any, ...] | None:
    if item is None:
        return None
    token_id, token, logprob, top, data, rank = item
    return token_id, token, logprob, tuple([tuple(entry) for entry in top]), data, rank


def _prompt_logprobs(rows: tuple[tuple[Any, ...] | None, ...]) -> PromptLogprobs:
    return PromptLogprobs(tuple([None if row is None else _named(*row) for row in rows]))


def _named(
    token_id: int, token: str, logprob: float, top: Any, data: bytes | None, rank: int | None
) -> TokenLogprob:
    entries = tuple([TopLogprob._make(entry) for entry in top])
    return TokenLogprob(token_id, token, logprob, entries, data, rank)


@dataclass(frozen=True, slots=True)
class Done:
    """The final event: every accepted request gets exactly one. `cached_tokens` of the prompt were
    found computed (a prefix cache). `queue_s`, `prefill_s` and `decode_s` are the seconds spent in
    each phase; `error` is set when `reason` is "error".

    `retryable` tells an error of the engine (a step failed, whatever it computed) from one of the
    request (its own output is not finite, and would not be elsewhere): another replica may go on
    with the request only after the former."""

    reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    error: str | None = None
    retryable: bool = False


#: An engine yields `PromptLogprobs`, `Tokens` and `Done`; its replica puts `Placed` before them.
Event = Placed | PromptLogprobs | Tokens | Done


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What an engine serves, known once it has started.

    `max_model_len` counts prompt and completion together; `kv_tokens_total` is the capacity of the
    KV cache in tokens. `engine` names the adapter: "embedded", "echo". `context_name` is what
    `max_model_len` is the size of, for the sentence that refuses a longer prompt. `engine_digest`
    is that of the engine directory which was loaded, None for an adapter without one; `kv_cache` is
    the format of the KV pages in use, None for an adapter without any. `max_running` is the size of
    its batch, and `page_tokens` the tokens of a KV page: a sequence holds whole ones. `continues`
    says that it honors `GenerateRequest.output_ids`. `kv_bytes_per_token` are those of all layers,
    None where nobody has counted them.
    """

    max_model_len: int
    kv_tokens_total: int
    recipe: str
    artifact_digest: str
    engine: str
    context_name: str = "model's context"
    engine_digest: str | None = None
    kv_cache: str | None = None
    max_running: int | None = None
    page_tokens: int = 1
    continues: bool = False
    kv_bytes_per_token: float | None = None


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """How far an engine is on its way to serve. `phase` is for people ("reading the weights");
    `done_bytes` of `total_bytes` of it are done, where that is known: both 0 where it is not."""

    phase: str
    done_bytes: int = 0
    total_bytes: int = 0


class Engine(Protocol):
    """One model behind one replica. All methods are called on the replica's event loop."""

    async def start(self) -> EngineInfo:
        """Load the model. Awaited once, before anything else but `loading`.

        Raises:
            IntServeError: the model cannot be loaded; says why, and names the tensor, the argument
                or the rank that it failed on.
        """
        ...

    def loading(self) -> LoadProgress | None:
        """How far `start` is, None where nothing is known of it. Cheap: called once a second while
        `start` is awaited."""
        ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Yield the request's events in order, the last one `Done`. Closing the iterator early
        aborts the request and frees its KV pages.

        Raises:
            RequestError: the request can never be served; raised before the first event.
        """
        ...

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Stop these requests; their streams end in `Done("abort")`. Unknown ids are ignored."""
        ...

    def load(self) -> EngineLoad:
        """How busy the engine is now. Cheap: called for every request and every heartbeat."""
        ...

    async def check(self) -> None:
        """Raise when the engine must be replaced; Serve then restarts the replica."""
        ...

    def stalled_s(self) -> float:
        """Seconds for which the engine has had work and has finished no step; 0.0 while it is idle
        (`stall.py` keeps this). Cheap. A replica whose engine stalls for too long is replaced."""
        ...

    async def shutdown(self) -> None:
        """Release what `start` took; requests under way end in `EngineUnavailable`. Safe after a
        `start` that failed. Returns soon, also when a step hangs."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    """What one engine replica reports about itself in each heartbeat.

    `gated` says whether the accuracy gate passed for exactly the engine that the replica serves. It
    is true for an engine without an artifact, which has nothing to gate. `emulated` says that the
    figures that it judged are those of the target's arithmetic, emulated by another engine.
    `request_ids` are those that the replica works on; a later attempt at a sequence has the
    sequence's id and `~ATTEMPT`.
    """

    replica_id: str
    info: EngineInfo
    load: EngineLoad
    gated: bool
    emulated: bool = False
    request_ids: tuple[str, ...] = ()
    pool: str = POOL


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadingReplica:
    """What an engine replica that does not serve yet reports about itself, in place of heartbeats.

    `elapsed_s` are the seconds since it began, `eta_s` those that are left of this phase, None
    where nobody can say. `node` is Ray's id of its node. `failure` is why it has given up.
    """

    replica_id: str
    progress: LoadProgress
    elapsed_s: float
    eta_s: float | None = None
    pool: str = POOL
    node: str = ""
    failure: str | None = None


class EngineClient(Protocol):
    """What the ingress needs of the engines behind it."""

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        """Yield the events of one request from some engine. Closing the iterator aborts it."""
        ...

    async def statuses(self) -> list[ReplicaStatus]:
        """The status of every live replica. Raises EngineUnavailable when there is none."""
        ...

    async def infos(self, *, wait: bool = True) -> Mapping[str, EngineInfo]:
        """What is served, by pool, as was heard last; all replicas of a pool serve the same. With
        `wait` it is awaited for a while that any pool has told it.

        Raises:
            EngineUnavailable: none has, in vain.
        """
        ...
