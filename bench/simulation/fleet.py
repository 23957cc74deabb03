"""The fleet: requests that come, wait and are placed, and replicas that load, serve and drain.

Events are in one heap by time and order of their making, so that a run is the same each time. The
queue is the one of admission in short: first come, first placed, at the emptiest replica with room;
beyond its length, and after its longest wait, a request is refused. While no replica is there at
all, the queue holds.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from serve_app.autoscaling.signals import Signals

from .engine import NEVER, EngineModel, Replica, Request
from .policies import Scaler

_ARRIVAL, _REPLICA, _READY, _TICK = range(4)


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetModel:
    """What is around the engines. `load_s` is the time from the decision to a loaded replica; each
    replica's is up to a tenth longer or shorter."""

    engine: EngineModel = field(default_factory=EngineModel)
    load_s: float = 180.0
    tick_s: float = 2.0
    window_s: float = 45.0
    max_queued: int = 128
    max_wait_s: float = 30.0


@dataclass(slots=True)
class Run:
    """What happened. `targets` and `loaded` hold (time, replicas) at each change."""

    served: list[Request] = field(default_factory=list)
    refused: list[Request] = field(default_factory=list)
    unfinished: int = 0
    replica_s: float = 0.0
    targets: list[tuple[float, int]] = field(default_factory=list)
    loaded: list[tuple[float, int]] = field(default_factory=list)

    @property
    def direction_changes(self) -> int:
        """How often the target turned from growing to shrinking or back."""
        counts = [count for _, count in self.targets]
        moves = [b > a for a, b in zip(counts, counts[1:], strict=False) if a != b]
        return sum(a != b for a, b in zip(moves, moves[1:], strict=False))


class Fleet:
    """One run of a scaler over a sequence of requests."""

    def __init__(self, model: FleetModel, scaler: Scaler, seed: int = 0) -> None:
        self.model = model
        self._scaler = scaler
        self._numbers = random.Random(seed)
        self._heap: list[tuple[float, int, int, object]] = []
        self._order = 0
        self._now_s = 0.0
        self._ready: list[Replica] = []
        self._starting: list[int] = []
        self._draining: list[Replica] = []
        self._made = 0
        #: Since when there has been any replica.
        self._there_since_s = 0.0
        self._queue: deque[Request] = deque()
        self._first_tokens: deque[tuple[float, float]] = deque()
        self._gaps: deque[tuple[float, float]] = deque()
        self._run = Run()

    def run(self, requests: Iterable[Request], horizon_s: float) -> Run:
        """Serve the requests until `horizon_s`; what is under way then counts as unfinished."""
        for _ in range(self._scaler.start()):
            self._made += 1
            self._ready.append(Replica(self._made, self.model.engine, 0.0))
        self._note()
        coming = iter(requests)
        self._push_next(coming)
        self._push(self.model.tick_s, _TICK, None)
        while self._heap and self._heap[0][0] <= horizon_s:
            time_s, _, kind, what = heapq.heappop(self._heap)
            self._go_to(time_s)
            if kind == _ARRIVAL:
                assert isinstance(what, Request)
                self._arrive(what)
                self._push_next(coming)
            elif kind == _REPLICA:
                assert isinstance(what, tuple)
                replica, version = what
                if replica.version == version:
                    self._serve(replica)
            elif kind == _READY:
                assert isinstance(what, int)
                self._loaded(what)
            else:
                self._tick()
                self._push(self._now_s + self.model.tick_s, _TICK, None)
        self._go_to(horizon_s)
        held = sum(replica.held for replica in (*self._ready, *self._draining))
        self._run.unfinished = held + len(self._queue)
        return self._run

    def _push(self, time_s: float, kind: int, what: object) -> None:
        self._order += 1
        heapq.heappush(self._heap, (time_s, self._order, kind, what))

    def _push_next(self, coming: Iterable[Request]) -> None:
        request = next(iter(coming), None)
        if request is not None:
            self._push(request.arrived_s, _ARRIVAL, request)

    def _go_to(self, time_s: float) -> None:
        count = len(self._ready) + len(self._starting) + len(self._draining)
        self._run.replica_s += count * (time_s - self._now_s)
        self._now_s = time_s

    def _arrive(self, request: Request) -> None:
        if len(self._queue) >= self.model.max_queued:
            self._run.refused.append(request)
            return
        self._queue.append(request)
        self._place_all()

    def _place_all(self) -> None:
        """Place what waits, oldest first, as long as the oldest finds room."""
        self._expire()
        while self._queue:
            request = self._queue[0]
            best = self._emptiest(request)
            if best is None:
                return
            self._queue.popleft()
            self._run.served.extend(self._advanced(best))
            best.place(request, self._now_s)
            self._foresee(best)

    def _emptiest(self, request: Request) -> Replica | None:
        """The replica with room that holds the fewest requests; of those, the oldest."""
        best, fewest = None, self.model.engine.places
        for replica in self._ready:
            if replica.held < fewest and replica.has_room(request):
                best, fewest = replica, replica.held
        return best

    def _expire(self) -> None:
        if not self._ready:
            return
        while self._queue:
            since_s = max(self._queue[0].arrived_s, self._there_since_s)
            if self._now_s - since_s <= self.model.max_wait_s:
                return
            self._run.refused.append(self._queue.popleft())

    def _serve(self, replica: Replica) -> None:
        ended = self._advanced(replica)
        self._run.served.extend(ended)
        if replica.draining and replica.held == 0:
            self._draining.remove(replica)
            return
        self._foresee(replica)
        if ended:
            self._place_all()

    def _advanced(self, replica: Replica) -> list[Request]:
        ended, begun = replica.advance(self._now_s)
        for request in begun:
            self._first_tokens.append((self._now_s, self._now_s - request.arrived_s))
        for request in ended:
            if (gap_s := request.itl_s) is not None:
                self._gaps.append((self._now_s, gap_s))
        return ended

    def _foresee(self, replica: Replica) -> None:
        if (next_s := replica.next_s()) < NEVER:
            self._push(next_s, _REPLICA, (replica, replica.version))

    def _tick(self) -> None:
        self._expire()
        self._scale_to(self._scaler.target(self._signals()))

    def _signals(self) -> Signals:
        engine, ready = self.model.engine, self._ready
        held = sum(replica.held for replica in (*ready, *self._draining))
        kv_used = sum(replica.kv_used for replica in ready)
        return Signals(
            now_s=self._now_s,
            ready=len(ready),
            starting=len(self._starting),
            draining=len(self._draining),
            waiting=len(self._queue),
            waiting_tokens=round(sum(request.kv_tokens for request in self._queue)),
            oldest_wait_s=self._now_s - self._queue[0].arrived_s if self._queue else 0.0,
            running=held,
            kv_share=kv_used / (engine.kv_tokens * len(ready)) if ready else 0.0,
            ttft_p90_s=self._p90(self._first_tokens),
            itl_p90_s=self._p90(self._gaps),
            places=engine.places,
        )

    def _p90(self, recent: deque[tuple[float, float]]) -> float | None:
        while recent and self._now_s - recent[0][0] > self.model.window_s:
            recent.popleft()
        if not recent:
            return None
        values = sorted(value for _, value in recent)
        return values[min(len(values) - 1, int(0.9 * len(values)))]

    def _scale_to(self, target: int) -> None:
        have = len(self._ready) + len(self._starting)
        for _ in range(target - have):
            self._made += 1
            self._starting.append(self._made)
            spread = self._numbers.uniform(0.9, 1.1)
            self._push(self._now_s + spread * self.model.load_s, _READY, self._made)
        for _ in range(have - target):
            # As Serve chooses: what still loads first, then the newest.
            if self._starting:
                self._starting.pop()
                continue
            replica = self._ready.pop()
            replica.draining = True
            if replica.held:
                self._draining.append(replica)
        if target != have:
            self._note()

    def _loaded(self, number: int) -> None:
        if number not in self._starting:
            return  # given up before it was there
        self._starting.remove(number)
        if not self._ready:
            self._there_since_s = self._now_s
        self._ready.append(Replica(number, self.model.engine, self._now_s))
        self._note()
        self._place_all()

    def _note(self) -> None:
        target = len(self._ready) + len(self._starting)
        if not self._run.targets or self._run.targets[-1][1] != target:
            self._run.targets.append((self._now_s, target))
        self._run.loaded.append((self._now_s, len(self._ready)))
