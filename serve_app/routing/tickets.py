"""What an ingress and the owner of admission say to each other.

One owner decides for all ingress replicas who gets a place in which engine replica (owner.py around
admission.py); every ingress tells it what arrives and what ends, and which engine replicas it hears
of (admission_client.py). Everything here crosses an actor call and is a plain dataclass. Times are
durations, because the clocks of two machines agree on nothing else.

A *sequence* is one prompt with one choice: what an engine works on. The sequences of one request
arrive together, and are refused together while none of them has a place.
"""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.engines.protocol import ReplicaStatus
from serve_app.setting_types import POOL

#: Rises with every change of these forms, so that ingresses of two versions, which run together
#: during an update, never talk to one owner.
WIRE_VERSION = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What the owner knows of an API key. `name` is its name in logs, never the key. Bands of lower
    `priority` go first; within a band keys share tokens by `weight`. A limit of None is none; the
    rates are per minute."""

    name: str
    priority: int = 0
    weight: float = 1.0
    max_concurrency: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One sequence that wants a place: KV tokens of its prompt, and set aside for its output.
    `charge` is what its key's token rate is charged: prompt and the whole completion limit. `pools`
    may take it: its home, where it waits, then those that it may spill over to, in order; they are
    the same for all sequences of a request. `affinity` names its session, a digest."""

    sequence_id: str
    prompt_tokens: int
    output_tokens: int
    charge: int
    pools: tuple[str, ...] = (POOL,)
    affinity: str = ""

    @property
    def kv_tokens(self) -> int:
        return self.prompt_tokens + self.output_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Enter:
    """A request wants places for its sequences. `seconds_left` until its deadline; `own_deadline`
    says that the client set that deadline, and such requests go first within their key. Of a
    request that is told to another owner, `waited_s` is what it has waited, and `placed` says that
    some sequence of it has had a place, of which there may be no other trace."""

    request_id: str
    terms: Terms
    asks: tuple[Ask, ...]
    seconds_left: float
    own_deadline: bool = False
    waited_s: float = 0.0
    placed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A sequence has lost its replica and wants another, before all that wait. `lost` is the one
    to avoid; `blame` says that it failed, and did not merely stop. `kv_tokens` stay as asked."""

    sequence_id: str
    lost: str
    blame: bool
    seconds_left: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Landed:
    """A sequence runs on another replica than the one that was granted."""

    sequence_id: str
    replica_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Leave:
    """A sequence has ended, or wants no place any more. `used_tokens` are prompt and completion as
    counted, 0 where it never ran; `failed` blames its replica. `ttft_s` is the time from the HTTP
    request's arrival to the first token, `itl_s` the mean time between tokens, both as the ingress
    saw them; None where there was none."""

    sequence_id: str
    used_tokens: int
    failed: bool = False
    ttft_s: float | None = None
    itl_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A sequence that has a place, as its ingress tells a new owner."""

    request_id: str
    terms: Terms
    ask: Ask
    replica_id: str
    seconds_left: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What a key has used through one ingress in the last minute, as that tells a new owner."""

    terms: Terms
    age_s: float
    requests: int
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """An ingress presents itself to an owner that does not know it: everything that it holds and
    that waits. The first message to every owner."""

    held: tuple[Held, ...] = ()
    waiting: tuple[Enter, ...] = ()
    moving: tuple[tuple[Held, Move], ...] = ()
    spent: tuple[Spent, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """The engine replicas that an ingress has heard of: status and its age in seconds, those that
    said goodbye, and those that Serve does not route to, although they are there: they drain, or
    have not begun to serve."""

    statuses: tuple[tuple[ReplicaStatus, float], ...] = ()
    gone: tuple[str, ...] = ()
    unrouted: tuple[str, ...] = ()


Message = Join | Enter | Move | Landed | Leave | Seen


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """The sequence has a place in this replica."""

    sequence_id: str
    replica_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """These sequences get no place. `code` is one of `errors.CODES` and says what a client sees:
    queue_full, waited_too_long, rate_limited and too_many_requests a 429 (`Overloaded`),
    deadline_exceeded a 504, context_length_exceeded and invalid_value a 400, because it can never
    be let in, engine_unavailable a 503."""

    sequence_ids: tuple[str, ...]
    code: str
    message: str
    retry_after_s: int = 1


Answer = Grant | Refusal
