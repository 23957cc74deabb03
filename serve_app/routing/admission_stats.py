"""What admission tells metrics and operators about itself: plain dataclasses that cross an actor
call."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedOfKey:
    """What one key has waiting in one band. `kv_tokens` are what its sequences ask for."""

    key: str
    priority: int
    requests: int
    sequences: int
    kv_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaUse:
    """What is taken of one replica. `ghosts` run there and nobody holds them. `breaker` is
    "closed", "open" or "half_open"; `reserved` says that a long sequence waits for it to drain."""

    replica_id: str
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
class AdmissionStats:
    """`drain_tokens_per_s` is None while nothing has waited yet. `granted` and `refused` (by code)
    count sequences since the owner started."""

    queued: tuple[QueuedOfKey, ...]
    moving: int
    replicas: tuple[ReplicaUse, ...]
    ingresses: int
    oldest_wait_s: float
    drain_tokens_per_s: float | None
    granted: int
    refused: tuple[tuple[str, int], ...]
