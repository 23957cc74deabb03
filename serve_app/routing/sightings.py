"""What an ingress tells the owner of admission of the engine replicas: their newest heartbeats.

A replica that still beats and that Serve does not route to is told as unrouted: it drains, or has
not begun to serve. That may change again, a goodbye may not. Its first heartbeat is mostly older
than Serve's word, so that both are looked at when they come: else the first request of a service
would wait for the second heartbeat.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from serve_app.engines.protocol import ReplicaStatus
from serve_app.routing.replica_client import MAX_AGE_S
from serve_app.routing.tickets import Seen


class Sightings:
    """The heartbeats of the last seconds. `routed` gives the ids of a pool that Serve routes to,
    None where that is not known; `changed` is called when replicas come or go."""

    def __init__(
        self,
        routed: Callable[[str], frozenset[str] | None],
        changed: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.changed = changed
        self._routed = routed
        self._clock = clock
        self._statuses: dict[str, tuple[float, ReplicaStatus]] = {}
        self._gone: dict[str, float] = {}
        self._last_routed: dict[str, frozenset[str] | None] = {}

    def note(self, status: ReplicaStatus) -> None:
        """Take in a heartbeat."""
        if status.replica_id in self._gone:
            return  # it was under way when the replica said goodbye
        new = status.replica_id not in self._statuses
        self._statuses[status.replica_id] = self._clock(), status
        if new or self._routed_otherwise(status.pool):
            self.changed()

    def look(self) -> None:
        """Look whether Serve routes otherwise to replicas that are heard of."""
        pools = {status.pool for _, status in self._statuses.values()}
        if any(self._routed_otherwise(pool) for pool in pools):
            self.changed()

    def _routed_otherwise(self, pool: str) -> bool:
        """Whether Serve's list of a pool differs from what was told last."""
        routed = self._routed(pool)
        return self._last_routed.get(pool, routed) != routed

    def goodbye(self, replica_id: str) -> None:
        """The replica answers nothing more."""
        self._statuses.pop(replica_id, None)
        self._gone[replica_id] = self._clock()
        self.changed()

    def seen(self) -> Seen:
        """All of it as of now."""
        now = self._clock()
        self._statuses = {k: v for k, v in self._statuses.items() if now - v[0] <= MAX_AGE_S}
        self._gone = {k: v for k, v in self._gone.items() if now - v <= 2 * MAX_AGE_S}
        pools = {status.pool for _, status in self._statuses.values()}
        self._last_routed = routed = {pool: self._routed(pool) for pool in pools}
        return Seen(
            statuses=tuple((status, now - moment) for moment, status in self._statuses.values()),
            gone=tuple(self._gone),
            unrouted=tuple(
                replica_id
                for replica_id, (_, status) in self._statuses.items()
                if (listed := routed[status.pool]) is not None and replica_id not in listed
            ),
        )
