"""What each API key uses of what it may: sequences at a time, requests and tokens per minute.

A key is known by the name in its `Terms`. Tokens are charged as asked for when a request is let in,
and what a sequence leaves unused comes back when it ends.
"""

from __future__ import annotations

from collections.abc import Sequence

from serve_app.routing.rates import TokenBucket, missing_after, retry_after
from serve_app.routing.refusals import rate_limited, too_many_choices, too_many_requests
from serve_app.routing.tickets import Ask, Spent, Terms

#: Seconds for which an idle key is remembered: as long as an empty bucket takes to fill.
REMEMBER_S = 60.0


class Key:
    """What is counted of one key: its sequences, and its buckets (None: no such limit)."""

    def __init__(self, terms: Terms, now: float) -> None:
        self.terms = terms
        self.sequences = 0
        self.requests = _resized(None, terms.requests_per_minute, now)
        self.tokens = _resized(None, terms.tokens_per_minute, now)
        self.idle_since = now
        self._since = now
        # What was used before under another owner: (age at `_since`, requests, tokens); and what of
        # that has been taken from the buckets.
        self._spent: list[tuple[float, int, int]] = []
        self._missing = (0.0, 0.0)

    def update(self, terms: Terms, now: float) -> None:
        """The key's terms may have changed since its last request."""
        if terms != self.terms:
            self.requests = _resized(self.requests, terms.requests_per_minute, now)
            self.tokens = _resized(self.tokens, terms.tokens_per_minute, now)
            self.terms = terms

    def check(self, asks: Sequence[Ask], now: float) -> None:
        """Raises Refused if a limit of the key keeps this request out."""
        terms, count = self.terms, len(asks)
        if (limit := terms.max_concurrency) is not None:
            if count > limit:
                raise too_many_choices(terms.name, count, limit)
            if self.sequences + count > limit:
                raise too_many_requests(terms.name, self.sequences, limit)
        tokens = sum(ask.charge for ask in asks)
        for bucket, amount, unit in (
            (self.requests, 1, "requests"),
            (self.tokens, tokens, "tokens"),
        ):
            if bucket is not None and (wait := bucket.wait_s(amount, now)) > 0:
                raise rate_limited(terms.name, int(bucket.capacity), unit, retry_after(wait))

    def charge(self, requests: int, tokens: int, now: float) -> None:
        """Take from the buckets; negative amounts come back."""
        if self.requests is not None and requests:
            self.requests.take(requests, now)
        if self.tokens is not None and tokens:
            self.tokens.take(tokens, now)

    def carry(self, spent: Spent, now: float) -> None:
        """Take what the key used through one ingress under an earlier owner. What several
        ingresses tell adds up, as if the buckets had been one all along."""
        at = now - spent.age_s
        self._spent.append((max(0.0, self._since - at), spent.requests, spent.tokens))
        requests, tokens = self._missing
        if self.requests is not None:
            takes = ((age, float(count)) for age, count, _ in self._spent)
            missing = missing_after(self.requests.capacity, takes)
            self.requests.take(missing - requests, now)
            requests = missing
        if self.tokens is not None:
            takes = ((age, float(count)) for age, _, count in self._spent)
            missing = missing_after(self.tokens.capacity, takes)
            self.tokens.take(missing - tokens, now)
            tokens = missing
        self._missing = (requests, tokens)

    def is_forgettable(self, now: float) -> bool:
        """Whether it is idle, and a new one would be the same."""
        buckets = (b for b in (self.requests, self.tokens) if b is not None)
        return (
            not self.sequences
            and now - self.idle_since >= REMEMBER_S
            and all(bucket.level(now) >= bucket.capacity for bucket in buckets)
        )


def _resized(bucket: TokenBucket | None, per_minute: int | None, now: float) -> TokenBucket | None:
    if per_minute is None:
        return None
    if bucket is None:
        return TokenBucket(per_minute, now)
    bucket.resize(per_minute, now)
    return bucket


class Quotas:
    """All keys, by name."""

    def __init__(self) -> None:
        self._keys: dict[str, Key] = {}

    def key(self, terms: Terms, now: float) -> Key:
        """The key of these terms, which become its own."""
        if (key := self._keys.get(terms.name)) is None:
            key = self._keys[terms.name] = Key(terms, now)
        key.update(terms, now)
        return key

    def prune(self, now: float) -> None:
        """Forget keys that are idle."""
        self._keys = {n: key for n, key in self._keys.items() if not key.is_forgettable(now)}

    def __len__(self) -> int:
        return len(self._keys)
