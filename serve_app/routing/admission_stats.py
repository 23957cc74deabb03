"""What admission tells metrics and operators about itself: plain dataclasses that cross an actor
call."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedOfKey:
    """What one key has waiting in one band of a pool's queue. `kv_tokens` are what its sequences
    ask for."""

    key: str
    priority: int
    pool: str
    requests: int
    sequences: int
    kv_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaUse:
    """What is taken of one replica. `ghosts` run there and nobody holds them. `breaker` is
    "closed", "open" or "half_open"; `reserved` says that a long sequence waits for it to drain."""

    replica_id: str
    pool: str
    fresh: bool
    held: int
    ghosts: int
    places: int
    kv_tokens_held: int
    kv_tokens_ghosts: int
    kv_tokens_total: int
    breaker: str
    reserved: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStats:
    """One pool. `ready` are the replicas that may get sequences. `waiting` sequences have it for
    their home and no place, and ask for `waiting_tokens` of KV; `turned_away` were refused lately
    because no replica was there. `running` have a place in it; `kv_share` of its KV and
    `places_share` of its places are taken, 0 where it has no replica. The latencies are what nine
    of ten requests of the last `recent.WINDOW_S` seconds had at most, None where there were
    none: time to the first token of those whose home it is, between tokens of those that ran."""

    pool: str
    ready: int
    waiting: int
    waiting_tokens: int
    oldest_wait_s: float
    running: int
    kv_share: float
    places_share: float
    ttft_p90_s: float | None
    itl_p90_s: float | None
    turned_away: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionStats:
    """`drain_tokens_per_s`, of all pools, is None while nothing has waited yet. `granted` and
    `refused` (by code) count sequences since the owner started."""

    queued: tuple[QueuedOfKey, ...]
    moving: int
    replicas: tuple[ReplicaUse, ...]
    ingresses: int
    oldest_wait_s: float
    drain_tokens_per_s: float | None
    granted: int
    refused: tuple[tuple[str, int], ...]
    pools: tuple[PoolStats, ...] = ()
