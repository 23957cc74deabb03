"""What a pool's signals say against their targets: how slow it is, and how much it carries.

A latency becomes a load, its part of the target. The use of KV and of places becomes a demand: the
replicas that it would take to carry it at the target. The policy compares both with thresholds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from serve_app.autoscaling.signals import Cause, Signals, State
from serve_app.autoscaling_settings import AutoscalingSection

#: A latency beyond twice its target says no more than twice.
_WORST_LATENCY = 2.0


@dataclass(frozen=True, slots=True)
class Term:
    """One measure against its target, and how to say it. `size` is a load or a demand."""

    cause: Cause
    size: float
    says: str


@dataclass(frozen=True, slots=True)
class Terms:
    """The worst of each kind now; None: none is known. `slow` is a load, `full` a demand in
    replicas."""

    slow: Term | None
    full: Term | None


@dataclass(frozen=True, slots=True)
class Averages:
    """Of the samples of a window; 0 where there is none. `carried` is the latency as it would have
    been, had those that load now carried their part already."""

    latency: float
    carried: float
    demand: float


def terms(signals: Signals, limits: AutoscalingSection) -> Terms:
    """What the signals say, which must be clean."""
    if not signals.known:
        return Terms(None, None)
    return Terms(
        max(_slow(signals, limits), key=lambda term: term.size, default=None),
        max(_full(signals, limits), key=lambda term: term.size, default=None),
    )


def averages(signals: Signals, state: State, window_s: float) -> Averages:
    """Over the samples of the last `window_s` seconds."""
    samples = [s for s in state.samples if signals.now_s - s.at_s <= window_s]
    have = max(1, signals.provisioned)
    slow = [(s.latency, s.ready) for s in samples if s.latency is not None]
    return Averages(
        latency=_mean([latency for latency, _ in slow]),
        carried=_mean([latency * min(1.0, ready / have) for latency, ready in slow]),
        demand=_mean([s.demand for s in samples if s.demand is not None]),
    )


def use(signals: Signals) -> float | None:
    """The share of KV or places in use, whichever is more; None: neither is known."""
    uses = [signals.kv_share] if signals.kv_share is not None else []
    if signals.places is not None and signals.ready:
        uses.append(signals.running / (signals.places * signals.ready))
    return max(uses, default=None)


def _slow(signals: Signals, limits: AutoscalingSection) -> list[Term]:
    waited_s = signals.oldest_wait_s if signals.waiting else None
    wait_target_s = limits.target_wait_s or limits.target_ttft_s
    timed: tuple[tuple[Cause, str, float | None, float | None], ...] = (
        ("ttft", "TTFT p90", signals.ttft_p90_s, limits.target_ttft_s),
        ("itl", "ITL p90", signals.itl_p90_s, limits.target_itl_s),
        ("wait", "longest wait", waited_s, wait_target_s),
    )
    return [
        Term(cause, min(value / target, _WORST_LATENCY), f"{name} {value:.3g} s of {target:.3g} s")
        for cause, name, value, target in timed
        if value is not None and target is not None
    ]


def _full(signals: Signals, limits: AutoscalingSection) -> list[Term]:
    found: list[Term] = []
    if signals.kv_share is not None and limits.target_kv_share is not None and signals.ready:
        # Who waits will need what those that run have on average.
        more = 1.0 + signals.waiting / signals.running if signals.running else 1.0
        demand = signals.kv_share * signals.ready * more / limits.target_kv_share
        says = f"KV {signals.kv_share:.0%} of {limits.target_kv_share:.0%}"
        found.append(Term("kv", demand, says))
    if signals.places is not None and limits.target_places_share is not None:
        asked = signals.running + signals.waiting
        demand = asked / signals.places / limits.target_places_share
        says = f"{signals.running} running and {signals.waiting} waiting"
        found.append(Term("places", demand, says))
    if not signals.asked_for:
        found.append(Term("places", 0.0, "nobody asks"))
    return found


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
