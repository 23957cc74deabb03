"""What /v1/models and /health say of the pools, by name, and of the replicas that load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from serve_app.config import ServeConfig
from serve_app.engines.protocol import EngineInfo, LoadingReplica, ReplicaStatus
from serve_app.routing.homes import Pools, limit_of


def describe_pools(
    config: ServeConfig, infos: Mapping[str, EngineInfo], statuses: Sequence[ReplicaStatus]
) -> dict[str, dict[str, Any]]:
    """What the longest request of each pool may have, and its KV: format, bytes of a token over all
    layers, and the tokens in use and in all of the replicas that are ready. What no engine has told
    yet is null."""
    return {name: _describe(name, config, infos.get(name), statuses) for name in config.pools}


def _describe(
    name: str, config: ServeConfig, info: EngineInfo | None, statuses: Sequence[ReplicaStatus]
) -> dict[str, Any]:
    limit = limit_of(config.pools[name], info)
    loads = [status.load for status in statuses if status.pool == name]
    return {
        "replicas": len(loads),
        "max_request_tokens": None if limit is None else limit.tokens,
        "kv_cache": None if info is None else info.kv_cache,
        "kv_bytes_per_token": None if info is None else info.kv_bytes_per_token,
        "kv_tokens_used": sum(load.kv_tokens_used for load in loads),
        "kv_tokens_total": sum(load.kv_tokens_total for load in loads),
    }


def model_card(
    config: ServeConfig,
    pools: Pools,
    infos: Mapping[str, EngineInfo],
    statuses: Sequence[ReplicaStatus],
    *,
    created: int,
) -> dict[str, Any]:
    """The model in OpenAI's form, with vLLM's `max_model_len`, which is the largest that is known,
    and our `pools`."""
    known = [limit.tokens for limit in pools.limits.values() if limit is not None]
    return {
        "id": config.served_name,
        "object": "model",
        "created": created,
        "owned_by": "intserve",
        "root": config.served_name,
        "parent": None,
        "max_model_len": max(known, default=None),
        "pools": describe_pools(config, infos, statuses),
    }


def describe_loading(report: LoadingReplica) -> dict[str, Any]:
    """A replica that does not serve yet; bytes and seconds left where they are known."""
    progress = report.progress
    known = progress.total_bytes > 0
    return {
        "replica": report.replica_id,
        "pool": report.pool,
        "node": report.node,
        "phase": progress.phase,
        "done_bytes": progress.done_bytes if known else None,
        "total_bytes": progress.total_bytes if known else None,
        "elapsed_s": round(report.elapsed_s, 1),
        "eta_s": None if report.eta_s is None else round(report.eta_s, 1),
    }


def describe_engines(
    config: ServeConfig, infos: Mapping[str, EngineInfo], statuses: Sequence[ReplicaStatus]
) -> dict[str, dict[str, Any]]:
    """`describe_pools` with what the replicas of each pool serve, for operators."""
    told = describe_pools(config, infos, statuses)
    for name, info in infos.items():
        if name in told:
            ready = [status for status in statuses if status.pool == name]
            told[name] |= {
                "engine": info.engine,
                "recipe": info.recipe,
                "artifact_digest": info.artifact_digest,
                "engine_digest": info.engine_digest,
                "gated": all(status.gated for status in ready) if ready else None,
                "emulated": any(status.emulated for status in ready) if ready else None,
                "max_model_len": info.max_model_len,
                "spill_over": list(config.pools[name].spill_over),
            }
    return told
