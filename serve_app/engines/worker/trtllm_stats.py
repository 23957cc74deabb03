"""TensorRT-LLM's iteration statistics, in every shape that has been seen.

An item is a dict or a JSON text, of one iteration; any field may be absent, null or of another
type. Items are handed out once, so several may have piled up, or there is none. What is not there
is None: the adapter then counts by itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from .messages import Load


def merge_stats(items: Iterable[Any], page_tokens: int | None) -> Load | None:
    """The newest value of each field; None without any item that holds one."""
    values: dict[str, Any] = {}
    kv: dict[str, Any] = {}
    batch: dict[str, Any] = {}
    for item in items:
        stats = _mapping(item)
        values |= {name: value for name, value in stats.items() if value is not None}
        kv |= _mapping(stats.get("kvCacheStats"))
        batch |= _mapping(stats.get("inflightBatchingStats"))
    scheduled = [_count(batch.get(name)) for name in ("numContextRequests", "numGenRequests")]
    running = _count(batch.get("numScheduledRequests"))
    if running is None and None not in scheduled:
        running = sum(count for count in scheduled if count is not None)
    if running is None:
        running = _count(values.get("numActiveRequests"))
    load = Load(
        running=running,
        waiting=_count(values.get("numQueuedRequests")),
        kv_blocks_used=_count(kv.get("usedNumBlocks")),
        kv_blocks_total=_count(kv.get("maxNumBlocks")) or None,
        page_tokens=_count(kv.get("tokensPerBlock")) or page_tokens,
        steps=_count(values.get("iter")),
    )
    known = (load.running, load.waiting, load.kv_blocks_used, load.kv_blocks_total, load.steps)
    return None if all(value is None for value in known) else load


def _mapping(item: Any) -> dict[str, Any]:
    if isinstance(item, (str, bytes)):
        try:
            item = json.loads(item)
        except ValueError:
            return {}
    return dict(item) if isinstance(item, Mapping) else {}


def _count(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return int(value) if 0 <= value < 1 << 62 else None
