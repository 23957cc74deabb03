"""What admission looks like at one moment: figures for metrics and for the autoscaler."""

from __future__ import annotations

from serve_app.routing.admission_stats import AdmissionStats, PoolStats
from serve_app.routing.recent import Recent
from serve_app.routing.roster import Roster
from serve_app.routing.visits import Visit


def snapshot(
    roster: Roster,
    recent: Recent,
    now: float,
    *,
    granted: int,
    drain_tokens_per_s: float | None,
) -> AdmissionStats:
    """All figures. A pool that is configured is there also while it has no replica."""
    visits = [v for ingress in roster.ingresses.values() for v in ingress.visits.values()]
    names = roster.places.pools | roster.queue.by_pool.keys()
    return AdmissionStats(
        queued=tuple(roster.queue.stats()),
        moving=len(roster.moving),
        replicas=tuple(roster.places.stats(now)),
        ingresses=len(roster.ingresses),
        oldest_wait_s=_oldest_wait_s([v for v in visits if v.waiting], now),
        drain_tokens_per_s=drain_tokens_per_s,
        granted=granted,
        refused=tuple(sorted(roster.refused.items())),
        pools=tuple(_of_pool(pool, visits, roster, recent, now) for pool in sorted(names)),
    )


def _oldest_wait_s(waiting: list[Visit], now: float) -> float:
    return max(0.0, now - min((visit.entered for visit in waiting), default=now))


def _of_pool(
    pool: str, visits: list[Visit], roster: Roster, recent: Recent, now: float
) -> PoolStats:
    replicas = [r for r in roster.places.replicas.values() if r.pool == pool]
    fresh = [replica for replica in replicas if replica.is_fresh(now)]
    queue = roster.queue.by_pool.get(pool)
    moving = [s for s in roster.moving.values() if s.visit.home == pool]
    kv_total = sum(replica.kv_total for replica in fresh)
    places = sum(replica.places for replica in fresh)
    free_kv = sum(max(0, replica.free_kv) for replica in fresh)
    free_places = sum(max(0, replica.free_places) for replica in fresh)
    return PoolStats(
        pool=pool,
        ready=len(fresh),
        waiting=len(moving) + (queue.sequences if queue is not None else 0),
        waiting_tokens=sum(s.tokens for s in moving) + (queue.tokens if queue is not None else 0),
        oldest_wait_s=_oldest_wait_s([v for v in visits if v.waiting and v.home == pool], now),
        running=sum(len(replica.held) + len(replica.ghosts) for replica in replicas),
        kv_share=1.0 - free_kv / kv_total if kv_total else 0.0,
        places_share=1.0 - free_places / places if places else 0.0,
        ttft_p90_s=recent.p90("ttft", pool, now),
        itl_p90_s=recent.p90("itl", pool, now),
        turned_away=recent.count("turned_away", pool, now),
    )
