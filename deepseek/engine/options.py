"""How an engine is to run, what it serves, and how busy it is: plain values, without torch, because
serve_app's ingress reads EngineLoad too."""

from __future__ import annotations

from dataclasses import dataclass

from deepseek.engine.pages import check_page_tokens
from deepseek.errors import DeployError


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How to run an engine; None takes what it was built with.

    `max_model_len` bounds prompt and completion together (None: the model's limit). The cache holds
    `max_kv_tokens`, rounded up to pages (None: enough for one request of that length, and 1024
    tokens for each of `max_batch_size`). `max_batched_tokens` is the budget of one step, over which
    long prompts are cut into chunks. `num_threads` None takes torch's setting, but leaves one core
    to whatever else runs here (HTTP, Ray): a thread that loses its core stalls all others at the
    next OpenMP barrier, for milliseconds at a time.

    `batch_invariant` makes greedy tokens independent of the batch, bit for bit; it costs FP32
    products of fewer than four rows some time (linear.py). `poison_free_pages` is for tests.

    Raises:
        DeployError: a value outside its range, named.
    """

    kv_cache: str | None = None
    page_tokens: int | None = None
    max_kv_tokens: int | None = None
    max_model_len: int | None = None
    max_batch_size: int = 16
    max_batched_tokens: int = 512
    num_threads: int | None = None
    batch_invariant: bool = True
    poison_free_pages: bool = False

    def __post_init__(self) -> None:
        for name in ("max_kv_tokens", "max_model_len", "max_batch_size", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DeployError(f"{name} must be at least 1, not {value}")
        if self.max_batched_tokens < self.max_batch_size:
            raise DeployError(
                f"max_batched_tokens {self.max_batched_tokens} must not be below max_batch_size "
                f"{self.max_batch_size}: every running request takes one token of a step"
            )
        if self.page_tokens is not None:
            check_page_tokens(self.page_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineIdentity:
    """What is served: recipe, digests and KV format as they run. `engine_digest` is None for an
    engine that was packed in memory."""

    recipe: str
    artifact_digest: str
    engine_digest: str | None
    kv_cache: str
    page_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """Sequences and KV tokens (in whole pages) now."""

    running: int
    waiting: int
    kv_tokens_used: int
    kv_tokens_total: int
