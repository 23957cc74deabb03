"""How busy a remote engine is: our own count of its requests, sharpened by what it says of itself.

An engine's figures come late, in parts, or not at all, so each is used only while it is fresh and
where it is there. Ours are always there: a request that has a token runs, and what its tokens fill
of the KV cache is an upper bound, because prefixes that requests share are counted for each.
"""

from __future__ import annotations

from collections.abc import Collection

from deepseek.engine.options import EngineLoad
from serve_app.engines.remote.launch import Plan
from serve_app.engines.remote.text import Answer
from serve_app.engines.worker.messages import Load, Ready

#: Seconds for which the engine's figures count, and that they may be older than they seem.
_FRESH_S, _LAG_S = 5.0, 1.5


class Counts:
    """The figures of one engine. `unnamed` counts requests that it ended without a reason."""

    def __init__(self) -> None:
        self.unnamed = 0
        self.max_running = 1
        self.page_tokens = 1
        self._total: int | None = None
        self._told = Load()
        self._told_s = float("-inf")
        self._cached_prompt_tokens = 0
        self._computed_prompt_tokens = 0

    def ready(self, plan: Plan, ready: Ready) -> None:
        """Take what is known before the first request."""
        self.max_running = ready.max_running or plan.max_running
        self.page_tokens = ready.page_tokens or plan.page_tokens
        self._total = ready.kv_tokens_total or plan.kv_tokens_total

    def told(self, load: Load, now_s: float) -> bool:
        """Take the engine's own figures; whether it has done a step since the last ones."""
        before, self._told, self._told_s = self._told, load, now_s
        if load.page_tokens:
            self.page_tokens = load.page_tokens
        if load.kv_blocks_total:
            self._total = load.kv_blocks_total * self.page_tokens
        return load.steps is not None and load.steps != before.steps

    def started(self, answer: Answer) -> None:
        """A request has its first token: its prompt was computed, or found."""
        cached = answer.cached_tokens
        self._cached_prompt_tokens += cached
        self._computed_prompt_tokens += answer.prompt_tokens - cached

    def assume(self, kv_tokens_total: int) -> None:
        """Nobody says how large the KV cache is."""
        self._total = self._total or kv_tokens_total

    @property
    def kv_tokens_total(self) -> int | None:
        """Size of the KV cache, None while nobody has said it."""
        return self._total

    def load(self, answers: Collection[Answer], now_s: float) -> EngineLoad:
        """Of the requests that the engine has now."""
        told = self._told if now_s - self._told_s <= _FRESH_S else Load()
        pages = {answer: -(-answer.num_tokens // self.page_tokens) for answer in answers}
        begun = {a: a.began_s for a in answers if a.began_s is not None}
        waiting = max(0, len(answers) - self.max_running) if told.waiting is None else told.waiting
        waiting = min(waiting, len(answers) - len(begun))
        used = sum([pages[answer] for answer in begun])
        if told.kv_blocks_used is not None:
            newer = sum(
                [pages[a] for a, began_s in begun.items() if began_s > self._told_s - _LAG_S]
            )
            used = min(used, told.kv_blocks_used + newer)
        used *= self.page_tokens
        total = self._total or 0
        return EngineLoad(
            running=len(answers) - waiting,
            waiting=waiting,
            kv_tokens_used=min(used, total) if total else used,
            kv_tokens_total=total,
            cached_prompt_tokens=self._cached_prompt_tokens,
            computed_prompt_tokens=self._computed_prompt_tokens,
        )
