"""API keys: who a request is from, before anything else is asked of it.

`Keys.check` reads `Authorization` as RFC 7235 and RFC 6750 define it, compares in constant time,
and limits how often wrong keys are tried. openai/service.py and openai/operations.py call it before
they read a body, start a span or count a request: until then a request is nobody's, and leaves
nothing but a count by reason.

The limits. An address that sent too many wrong keys is refused without a comparison, so that
guessing has a rate. An address from which a right key came keeps its access whatever else is tried
from there: a gateway has one address for everybody behind it. Failures from elsewhere never refuse
a right key. Where the address is not known (a cluster's HAProxy), only the bound over all addresses
holds.
"""

from __future__ import annotations

import hmac
import ipaddress
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import TypeVar

from starlette.datastructures import Headers

from serve_app.errors import TooManyFailedKeys, Unauthorized
from serve_app.key_forms import key_digest
from serve_app.routing.tenants import ANYONE, Tenant

#: Wrong keys that an address may send at once, and seconds until it may send one more.
BURST = 10
REFILL_S = 6.0
#: The same over all addresses.
TOTAL_BURST = 1000
TOTAL_REFILL_S = 0.06
#: Addresses that are remembered; the oldest is forgotten first.
MAX_ADDRESSES = 4096

_Value = TypeVar("_Value")


def bearer_token(headers: Headers) -> str:
    """The token of `Authorization: Bearer TOKEN`; the scheme's case does not matter.

    Raises:
        Unauthorized: no such header, several, another scheme, or no single token.
    """
    values = headers.getlist("authorization")
    if not values:
        raise Unauthorized("give an API key: Authorization: Bearer KEY")
    if len(values) > 1:
        raise Unauthorized("there are several Authorization headers; send one")
    scheme, _, rest = values[0].strip(" \t").partition(" ")
    token = rest.strip(" ")
    if scheme.lower() != "bearer":
        raise Unauthorized("the Authorization scheme is not Bearer: Authorization: Bearer KEY")
    if not token or " " in token:
        raise Unauthorized("Authorization: Bearer takes one key, without spaces")
    return token


def limited_name(host: str | None) -> str | None:
    """The address by which failures are counted: of an IPv6 client its /64, which is one
    customer's. None where `host` is None."""
    if host is None:
        return None
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host[:64]
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)


def is_loopback(host: str | None) -> bool:
    """Whether `host` is an address of this machine's loopback interface."""
    if host is None:
        return False
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


class _Bucket:
    """`size` tokens, one more every `refill_s`."""

    def __init__(self, size: int, refill_s: float, now: float) -> None:
        self._size, self._refill_s = size, refill_s
        self._tokens, self._at = float(size), now

    def left(self, now: float) -> float:
        grown = self._tokens + (now - self._at) / self._refill_s
        return min(float(self._size), grown)

    def take(self, now: float) -> None:
        self._tokens, self._at = max(0.0, self.left(now) - 1.0), now


class Keys:
    """The configured keys, and the failures of those who tried others. `clock` is in seconds."""

    def __init__(
        self, tenants: Iterable[Tenant], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._tenants = tuple(tenants)
        #: Whether a key is asked for; fixed, so that no change of the keys opens the service.
        self.required = bool(self._tenants)
        self._clock = clock
        self._failures: OrderedDict[str, _Bucket] = OrderedDict()
        self._total = _Bucket(TOTAL_BURST, TOTAL_REFILL_S, clock())
        #: Addresses from which a right key came, the newest last.
        self._known: OrderedDict[str, None] = OrderedDict()

    @property
    def tenants(self) -> tuple[Tenant, ...]:
        return self._tenants

    def replace_tenants(self, tenants: Iterable[Tenant]) -> None:
        """From the next request on these are the keys, and no others. What is known of addresses
        stays: one that sent a right key, and how many wrong ones came from where."""
        self._tenants = tuple(tenants)

    def check(self, headers: Headers, host: str | None) -> Tenant:
        """Whose the request is; `ANYONE`'s without any key configured. `host` is the client's
        address, None where it is not known.

        Raises:
            Unauthorized: the key is missing or wrong.
            TooManyFailedKeys: it is wrong, like many before; or this address has sent too many
                wrong ones, and never a right one.
        """
        if not self.required:
            return ANYONE
        now, address = self._clock(), limited_name(host)
        token = bearer_token(headers)  # no key is no guess: it is not limited
        if address is not None and address not in self._known and self._exhausted(address, now):
            raise TooManyFailedKeys("too many wrong API keys from this address; retry later")
        given = key_digest(token)
        # Every key is compared, in constant time: the time taken tells nothing.
        found = [t for t in self._tenants if hmac.compare_digest(given, t.digest)]
        if found:
            if address is not None:
                _remember(self._known, address, None)
            return found[0]
        limited = self._total.left(now) < 1.0 or (
            address is not None and self._exhausted(address, now)
        )
        self._note_failure(address, now)
        if limited:
            raise TooManyFailedKeys("too many wrong API keys; retry later")
        raise Unauthorized("the API key is wrong; give a valid one: Authorization: Bearer KEY")

    def _exhausted(self, address: str, now: float) -> bool:
        bucket = self._failures.get(address)
        return bucket is not None and bucket.left(now) < 1.0

    def _note_failure(self, address: str | None, now: float) -> None:
        self._total.take(now)
        if address is not None:
            bucket = self._failures.pop(address, None) or _Bucket(BURST, REFILL_S, now)
            bucket.take(now)
            _remember(self._failures, address, bucket)


def _remember(table: OrderedDict[str, _Value], address: str, value: _Value) -> None:
    table[address] = value
    table.move_to_end(address)
    if len(table) > MAX_ADDRESSES:
        table.popitem(last=False)
