"""One engine replica as the owner of admission knows it: how large it is, and what is there."""

from __future__ import annotations

import math

from serve_app.routing.breaker import Breaker
from serve_app.routing.visits import Sequence

#: Age in seconds of its status at which a replica gets nothing more.
MAX_AGE_S = 5.0
#: Seconds for which a silent replica, and that one has said goodbye, is remembered.
FORGET_S = 60.0
#: Seconds for which an ingress is believed that Serve does not route to a replica: it says so
#: every second while that is so.
UNROUTED_S = 2.5


class Replica:
    """One replica. Known by name alone until its first status arrives."""

    def __init__(self, replica_id: str, now: float) -> None:
        self.replica_id = replica_id
        self.pool = ""  # until its first status
        self.reported = -math.inf  # when its newest status was true
        self.gone = False
        self.unrouted: dict[str, float] = {}  # ingress that says so -> when
        self.forget_at = now + FORGET_S
        self.places = 0
        self.max_running: float = math.inf
        self.max_model_len = 0
        self.kv_total = 0
        self.held: dict[str, int] = {}  # sequence -> KV tokens
        self.kv_held = 0
        self.ghosts: dict[str, None] = {}
        self.kv_ghosts = 0
        self.left: dict[str, float] = {}  # sequence -> when it left
        self.free_places = 0
        self.free_kv = 0
        self.breaker = Breaker()
        self.pin: Sequence | None = None
        self.pin_band = math.inf

    def count(self) -> None:
        """Compute what is free from what is held."""
        self.free_places = self.places - len(self.held) - len(self.ghosts)
        self.free_kv = self.kv_total - self.kv_held - self.kv_ghosts

    def is_fresh(self, now: float) -> bool:
        if self.gone or now - self.reported > MAX_AGE_S:
            return False
        return not self.unrouted or all(
            now - moment > UNROUTED_S for moment in self.unrouted.values()
        )

    def can_ever_hold(self, sequence: Sequence) -> bool:
        """Whether it would fit if nothing else were there."""
        limit = min(self.max_model_len, self.kv_total)
        return sequence.ask.charge <= limit and sequence.avoid != self.replica_id

    def need(self, sequence: Sequence) -> int:
        """KV tokens that the sequence takes here: whole pages, but never more than all."""
        return min(sequence.tokens, self.kv_total)

    def fits(self, sequence: Sequence) -> bool:
        room = self.free_places > 0 and self.need(sequence) <= self.free_kv
        return room and self.can_ever_hold(sequence)

    def used_share(self) -> float:
        """The larger of the shares of KV and of places that are taken."""
        return 1.0 - min(self.free_kv / self.kv_total, self.free_places / self.places)

    def departures(self, sequence: Sequence) -> float:
        """How long until the sequence fits, in units of one sequence's stay: the sequences that
        must leave first, of all that are there."""
        there = max(1, len(self.held) + len(self.ghosts))
        mean = max(1.0, (self.kv_held + self.kv_ghosts) / there)
        missing = math.ceil((self.need(sequence) - self.free_kv) / mean)
        return max(missing, 1 - self.free_places) / there
