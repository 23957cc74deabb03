"""What the autoscaling policy is told, what it decides, and what it remembers in between.

`Signals` may hold anything: they come from other processes, at times when those start or end.
`clean` makes of them what can be reckoned with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

#: What moved the pool, or kept it: the label of a metric.
Cause = Literal[
    "ttft", "itl", "wait", "kv", "places", "from_zero", "idle", "bounds", "calm", "blind"
]
#: Of `State.to_json`; a state of another version is forgotten.
STATE_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Signals:
    """What a pool's replicas do now. Latencies are nine-in-ten values of the last window; None is
    unknown. `known` False: nobody can say, and only the counts of replicas hold."""

    now_s: float
    ready: int
    starting: int = 0
    draining: int = 0
    known: bool = True
    waiting: int = 0
    waiting_tokens: int = 0
    oldest_wait_s: float | None = None
    running: int = 0
    kv_share: float | None = None
    ttft_p90_s: float | None = None
    itl_p90_s: float | None = None
    #: Sequences that one replica holds at a time.
    places: int | None = None
    #: Requests refused in the last window because there was no replica.
    turned_away: int = 0

    @property
    def provisioned(self) -> int:
        """Replicas that are there or on their way."""
        return self.ready + self.starting

    @property
    def asked_for(self) -> bool:
        """Whether anybody wants anything of the pool."""
        return bool(self.waiting or self.running or self.turned_away)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """`desired` replicas, and why. `load` is the averaged load that was compared with the
    thresholds, `demand` the replicas that the use of KV and places asks for; None is unknown."""

    desired: int
    cause: Cause
    reason: str
    load: float | None = None
    demand: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The load at a moment: of latencies (`latency`) and of use (`demand`, in replicas)."""

    at_s: float
    ready: int
    provisioned: int
    latency: float | None
    demand: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What the policy remembers. Times are of the clock of `Signals.now_s`."""

    samples: tuple[Sample, ...] = ()
    last_seen_s: float | None = None
    last_up_s: float | None = None
    last_down_s: float | None = None
    last_starting_s: float | None = None
    idle_s: float = 0.0
    #: The load that the engine's own latency is; None: it was never seen with little in use.
    floor: float | None = None
    moves: int = 0

    def to_json(self) -> dict[str, Any]:
        """A new mapping of plain values, which `from_json` reads."""
        samples = [[s.at_s, s.ready, s.provisioned, s.latency, s.demand] for s in self.samples]
        return {
            "version": STATE_VERSION,
            "samples": samples,
            "last_seen_s": self.last_seen_s,
            "last_up_s": self.last_up_s,
            "last_down_s": self.last_down_s,
            "last_starting_s": self.last_starting_s,
            "idle_s": self.idle_s,
            "floor": self.floor,
            "moves": self.moves,
        }

    @classmethod
    def from_json(cls, given: object) -> State:
        """The state that `to_json` wrote; a new one for anything else, such as one of another
        version: a policy that has forgotten waits a window longer, and does nothing worse."""
        if not isinstance(given, Mapping) or given.get("version") != STATE_VERSION:
            return cls()
        try:
            samples = tuple(_sample(row) for row in given["samples"])
            return cls(
                samples=samples,
                last_seen_s=_moment(given["last_seen_s"]),
                last_up_s=_moment(given["last_up_s"]),
                last_down_s=_moment(given["last_down_s"]),
                last_starting_s=_moment(given["last_starting_s"]),
                idle_s=max(0.0, _number(given["idle_s"])),
                floor=_moment(given["floor"]),
                moves=int(_number(given["moves"])),
            )
        except (KeyError, TypeError, ValueError):
            return cls()

    def at(self, now_s: float) -> State:
        """This state at `now_s`. Of a clock that was set back everything seems to have happened
        just now, and the samples count no more."""
        if self.last_seen_s is None or now_s >= self.last_seen_s:
            return self
        return replace(
            self,
            samples=(),
            last_seen_s=now_s,
            last_up_s=_not_after(self.last_up_s, now_s),
            last_down_s=_not_after(self.last_down_s, now_s),
            last_starting_s=_not_after(self.last_starting_s, now_s),
        )


def clean(signals: Signals) -> Signals:
    """The signals with counts that are none as 0, and numbers that are none as unknown."""
    places = _count(signals.places)
    return replace(
        signals,
        now_s=float(signals.now_s) if is_moment(signals.now_s) else 0.0,
        ready=_count(signals.ready),
        starting=_count(signals.starting),
        draining=_count(signals.draining),
        waiting=_count(signals.waiting),
        waiting_tokens=_count(signals.waiting_tokens),
        oldest_wait_s=_measure(signals.oldest_wait_s),
        running=_count(signals.running),
        kv_share=_measure(signals.kv_share),
        ttft_p90_s=_measure(signals.ttft_p90_s),
        itl_p90_s=_measure(signals.itl_p90_s),
        places=places or None,
        turned_away=_count(signals.turned_away),
    )


def is_moment(value: object) -> bool:
    """Whether a clock may have said this."""
    if not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


#: At most so many, or so much: floats count sums and products of such numbers exactly.
_MOST = 2**32


def _count(value: Any) -> int:
    return int(min(value, _MOST)) if _is_positive(value) else 0


def _measure(value: Any) -> float | None:
    return float(min(value, _MOST)) if is_moment(value) and value >= 0 else None


def _is_positive(value: Any) -> bool:
    return is_moment(value) and value > 0


def _sample(row: Any) -> Sample:
    at_s, ready, provisioned, latency, demand = row
    return Sample(
        at_s=_number(at_s),
        ready=int(_number(ready)),
        provisioned=int(_number(provisioned)),
        latency=_moment(latency),
        demand=_moment(demand),
    )


def _number(value: Any) -> float:
    if not is_moment(value):
        raise ValueError("no number")
    return float(value)


def _moment(value: object) -> float | None:
    return None if value is None else _number(value)


def _not_after(moment_s: float | None, now_s: float) -> float | None:
    return None if moment_s is None else min(moment_s, now_s)
