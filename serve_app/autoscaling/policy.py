"""How many replicas a pool should have: a latency-target law, with the use of KV and places.

    load  = worst of  p90 TTFT / target, p90 ITL / target, longest wait / target   (at most 2)
    use   = worst of  KV in use / its target, places taken / theirs, in replicas: the demand

Latency says that a pool is slow, use says how much it has to carry. Both are averaged over a window
and compared with one pair of thresholds, between which nothing moves: a use just at its target is
the load `scale_up_at`. Replicas that still load count as partial capacity. The latency that the
loaded ones show is multiplied by their share of all; use is divided by all; and of the excess of
either over the threshold only a part counts until one window after the last has come.

The pool grows by as much as the excess says, at most by `max_growth` within `up_period_s`. It
shrinks by one, and only where the rest would not be near the threshold again.

`LatencyPolicy.decide` is a pure function of its arguments: it has no clock, knows no Ray, and
returns the state that it wants to see at the next call. Decision 0020 says why.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from serve_app.autoscaling.signals import (
    Cause,
    Decision,
    Sample,
    Signals,
    State,
    clean,
    is_moment,
)
from serve_app.autoscaling_settings import AutoscalingSection

#: A latency beyond twice its target says no more than twice.
_WORST_LATENCY = 2.0
#: Seconds between two samples, or a twentieth of a short window; calls may be closer together.
_SAMPLE_S = 1.0
#: The most seconds that a call counts as idle time since the one before: whoever was stopped for
#: long, or whose clock was set, does not know what happened meanwhile.
_LONGEST_TICK_S = 15.0
#: Part of a window that samples must cover before the pool may shrink.
_COVERED = 0.8


@dataclass(frozen=True, slots=True)
class _Term:
    """One thing that may be too much: its value and target, for the sentence."""

    cause: Cause
    load: float
    says: str


@dataclass(frozen=True, slots=True)
class _Load:
    """Averages over the window, and the terms of now. `slow` are latencies, `full` are uses."""

    latency: float
    #: The latency times the replicas that were ready when it was so.
    carried: float
    demand: float
    demand_now: float
    slow: _Term | None
    full: _Term | None


class LatencyPolicy:
    """The policy of one pool."""

    def __init__(self, settings: AutoscalingSection) -> None:
        self.settings = settings

    def decide(self, signals: Signals, state: State) -> tuple[Decision, State]:
        """How many replicas there should be, and the state for the next call.

        Signals may hold what no clock and no counter says (NaN, None, negative): it counts as
        unknown, and nothing shrinks for want of knowledge.
        """
        if not is_moment(signals.now_s):
            held = self._bounded(clean(signals).provisioned)
            return Decision(desired=held, cause="blind", reason="holds: there is no time"), state
        signals = clean(signals)
        state = self._seen(signals, state.at(signals.now_s))
        decision = self._decide(signals, state)
        now_s, moved = signals.now_s, decision.desired - signals.provisioned
        if moved > 0:
            state = replace(state, last_up_s=now_s, moves=state.moves + 1)
        elif moved < 0:
            state = replace(state, last_down_s=now_s, moves=state.moves + 1)
        return decision, state

    def _decide(self, signals: Signals, state: State) -> Decision:
        have = signals.provisioned
        if have != self._bounded(have):
            few = have < self.settings.min_replicas
            bound = "min_replicas" if few else "max_replicas"
            desired = self._bounded(have)
            reason = f"goes from {have} to {desired}: {bound} is {desired}"
            return Decision(desired=desired, cause="bounds", reason=reason)
        if not signals.known:
            reason = f"holds {have}: nobody says what the pool does"
            return Decision(desired=have, cause="blind", reason=reason)
        if have == 0:
            return self._from_zero(signals)
        if have == 1 and self._may_end(signals, state):
            reason = f"goes from 1 to 0: no request for {state.idle_s:.0f} s"
            return Decision(desired=0, cause="idle", reason=reason, load=0.0, demand=0.0)
        load = self._load(signals, state)
        return self._grown(signals, state, load) or self._shrunk(signals, state, load)

    def _from_zero(self, signals: Signals) -> Decision:
        if not signals.asked_for:
            return Decision(desired=0, cause="idle", reason="holds 0: nobody asks")
        who = f"{signals.waiting} requests wait" if signals.waiting else "requests were refused"
        return Decision(desired=1, cause="from_zero", reason=f"goes from 0 to 1: {who}")

    def _may_end(self, signals: Signals, state: State) -> bool:
        return (
            self.settings.min_replicas == 0
            and not signals.draining
            and state.idle_s >= self.settings.idle_s
        )

    def _grown(self, signals: Signals, state: State, load: _Load) -> Decision | None:
        """The decision to grow, or None."""
        limits, have = self.settings, signals.provisioned
        trust = limits.warmup_trust if self._warming_up(signals, state) else 1.0
        # What the loaded replicas suffer, as if those on their way carried their part already.
        slow = _trusted(load.carried / have, limits.scale_up_at, trust)
        full = _trusted(limits.scale_up_at * load.demand / have, limits.scale_up_at, trust)
        worst, term = (full, load.full) if full >= slow else (slow, load.slow)
        if worst <= limits.scale_up_at or term is None:
            return None
        wanted = max(have + 1, math.ceil(have * worst / limits.scale_up_at - 1e-9))
        if term is load.slow and trust < 1.0 and load.full is not None:
            # How slow it is says little of how many it takes: no more than what is asked of the
            # pool makes likely.
            wanted = max(have, min(wanted, math.ceil(load.demand / max(trust, 0.1))))
        desired = min(wanted, self._reachable(signals, state), limits.max_replicas)
        if desired <= have:
            held_by = self._held_by(have) if wanted > have else "those that load should suffice"
            reason = f"holds {have}: {term.says}, load {worst:.2f}, but {held_by}"
            return _decision(have, term.cause, reason, load, worst)
        reason = (
            f"goes from {have} to {desired}: {term.says}, load {worst:.2f} is above "
            f"{limits.scale_up_at:.2f}{_loading(signals)}"
        )
        if desired < wanted:
            reason += f"; {wanted} wanted, but {self._held_by(desired)}"
        return _decision(desired, term.cause, reason, load, worst)

    def _shrunk(self, signals: Signals, state: State, load: _Load) -> Decision:
        """The decision to give one replica up, or to stay."""
        limits, have, now_s = self.settings, signals.provisioned, signals.now_s
        # Only loaded replicas carry anything: where those alone have too little to do, one that
        # still loads is not needed either.
        demand = max(load.demand, load.demand_now)
        worst = max(load.latency, limits.scale_up_at * demand / max(1, signals.ready))
        if load.slow:
            worst = max(worst, load.slow.load)
        term = max((t for t in (load.slow, load.full) if t), key=lambda t: t.load, default=None)
        says = f"{term.says}, " if term else ""
        stays = f"holds {have}: {says}load {worst:.2f}{_loading(signals)}"
        if worst >= limits.scale_down_at:
            return _decision(have, "calm", stays, load, worst)
        left = limits.scale_up_at * demand / max(1, have - 1)
        middle = (limits.scale_up_at + limits.scale_down_at) / 2
        if have <= max(1, limits.min_replicas):
            why_not = f"min_replicas is {limits.min_replicas}"
            if limits.min_replicas == 0:
                why_not = f"the last one stays until nobody asks for {limits.idle_s:.0f} s"
        elif left > middle:
            why_not = f"one fewer would have load {left:.2f}"
        elif not self._covered(state, now_s):
            why_not = f"it is not known for {limits.window_s:.0f} s yet"
        elif signals.draining:
            why_not = f"{signals.draining} still finish their streams"
        elif (since := _since(now_s, state.last_up_s, state.last_down_s)) < limits.down_period_s:
            why_not = f"it moved {since:.0f} s ago and takes a step each {limits.down_period_s:.0f}"
        else:
            reason = (
                f"goes from {have} to {have - 1}: {says}load {worst:.2f} is below "
                f"{limits.scale_down_at:.2f} for {limits.window_s:.0f} s"
            )
            return _decision(have - 1, "calm", reason, load, worst)
        return _decision(have, "calm", f"{stays}; {why_not}", load, worst)

    def _seen(self, signals: Signals, state: State) -> State:
        """The state with what the signals say in it."""
        now_s = signals.now_s
        ticked = 0.0 if state.last_seen_s is None else now_s - state.last_seen_s
        idle = signals.known and not signals.asked_for
        idle_s = state.idle_s + min(ticked, _LONGEST_TICK_S) if idle else 0.0
        starting_s = now_s if signals.starting else state.last_starting_s
        state = replace(state, last_seen_s=now_s, last_starting_s=starting_s, idle_s=idle_s)
        kept = max(self.settings.window_s, self.settings.up_period_s)
        samples = tuple(s for s in state.samples if now_s - s.at_s <= kept)
        gap_s = min(_SAMPLE_S, self.settings.window_s / 20)
        if not samples or now_s - samples[-1].at_s >= gap_s or not _fits(samples[-1], signals):
            slow, full = self._terms(signals) if signals.known else (None, None)
            sample = Sample(
                at_s=now_s,
                ready=signals.ready,
                provisioned=signals.provisioned,
                latency=slow.load if slow else None,
                demand=full.load if full else None,
            )
            samples = (*samples, sample)
        return replace(state, samples=samples)

    def _terms(self, signals: Signals) -> tuple[_Term | None, _Term | None]:
        """The worst latency, by its load; and the fullest of KV and places, by its demand in
        replicas."""
        limits = self.settings
        slow: list[_Term] = []
        full: list[_Term] = []
        use = self._use(signals)
        own = use is not None and use < limits.own_latency_below and not signals.waiting
        waited_s = signals.oldest_wait_s if signals.waiting else None
        wait_target_s = limits.target_wait_s or limits.target_ttft_s
        timed: tuple[tuple[Cause, str, float | None, float | None], ...] = (
            ("ttft", "TTFT p90", signals.ttft_p90_s, limits.target_ttft_s),
            ("itl", "ITL p90", signals.itl_p90_s, limits.target_itl_s),
            ("wait", "longest wait", waited_s, wait_target_s),
        )
        for cause, name, value, target in timed:
            if value is None or target is None or own:
                continue
            says = f"{name} {value:.3g} s of {target:.3g} s"
            slow.append(_Term(cause, min(value / target, _WORST_LATENCY), says))
        if signals.kv_share is not None and limits.target_kv_share is not None and signals.ready:
            # Who waits will need what those that run have on average.
            more = 1 + signals.waiting / signals.running if signals.running else 1.0
            demand = signals.kv_share * signals.ready * more / limits.target_kv_share
            says = f"KV {signals.kv_share:.0%} of {limits.target_kv_share:.0%}"
            full.append(_Term("kv", demand, says))
        if signals.places is not None and limits.target_places_share is not None:
            asked = signals.running + signals.waiting
            demand = asked / signals.places / limits.target_places_share
            says = f"{signals.running} running and {signals.waiting} waiting"
            full.append(_Term("places", demand, says))
        if not signals.asked_for:
            full.append(_Term("places", 0.0, "nobody asks"))
        return (
            max(slow, key=lambda term: term.load, default=None),
            max(full, key=lambda term: term.load, default=None),
        )

    def _use(self, signals: Signals) -> float | None:
        """The share of KV or places in use, whichever is more; None: neither is known."""
        uses = [signals.kv_share] if signals.kv_share is not None else []
        if signals.places is not None and signals.ready:
            uses.append(signals.running / (signals.places * signals.ready))
        return max(uses, default=None)

    def _load(self, signals: Signals, state: State) -> _Load:
        slow, full = self._terms(signals)
        samples = [s for s in state.samples if signals.now_s - s.at_s <= self.settings.window_s]
        latencies = [s.latency for s in samples if s.latency is not None]
        carried = [s.latency * s.ready for s in samples if s.latency is not None]
        demands = [s.demand for s in samples if s.demand is not None]
        return _Load(
            latency=_mean(latencies),
            carried=_mean(carried),
            demand=_mean(demands),
            demand_now=full.load if full else 0.0,
            slow=slow if latencies else None,
            full=full if demands else None,
        )

    def _reachable(self, signals: Signals, state: State) -> int:
        """The most replicas that `max_growth` allows now, counted from the fewest there were."""
        since = signals.now_s - self.settings.up_period_s
        recent = [s.provisioned for s in state.samples if s.at_s > since]
        up_s = state.last_up_s
        if up_s is not None and up_s > since and not any(s.at_s < up_s for s in state.samples):
            return signals.provisioned  # how many there were before is forgotten
        fewest = min([signals.provisioned, *recent])
        return fewest + max(1, math.floor(fewest * self.settings.max_growth + 1e-9))

    def _held_by(self, desired: int) -> str:
        limits = self.settings
        if desired >= limits.max_replicas:
            return f"max_replicas is {limits.max_replicas}"
        return f"it grows by at most {limits.max_growth:.0%} in {limits.up_period_s:.0f} s"

    def _warming_up(self, signals: Signals, state: State) -> bool:
        started_s = state.last_starting_s
        if signals.starting:
            return True
        return started_s is not None and signals.now_s - started_s < self.settings.window_s

    def _covered(self, state: State, now_s: float) -> bool:
        """Whether samples that say something reach back for a window."""
        window = [s for s in state.samples if now_s - s.at_s <= self.settings.window_s]
        silent = any(s.latency is None and s.demand is None for s in window)
        return not silent and now_s - window[0].at_s >= _COVERED * self.settings.window_s

    def _bounded(self, replicas: int) -> int:
        return max(self.settings.min_replicas, min(self.settings.max_replicas, replicas))


def _decision(desired: int, cause: Cause, reason: str, load: _Load, worst: float) -> Decision:
    return Decision(desired=desired, cause=cause, reason=reason, load=worst, demand=load.demand_now)


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _trusted(load: float, threshold: float, trust: float) -> float:
    """`load` with only a part of what is above the threshold."""
    return threshold + trust * (load - threshold) if load > threshold else load


def _loading(signals: Signals) -> str:
    return f", {signals.starting} still loading" if signals.starting else ""


def _since(now_s: float, *moments: float | None) -> float:
    return min((now_s - moment for moment in moments if moment is not None), default=math.inf)


def _fits(sample: Sample, signals: Signals) -> bool:
    """Whether the sample is of as many replicas."""
    return sample.provisioned == signals.provisioned
