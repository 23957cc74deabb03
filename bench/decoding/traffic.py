"""Bytes that a step must read from memory, and the time below which no step can be.

A step of a mixture of experts reads everything but the experts that nobody chose and the rows of
the embedding table that nobody needs. Of E experts, B tokens that choose k each at random reach
E (1 - (1 - k/E)^B) on average. Activations stay in the caches and are left out; so is what a cache
keeps of the weights from one step to the next, which is why a small model may pass this ceiling a
little on a processor with a large last-level cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """Bytes of a model as its engine holds it: of the routed experts, of everything else that each
    step reads, of one row of the embedding table, and of one token of context over all layers."""

    routed: int
    rest: int
    row: int
    token: int


def of_groups(groups: Mapping[str, int], *, table: int, row: int, token: int) -> Stored:
    """From `LLMEngine.allocated_bytes()`; `table` are the bytes of the embedding table."""
    weights = {name: size for name, size in groups.items() if name != "kv_cache"}
    routed = weights.pop("routed_experts", 0)
    return Stored(routed=routed, rest=sum(weights.values()) - table, row=row, token=token)


def step_bytes(
    stored: Stored, *, batch: int, context: int, num_experts: int, per_token: int
) -> float:
    """Bytes that a step of `batch` sequences with `context` tokens each reads."""
    reached = 1.0 - (1.0 - per_token / num_experts) ** batch
    shared = stored.rest + reached * stored.routed
    return shared + batch * (stored.row + context * stored.token)
