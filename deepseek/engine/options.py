"""Plain values of an engine: how it runs, what it serves, how busy it is.

This file imports no torch, because serve_app's ingress reads EngineLoad too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from deepseek.engine.arithmetic import EMBEDDED
from deepseek.engine.pages import check_page_tokens
from deepseek.errors import DeployError

#: Which code computes a step: the extension deepseek._native, or PyTorch.
KernelChoice = Literal["auto", "native", "torch"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How to run an engine.

    `kv_cache` and `page_tokens` None: as the engine was built. `max_model_len` bounds prompt and
    completion together (None: the model's limit). The cache holds `max_kv_tokens`, rounded up to KV
    pages (None: one request of that length or 1024 tokens for each of `max_batch_size`, whichever
    is more). `max_batched_tokens` is the budget of one step; longer prompts are cut into chunks.
    `num_threads` None takes torch's setting but leaves one core to other work on the machine (HTTP,
    Ray): a thread that loses its core stalls all others at the next OpenMP barrier, for
    milliseconds at a time.

    `prefix_cache` keeps the full KV pages of requests until their room is needed, and gives them to
    later requests of the same salt whose tokens begin alike (prefix.py).

    `kernels` "native" computes with the extension deepseek._native, "torch" with PyTorch alone, the
    slow reference; "auto" takes the extension where it is built (native.py). A target's arithmetic
    is emulated with PyTorch in any case.

    `huge_pages` copies the weights of the native kernels into huge pages (huge_pages.py), where
    they are read faster; without it they stay mapped from the engine's file, and replicas of one
    machine share them.

    `batch_invariant` makes greedy tokens independent of the batch, bit for bit; PyTorch's
    FP32 products of fewer than four rows become slower (linear.py), and the native ones are so
    without it. `poison_free_pages` is for tests.

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
    prefix_cache: bool = True
    kernels: KernelChoice = "auto"
    huge_pages: bool = True
    batch_invariant: bool = True
    poison_free_pages: bool = False

    def __post_init__(self) -> None:
        for name in ("max_kv_tokens", "max_model_len", "max_batch_size", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DeployError(f"{name} must be at least 1, not {value}")
        if self.kernels not in get_args(KernelChoice):
            raise DeployError(f"kernels must be auto, native or torch, not {self.kernels!r}")
        if self.max_batched_tokens < self.max_batch_size:
            raise DeployError(
                f"max_batched_tokens {self.max_batched_tokens} must not be below max_batch_size "
                f"{self.max_batch_size}: every running request takes one token of a step"
            )
        if self.page_tokens is not None:
            check_page_tokens(self.page_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineIdentity:
    """What an engine serves: recipe, digests, and KV format and page size in use.

    `engine_digest` is None for an engine that was packed in memory. `arithmetic` is the name of the
    one that it computes in (arithmetic.py): the embedded engine's own, or a target's. `kernels`
    says which code computes, for people.
    """

    recipe: str
    artifact_digest: str
    engine_digest: str | None
    kv_cache: str
    page_tokens: int
    arithmetic: str = EMBEDDED.name
    kernels: str = "torch"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """Numbers of sequences and of KV tokens (in whole KV pages) now. Used are those of running
    sequences, each page once; `kv_tokens_cached` are those that nobody uses and that could be found
    again, which count as free. Of the prompts that started since the engine did, the tokens found
    computed and the rest."""

    running: int
    waiting: int
    kv_tokens_used: int
    kv_tokens_total: int
    kv_tokens_cached: int = 0
    cached_prompt_tokens: int = 0
    computed_prompt_tokens: int = 0
