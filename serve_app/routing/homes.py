"""Which pools may take a request: its home, and where it may spill over to; and its session.

Pure functions over the configuration and what the engines have told. A pool of which no replica has
ever been heard is as large as its configured `max_request_tokens`; without that, what it holds is
not known.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from serve_app.engines.protocol import EngineInfo, GenerateRequest
from serve_app.errors import EngineUnavailable
from serve_app.routing.checks import ContextLimit, never_fits
from serve_app.sections import PoolSection, RoutingSection


@dataclass(frozen=True, slots=True)
class Pools:
    """The pools as an ingress knows them now: what the longest request of each may have, None where
    that is not known; where each spills over to; and the tokens of a KV page, of the largest."""

    limits: Mapping[str, ContextLimit | None]
    spill_over: Mapping[str, tuple[str, ...]]
    page_tokens: int

    @classmethod
    def of(cls, sections: Mapping[str, PoolSection], infos: Mapping[str, EngineInfo]) -> Pools:
        return cls(
            {name: limit_of(pool, infos.get(name)) for name, pool in sections.items()},
            {name: pool.spill_over for name, pool in sections.items()},
            max((infos[name].page_tokens for name in sections if name in infos), default=1),
        )

    @property
    def largest(self) -> ContextLimit:
        """What no request may exceed; without bound while some pool is not known."""
        limits = [limit for limit in self.limits.values() if limit is not None]
        if len(limits) < len(self.limits):
            return ContextLimit(sys.maxsize, "service")
        return max(limits, key=lambda limit: limit.tokens)

    def route(self, num_tokens: int) -> tuple[str, ...]:
        """The pools for a request of so many tokens, prompt and completion limit: its home, which
        is the one with the smallest limit that holds it (the first of equal ones), then those that
        it may spill over to.

        Raises:
            EngineUnavailable: none that is known holds it, and not all are known.
            InvalidRequest: none holds it.
        """
        able = {
            name: limit.tokens
            for name, limit in self.limits.items()
            if limit is not None and num_tokens <= limit.tokens
        }
        if not able:
            unknown = [name for name, limit in self.limits.items() if limit is None]
            if not unknown:
                raise never_fits(self.largest, num_tokens)
            raise EngineUnavailable(
                f"no engine of pool {unknown[0]} has told yet how long a request may be; retry "
                "later"
            )
        home = min(able, key=lambda name: able[name])
        return (home, *(name for name in self.spill_over[home] if name in able))


def limit_of(pool: PoolSection, info: EngineInfo | None) -> ContextLimit | None:
    """What the longest request of a pool may have, of which an engine may have told `info`."""
    own = pool.max_request_tokens
    if info is not None:
        held = ContextLimit.of(info)
        return held if own is None or held.tokens <= own else ContextLimit(own, "service")
    return None if own is None else ContextLimit(own, "service")


def assign(
    requests: Sequence[GenerateRequest],
    pools: Pools,
    routing: RoutingSection,
    *,
    session: str | None,
    opening: str | None = None,
    arrived: float | None = None,
) -> list[GenerateRequest]:
    """The sequences of one request with their pools, which are those of the longest one, and their
    sessions. `session` is what the client's header says, `opening` how a chat begins; raises as
    `Pools.route`."""
    route = pools.route(max(len(r.prompt_ids) + r.sampling.max_tokens for r in requests))
    return [
        replace(
            request,
            pools=route,
            affinity=session_of(request, routing, session, opening, pools.page_tokens),
            arrived=arrived,
        )
        for request in requests
    ]


def session_of(
    request: GenerateRequest,
    routing: RoutingSection,
    session: str | None,
    opening: str | None,
    page_tokens: int,
) -> str:
    """The digest of a request's session, empty where it has none: of the header, of how its chat
    begins, or of the whole KV pages at the head of a prompt without roles. Tenants share no
    session, as they share no KV page."""
    if not routing.affinity:
        return ""
    if session:
        named = b"header\0" + session.encode("utf-8", "surrogateescape")
    elif opening is not None:
        named = b"chat\0" + opening.encode("utf-8", "surrogatepass")
    else:
        head = max(page_tokens, routing.affinity_head_tokens)
        length = min(len(request.prompt_ids), head) // page_tokens * page_tokens
        if not length:
            return ""
        named = b"head\0" + array("q", request.prompt_ids[:length]).tobytes()
    salted = request.cache_salt.encode() + b"\0" + named
    return hashlib.blake2b(salted, digest_size=16).hexdigest()
