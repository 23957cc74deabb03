"""Which replica had a session last: its KV cache may hold the beginning of the next request.

Bounded, least recently used first, and forgotten after a while: by then the pages are gone, too.
"""

from __future__ import annotations

from collections import OrderedDict

#: Sessions that are remembered, and seconds for which they are.
MAX_SESSIONS = 65_536
TTL_S = 1800.0


class Sessions:
    """Session and pool -> replica. A session that has run in two pools has a replica in each."""

    def __init__(self, max_sessions: int = MAX_SESSIONS, ttl_s: float = TTL_S) -> None:
        self._max = max_sessions
        self._ttl_s = ttl_s
        self._last: OrderedDict[tuple[str, str], tuple[str, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._last)

    def note(self, session: str, pool: str, replica_id: str, now: float) -> None:
        """The session's newest request runs in this replica. An empty name is no session."""
        if not session:
            return
        self._last[session, pool] = replica_id, now
        self._last.move_to_end((session, pool))
        while len(self._last) > self._max:
            self._last.popitem(last=False)

    def find(self, session: str, pool: str, now: float) -> str | None:
        """The replica of this pool that had it last."""
        replica_id, moment = self._last.get((session, pool), (None, now))
        if replica_id is not None and now - moment > self._ttl_s:
            del self._last[session, pool]
            return None
        return replica_id

    def prune(self, now: float) -> None:
        """Forget those that are too old."""
        while self._last:
            key, (_, moment) = next(iter(self._last.items()))
            if now - moment <= self._ttl_s:
                return
            del self._last[key]
