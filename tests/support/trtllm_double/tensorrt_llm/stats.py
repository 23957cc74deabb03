"""Iteration statistics and KV events: rings that a read drains.

Field names are those of the real one's JSON. Nothing is there before the first request, and
nothing at all without `enable_iter_perf_stats` (statistics), or without `event_buffer_max_size` and
block reuse (events).
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from deepseek.engine.options import EngineLoad
from tensorrt_llm import faults
from tensorrt_llm.version import IS_1_3


class Ring:
    """The newest items, from the step loop to whoever reads. `None` room keeps nothing."""

    def __init__(self, room: int | None) -> None:
        self._items: deque[dict[str, Any]] = deque(maxlen=0 if room is None else max(room, 1))
        self._changed = threading.Condition()

    def put(self, item: dict[str, Any]) -> None:
        with self._changed:
            self._items.append(item)
            self._changed.notify_all()

    def take(self, timeout: float) -> dict[str, Any] | None:
        """The oldest; None if none comes in `timeout` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._items, timeout)
            return self._items.popleft() if self._items else None


class IterationResult:
    """An async iterable over what a ring holds, oldest first, until it is idle."""

    def __init__(self, ring: Ring, timeout: float | None, shape: Callable[[Any], Any]) -> None:
        self._ring = ring
        self._timeout = 2.0 if timeout is None else timeout
        self._shape = shape

    def __aiter__(self) -> IterationResult:
        return self

    async def __anext__(self) -> Any:
        switches = faults.current()
        if switches.stats == "absent":
            raise RuntimeError("no iteration statistics in this build")
        item = self._ring.take(0.0)
        deadline = time.monotonic() + self._timeout
        while item is None and time.monotonic() < deadline:
            await asyncio.sleep(min(0.01, self._timeout))
            item = self._ring.take(0.0)
        if item is not None:
            return self._shape(item)
        match switches.stats_idle or ("timeout" if IS_1_3 else "queue_empty"):
            case "timeout":
                raise TimeoutError
            case "queue_empty":
                raise asyncio.QueueEmpty
        raise StopAsyncIteration

    def get_results(self) -> list[Any]:
        """All that there is, without an event loop."""
        found = []
        while (item := self._ring.take(0.0 if found else self._timeout)) is not None:
            found.append(self._shape(item))
        return found


def shape_stats(item: dict[str, Any]) -> Any:
    """The statistics of one iteration in the form and with the fields of the switches."""
    switches = faults.current()
    if switches.stats == "empty":
        item = {}
    elif switches.stats == "partial":
        item = {"iter": item["iter"], "numActiveRequests": item["numActiveRequests"]}
    form = switches.stats_form or ("dict" if IS_1_3 else "str")
    return json.dumps(item) if form == "str" else item


def iteration(
    number: int, load: EngineLoad, args: SimpleNamespace, *, blocks: int, latency_s: float
) -> dict[str, Any]:
    """The statistics of one iteration. `blocks` is the size of the cache in blocks."""
    block = args.kv_cache_config.tokens_per_block
    used = -(-load.kv_tokens_used // block)
    reused = load.cached_prompt_tokens // block
    missed = load.computed_prompt_tokens // block
    return {
        "iter": number,
        "iterLatencyMS": latency_s * 1e3,
        "timestamp": time.strftime("%m-%d-%Y %H:%M:%S"),
        "numActiveRequests": load.running + load.waiting,
        "numQueuedRequests": load.waiting,
        "maxNumActiveRequests": args.max_batch_size,
        "gpuMemUsage": 0,
        "kvCacheStats": {
            "maxNumBlocks": blocks,
            "freeNumBlocks": blocks - used,
            "usedNumBlocks": used,
            "tokensPerBlock": block,
            "reusedBlocks": reused,
            "missedBlocks": missed,
            "cacheHitRate": reused / max(reused + missed, 1),
        },
        "inflightBatchingStats": {
            "numScheduledRequests": load.running,
            "numContextRequests": 0,
            "numGenRequests": load.running,
            "numPausedRequests": 0,
            "numCtxTokens": 0,
            "microBatchId": 0,
            "avgNumDecodedTokensPerIter": 1.0,
        },
    }


def stored_event(number: int, prompt: list[int], block: int, salt: str) -> dict[str, Any]:
    """The KV event of a prompt whose whole blocks were stored."""
    blocks, parent = [], hash(salt)
    for start in range(0, len(prompt) - block + 1, block):
        tokens = prompt[start : start + block]
        parent = hash((parent, *tokens))
        blocks.append(
            {
                "type": "stored_block",
                "block_hash": parent,
                "tokens": [{"token_id": token, "token_extra_id": 0} for token in tokens],
                "cache_level": 0,
                "priority": 35,
            }
        )
    data = {"type": "stored", "parent_hash": None, "blocks": blocks}
    return {"event_id": number, "window_size": None, "data": data}
