"""What the replica's process (the adapter) and the worker say to each other.

    adapter: Start  Generate*  Abort*  Ping*  Stop
    worker:  Hello  Progress*  Ready | Failed  (Output* End)*  Load*  Pong*  Fatal

`Hello` is the first frame of the worker and `Start` the first of the adapter, each with the version
of these messages. Every accepted `Generate` ends in exactly one `End`, an aborted one too; ids are
the adapter's and never used twice. `Fatal` says that the engine is dead; the process ends then.
Times are in seconds.
"""

from __future__ import annotations

from typing import Any

import msgspec

#: Version of the messages; raised with every change of them.
PROTOCOL = 1


class Message(msgspec.Struct, tag=True, omit_defaults=True):
    """Base of all messages. A field of another version is no error of the decoder: `protocol` in
    the first message tells."""


class Score(msgspec.Struct, array_like=True):
    """Of one token: its natural-log probability, how many tokens are at least as likely (None where
    the engine does not say), and the best alternatives, best first: (token id, logprob)."""

    logprob: float
    rank: int | None = None
    top: list[tuple[int, float]] = []


# To the worker.


class Start(Message, kw_only=True):
    """Load an engine. `backend` names a file here. `module` is the import path of the engine's
    package, None for the real one, and `path` are entries of sys.path to find it. `arguments` are
    those of the engine's constructor, checked by the adapter, and `engine_version` the version
    that they are for (None: any). `weight_bytes` is what there is to read, for the progress."""

    backend: str
    directory: str
    arguments: dict[str, Any]
    protocol: int
    module: str | None = None
    path: list[str] = []
    engine_version: str | None = None
    max_model_len: int | None = None
    weight_bytes: int = 0
    load_every_s: float = 1.0
    health_s: float = 3.0
    shutdown_s: float = 10.0


class Generate(Message, kw_only=True):
    """Generate one sequence. Nothing is left to an engine's defaults.

    `max_tokens` is at least 1. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 keep all tokens;
    `seed` lies in 0..2**63-1 and is None for a greedy request only. The sequence ends at any of
    `stop_token_ids`, and without `ignore_eos` at any of `end_ids`; the token that ends it is told.
    `logprobs` alternatives per token, 0 for the chosen token alone, None for nothing;
    `prompt_logprobs` likewise. Prefixes are shared among equal `cache_salt` only. `priority` lies
    in 0..1, None where none was asked for. No text crosses: stop strings are the adapter's.
    """

    id: int
    prompt_ids: list[int]
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    ignore_eos: bool
    end_ids: list[int]
    stop_token_ids: list[int]
    cache_salt: str
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    trace_headers: dict[str, str] = {}
    priority: float | None = None


class Abort(Message):
    """Stop a request, whose `End` follows. Of one that has ended it says nothing."""

    id: int


class Ping(Message):
    """Is the loop alive, and does the engine say that it is healthy? Answered by a `Pong`."""

    n: int


class Stop(Message):
    """End the engine and the process, in an orderly way as far as that goes."""


# From the worker.


class Hello(Message, kw_only=True):
    """The process is there; nothing of the engine has been imported."""

    pid: int
    python: str
    protocol: int
    engine_version: str | None = None


class Progress(Message, kw_only=True):
    """Loading goes on. `phase` is a word; `done` of `total` bytes of weights have been read, as far
    as can be told; `activity` grows with everything that the processes read or write, so that one
    which hangs shows."""

    phase: str
    done: int = 0
    total: int = 0
    activity: int = 0


class Ready(Message, kw_only=True):
    """The engine serves. `pids` are its rank processes. None: the engine does not say."""

    engine_version: str | None = None
    max_model_len: int | None = None
    kv_tokens_total: int | None = None
    page_tokens: int | None = None
    max_running: int | None = None
    pids: list[int] = []


class Failed(Message, kw_only=True):
    """The engine did not load: one sentence. The process ends after it."""

    phase: str
    error: str
    retry_with_less_memory: bool = False


class Output(Message):
    """New tokens of a request, of one or several steps. `scores` has one entry per new token where
    logprobs were asked for. `prompt_scores` comes once, not after the first tokens, with one entry
    per prompt token, the first one None. `cached_tokens` of the prompt were found computed;
    `queue_s` is what the engine says the request waited before it first ran."""

    id: int
    token_ids: list[int]
    scores: list[Score] | None = None
    prompt_scores: list[Score | None] | None = None
    cached_tokens: int | None = None
    queue_s: float | None = None


class End(Message):
    """No more comes of a request. `finish_reason` is the engine's own word. `error` is one
    sentence: of a request that the engine `refused` at once, of one that failed alone, or, with
    `fatal`, of an engine that is dead."""

    id: int
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    error: str | None = None
    refused: bool = False
    fatal: bool = False


class Load(Message, kw_only=True):
    """How busy the engine says it is; None: it does not say. Numbers of sequences, and of KV blocks
    of `page_tokens` tokens each. `steps` grows with every step that it does."""

    running: int | None = None
    waiting: int | None = None
    kv_blocks_used: int | None = None
    kv_blocks_total: int | None = None
    page_tokens: int | None = None
    steps: int | None = None


class Pong(Message):
    """The loop is alive. `healthy` is what the engine says of itself, and `why` it is not."""

    n: int
    healthy: bool
    why: str | None = None


class Fatal(Message):
    """The engine is dead, whoever asks: one sentence. The process ends after it."""

    why: str


ToWorker = Start | Generate | Abort | Ping | Stop
FromWorker = Hello | Progress | Ready | Failed | Output | End | Load | Pong | Fatal
