"""How a worker is started, what it loads, and how long it may take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepseek.engine.detokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """The process of an engine. `python` is the interpreter of the engine's environment, `backend`
    the file of `serve_app/engines/worker` for it. `module` is the import path of the engine's
    package, None for the real one, found on the worker's sys.path or in `path`, which goes before
    it. `env` is added to the worker's environment, and each variable of `ports` with a TCP port
    that is free now: engines that start on one node must not choose the same."""

    python: Path
    backend: str
    module: str | None = None
    path: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    ports: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """How long things may take, in seconds, and thereby how soon a fault is noticed.

    A process that dies is noticed at once. A worker whose loop hangs: within `ping_every_s` and
    `pong_s`. An engine that hangs: it gives no token for `quiet_s`, or is idle for
    `canary_every_s`, and then does not answer one request of one token within `canary_s`; within
    `canary_in_steps_s` where it says that it does steps all the while.
    """

    #: From the start of the process to its first message.
    hello_s: float = 120.0
    #: The whole of loading, and the longest time without any sign of it.
    load_s: float = 3600.0
    load_stall_s: float = 600.0
    warm_up_s: float = 300.0
    ping_every_s: float = 5.0
    pong_s: float = 10.0
    #: The engine's own health check, which may block.
    health_s: float = 10.0
    quiet_s: float = 10.0
    canary_every_s: float = 30.0
    canary_s: float = 20.0
    canary_in_steps_s: float = 120.0
    load_every_s: float = 1.0
    shutdown_s: float = 10.0
    #: From a kill to the last process that ends by it.
    kill_s: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """An engine before it runs: what it is, and the arguments of its constructor, both checked.

    `less_memory` are the arguments of the second try after it ran out of memory, None where there
    is none; `memory` are the numbers of the first and of the second, for sentences. Sizes are what
    the arguments bound them by: an engine tells its own when it is ready.
    """

    directory: Path
    engine: str
    recipe: str
    artifact_digest: str
    engine_digest: str | None
    kv_cache: str | None
    weight_bytes: int
    arguments: Mapping[str, Any]
    max_model_len: int
    vocab_size: int
    end_token_ids: frozenset[int]
    tokenizer: Tokenizer | None
    kv_tokens_total: int | None = None
    page_tokens: int = 1
    max_running: int = 256
    kv_bytes_per_token: float | None = None
    engine_version: str | None = None
    less_memory: Mapping[str, Any] | None = None
    memory: tuple[str, str] = ("", "")
