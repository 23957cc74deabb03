"""The pools' figures in Serve's controller: asked of the owner of admission in a thread.

The controller has one event loop for all of Serve, and calls a policy on it ten times a second.
Finding an actor asks the cluster's head and blocks, and so does waiting for an answer: neither may
happen there. The policy reads the last answer, and how old it is.

A module of its own, because Serve pickles the policy's module by value.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from serve_app.autoscaling.signals import Signals

log = logging.getLogger("ray.serve")

#: Seconds between two questions.
PERIOD_S = 1.0
#: Seconds after which an answer says nothing about now.
STALE_S = 10.0
#: Seconds to wait for one answer.
_ANSWER_S = 5.0

#: Gives the `PoolStats` of a pool, or None where the owner does not know it (yet). May block, and
#: may raise anything.
Fetch = Callable[[], Any]


class _Answer:
    """What thread and reader share. The thread holds no reader, so that one can be collected."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.stop = threading.Event()
        self.figures: Any = None
        self.at: float | None = None


class FiguresReader:
    """Keeps the last answer of `fetch`. Reading never blocks."""

    def __init__(
        self,
        fetch: Fetch,
        period_s: float = PERIOD_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fetch = fetch
        self._period_s = period_s
        self._clock = clock
        self._answer = _Answer()
        self._started = False

    def latest(self) -> Any:
        """The last figures, None while there are none or they are older than `STALE_S`. The first
        call starts the thread, which ends with this object."""
        if not self._started:
            self._started = True
            threading.Thread(
                target=_ask_for_ever,
                args=(self._answer, self._fetch, self._period_s, self._clock),
                name="intserve-autoscaling-figures",
                daemon=True,
            ).start()
            weakref.finalize(self, self._answer.stop.set)
        with self._answer.lock:
            asked_at, figures = self._answer.at, self._answer.figures
        if asked_at is None or self._clock() - asked_at > STALE_S:
            return None
        return figures

    def close(self) -> None:
        """End the thread after the question that it is at."""
        self._answer.stop.set()


def _ask_for_ever(
    answer: _Answer, fetch: Fetch, period_s: float, clock: Callable[[], float]
) -> None:
    failed = False
    while not answer.stop.is_set():
        asked_at = clock()
        try:
            figures = fetch()
        # Whatever goes wrong, an owner that restarts or a head that is away, the next question may
        # find an answer, and the policy holds meanwhile.
        except Exception as error:
            if not failed:
                log.warning("autoscaling is without figures: %s: %s", type(error).__name__, error)
            failed = True
        else:
            failed = False
            with answer.lock:
                answer.figures, answer.at = figures, asked_at
        answer.stop.wait(period_s)


class OwnerFetch:
    """Asks the owner of admission of an application for the figures of one pool."""

    def __init__(self, app_name: str, pool: str) -> None:
        self._app_name = app_name
        self._pool = pool
        self._owner: Any = None

    def __call__(self) -> Any:
        """The pool's `PoolStats`, None where the owner has none.

        Raises:
            RayError: the owner is away.
            ValueError: there is no owner, as before the first ingress has started.
        """
        import ray

        from serve_app.routing.owner import NAMESPACE, owner_name

        if self._owner is None:
            self._owner = ray.get_actor(owner_name(self._app_name), namespace=NAMESPACE)
        try:
            stats = ray.get(self._owner.stats.remote(), timeout=_ANSWER_S)
        except Exception:
            self._owner = None  # another one may have taken its place
            raise
        return next((pool for pool in stats.pools if pool.pool == self._pool), None)


def signals_of(
    figures: Any, *, now_s: float, running: int, target: int, places: int | None
) -> Signals:
    """What a policy is told: of `running` replicas that Serve routes to and the `target` that it
    works toward, and the figures of the owner, None where nobody has any."""
    alone = Signals(
        now_s=now_s,
        known=False,
        ready=min(running, target),
        starting=max(0, target - running),
        draining=max(0, running - target),
        places=places,
    )
    if figures is None:
        return alone
    return replace(
        alone,
        known=True,
        waiting=figures.waiting,
        waiting_tokens=figures.waiting_tokens,
        oldest_wait_s=figures.oldest_wait_s,
        running=figures.running,
        kv_share=figures.kv_share,
        ttft_p90_s=figures.ttft_p90_s,
        itl_p90_s=figures.itl_p90_s,
        turned_away=figures.turned_away,
    )
