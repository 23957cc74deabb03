"""What the owner of admission keeps of a request between its `Enter` and its last `Leave`: a
*visit*, and its sequences. Plain records; admission.py changes them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

from serve_app.routing.quotas import Key
from serve_app.routing.tickets import Ask, Terms
from serve_app.setting_types import POOL


class State(Enum):
    """Where a sequence is."""

    WAITING = "waiting"  # has never had a place
    HELD = "held"  # has one
    MOVING = "moving"  # has lost its place and waits for another


@dataclass(slots=True, eq=False)
class Visit:
    """A request. Times are on the owner's clock; `entered` is moved back by what it waited under an
    earlier owner. `order` numbers the visits as they arrive."""

    request_id: str
    ingress_id: str
    key: Key
    terms: Terms
    entered: float
    deadline: float
    own_deadline: bool
    order: int
    #: Where it may run; the first is its home, in whose queue it waits.
    pools: tuple[str, ...] = (POOL,)
    sequences: dict[str, Sequence] = field(default_factory=dict)
    #: Those that wait for their first place, in the order of choices.
    waiting: dict[str, Sequence] = field(default_factory=dict)
    #: Whether any of its sequences has ever had a place.
    placed: bool = False
    #: Order within its key; set when it is queued.
    rank: tuple[int, float, float, int] = (0, 0.0, 0.0, 0)

    @property
    def home(self) -> str:
        return self.pools[0]

    @property
    def waiting_tokens(self) -> int:
        return sum(sequence.tokens for sequence in self.waiting.values())


@dataclass(slots=True, eq=False)
class Sequence:
    """One sequence. `replica_id` is where it is held, `avoid` the replica that it has lost,
    `pinned` the one that is set aside for it."""

    ask: Ask
    visit: Visit
    state: State = State.WAITING
    replica_id: str | None = None
    avoid: str | None = None
    pinned: str | None = None

    @property
    def sequence_id(self) -> str:
        return self.ask.sequence_id

    @property
    def tokens(self) -> int:
        """KV tokens that it asks for."""
        return self.ask.kv_tokens

    @property
    def band(self) -> float:
        """The band that it is placed with; moving sequences go before all."""
        return -math.inf if self.state is State.MOVING else self.visit.terms.priority
