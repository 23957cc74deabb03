"""How many replicas a pool should have: a latency-target law, with the use of KV and places.

    load    = worst of  p90 TTFT / target, p90 ITL / target, longest wait / target   (at most 2)
    demand  = worst of  KV in use / its target, places taken / theirs, in replicas

Latency says that a pool is slow, demand says how much it has to carry. Both are averaged over a
window and compared with one pair of thresholds, between which nothing moves: a demand of all the
replicas is the load `scale_up_at`. Replicas that still load count as partial capacity. A latency is
multiplied by the part of the replicas that was loaded when it was so, demand is divided by all of
them, and of the excess over the threshold only a part counts until one window after the last has
come.

The pool grows by as much as the excess says, at most by `max_growth` within `up_period_s`. It
shrinks by one, and only where the rest would not be near the threshold again. What the engine shows
while little of it is in use is its own latency (`State.floor`), which no number of replicas lowers.

`LatencyPolicy.decide` is a pure function of its arguments: it has no clock, knows no Ray, and
returns the state that it wants to see at the next call. Decision 0020 says why.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from serve_app.autoscaling.measures import Averages, Terms, averages, terms, use
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

#: Seconds between two samples, or a twentieth of a short window; calls may be closer together.
_SAMPLE_S = 1.0
#: The most seconds that a call counts as idle time since the one before: whoever was stopped for
#: long, or whose clock was set, does not know what happened meanwhile.
_LONGEST_TICK_S = 15.0
#: Part of a window that samples must cover before the pool may shrink.
_COVERED = 0.8
#: Periods of a step down after which replicas that still load are no longer waited for.
_PATIENCE = 5.0
#: Seconds in which a floor that is too low by now has mostly risen to what is seen.
_FLOOR_S = 3600.0
#: How far above the floor a latency is still the engine's own: to start replicas, to give one up.
_OWN_UP, _OWN_DOWN = 2.0, 1.25


@dataclass(frozen=True, slots=True)
class _View:
    """What one decision looks at."""

    signals: Signals
    state: State
    now: Terms
    mean: Averages

    @property
    def own(self) -> float:
        """The load that the engine's own latency is; 0: not known."""
        return self.state.floor or 0.0


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
        now = terms(signals, self.settings)
        state = self._seen(signals, now, state.at(signals.now_s))
        decision = self._decide(signals, now, state)
        now_s, moved = signals.now_s, decision.desired - signals.provisioned
        if moved > 0:
            state = replace(state, last_up_s=now_s, moves=state.moves + 1)
        elif moved < 0:
            state = replace(state, last_down_s=now_s, moves=state.moves + 1)
        return decision, state

    def _decide(self, signals: Signals, now: Terms, state: State) -> Decision:
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
        view = _View(signals, state, now, averages(signals, state, self.settings.window_s))
        return self._grown(view) or self._shrunk(view)

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

    def _grown(self, view: _View) -> Decision | None:
        """The decision to grow, or None."""
        limits, signals, have = self.settings, view.signals, view.signals.provisioned
        trust = limits.warmup_trust if self._warming_up(signals, view.state) else 1.0
        slow = 0.0 if self._is_engines_own(view) else view.mean.carried
        slow = _trusted(slow, limits.scale_up_at, trust)
        full = _trusted(limits.scale_up_at * view.mean.demand / have, limits.scale_up_at, trust)
        worst, term = (full, view.now.full) if full >= slow else (slow, view.now.slow)
        if worst <= limits.scale_up_at or term is None:
            return None
        wanted = max(have + 1, math.ceil(have * worst / limits.scale_up_at - 1e-9))
        if term is view.now.slow and trust < 1.0 and view.now.full is not None:
            # How slow it is says little of how many it takes: no more than what is asked of the
            # pool makes likely.
            wanted = max(have, min(wanted, math.ceil(view.mean.demand / max(trust, 0.1))))
        desired = min(wanted, self._reachable(signals, view.state), limits.max_replicas)
        if desired <= have:
            held_by = self._held_by(have) if wanted > have else "those that load should suffice"
            reason = f"holds {have}: {term.says}, load {worst:.2f}, but {held_by}"
            return _decision(have, term.cause, reason, view, worst)
        reason = (
            f"goes from {have} to {desired}: {term.says}, load {worst:.2f} is above "
            f"{limits.scale_up_at:.2f}{_loading(signals)}"
        )
        if desired < wanted:
            reason += f"; {wanted} wanted, but {self._held_by(desired)}"
        return _decision(desired, term.cause, reason, view, worst)

    def _shrunk(self, view: _View) -> Decision:
        """The decision to give one replica up, or to stay."""
        limits, signals, have = self.settings, view.signals, view.signals.provisioned
        slow, demand = view.mean.latency, view.mean.demand
        if view.now.slow is not None:
            slow = max(slow, view.now.slow.size)
        if view.now.full is not None:
            demand = max(demand, view.now.full.size)
        if slow <= _OWN_DOWN * view.own and not signals.waiting:
            slow = 0.0
        # Only loaded replicas carry anything.
        full = limits.scale_up_at * demand / max(1, signals.ready)
        worst, term = (full, view.now.full) if full >= slow else (slow, view.now.slow)
        says = f"{term.says}, " if term else ""
        held = f"holds {have}: {says}load {worst:.2f}{_loading(signals)}"
        if worst >= limits.scale_down_at:
            return _decision(have, "calm", held, view, worst)
        if why_not := self._must_stay(view, slow, demand):
            return _decision(have, "calm", f"{held}; {why_not}", view, worst)
        reason = (
            f"goes from {have} to {have - 1}: {says}load {worst:.2f} is below "
            f"{limits.scale_down_at:.2f} for {limits.window_s:.0f} s"
        )
        return _decision(have - 1, "calm", reason, view, worst)

    def _must_stay(self, view: _View, slow: float, demand: float) -> str | None:
        """Why a pool with little load keeps all its replicas; None: it need not."""
        limits, signals, state = self.settings, view.signals, view.state
        have, now_s = signals.provisioned, signals.now_s
        if have <= max(1, limits.min_replicas):
            if limits.min_replicas == 0:
                return f"the last one stays until nobody asks for {limits.idle_s:.0f} s"
            return f"min_replicas is {limits.min_replicas}"
        # One fewer gives each of the rest more to carry, and what a latency is above the engine's
        # own grows at least by as much.
        fewer = have / (have - 1)
        left = max(limits.scale_up_at * demand / (have - 1), _grown_above(view.own, slow, fewer))
        if left > (limits.scale_up_at + limits.scale_down_at) / 2:
            return f"one fewer would have load {left:.2f}"
        if not self._covered(state, now_s):
            return f"it is not known for {limits.window_s:.0f} s yet"
        if signals.draining:
            return f"{signals.draining} still finish their streams"
        since_s = _since(now_s, state.last_up_s, state.last_down_s)
        if since_s < limits.down_period_s:
            return f"it moved {since_s:.0f} s ago and takes a step each {limits.down_period_s:.0f}"
        if signals.starting:
            patient = _since(now_s, state.last_up_s) < _PATIENCE * limits.down_period_s
            return "they are waited for" if patient else None
        if self._warming_up(signals, state):
            return "the last has only just loaded"
        return None

    def _seen(self, signals: Signals, now: Terms, state: State) -> State:
        """The state with what the signals say in it."""
        now_s = signals.now_s
        ticked = 0.0 if state.last_seen_s is None else now_s - state.last_seen_s
        ticked = min(ticked, _LONGEST_TICK_S)
        idle = signals.known and not signals.asked_for
        state = replace(
            state,
            last_seen_s=now_s,
            last_starting_s=now_s if signals.starting else state.last_starting_s,
            idle_s=state.idle_s + ticked if idle else 0.0,
            floor=self._floor(signals, now, state.floor, ticked),
        )
        kept = max(self.settings.window_s, self.settings.up_period_s)
        samples = tuple(s for s in state.samples if now_s - s.at_s <= kept)
        gap_s = min(_SAMPLE_S, self.settings.window_s / 20)
        if not samples or now_s - samples[-1].at_s >= gap_s or not _fits(samples[-1], signals):
            sample = Sample(
                at_s=now_s,
                ready=signals.ready,
                provisioned=signals.provisioned,
                latency=now.slow.size if now.slow else None,
                demand=now.full.size if now.full else None,
            )
            samples = (*samples, sample)
        return replace(state, samples=samples)

    def _floor(
        self, signals: Signals, now: Terms, floor: float | None, ticked_s: float
    ) -> float | None:
        """The least latency that was seen while little was in use; it rises slowly to what is seen
        then, since engines and prompts change."""
        if now.slow is None or not self._little_used(signals):
            return floor
        if floor is None or now.slow.size <= floor:
            return now.slow.size
        return floor + (now.slow.size - floor) * ticked_s / _FLOOR_S

    def _little_used(self, signals: Signals) -> bool:
        used = use(signals)
        low = used is not None and used < self.settings.own_latency_below
        return low and signals.running > 0 and not signals.waiting

    def _is_engines_own(self, view: _View) -> bool:
        """Whether the latency, where any is known, is what the engine has without any load."""
        slow = view.now.slow
        if slow is None:
            return True
        return self._little_used(view.signals) and slow.size <= _OWN_UP * view.own

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


def _decision(desired: int, cause: Cause, reason: str, view: _View, worst: float) -> Decision:
    demand = view.now.full.size if view.now.full else None
    return Decision(desired=desired, cause=cause, reason=reason, load=worst, demand=demand)


def _grown_above(own: float, load: float, factor: float) -> float:
    """`load` with what it has above `own` multiplied."""
    own = min(own, load)
    return own + (load - own) * factor


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
