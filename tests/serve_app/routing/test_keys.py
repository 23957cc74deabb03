"""API keys: what `Authorization` may look like, and how often a wrong one may be tried."""

from __future__ import annotations

import pytest
from starlette.datastructures import Headers

from serve_app.errors import ApiError, TooManyFailedKeys, Unauthorized
from serve_app.key_forms import key_digest
from serve_app.routing.keys import (
    BURST,
    MAX_ADDRESSES,
    REFILL_S,
    TOTAL_BURST,
    Keys,
    is_loopback,
    limited_name,
)
from serve_app.routing.tenants import ANYONE, Tenant

ALICE, MALLORY = "192.0.2.1", "198.51.100.7"


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def headers(*values: str) -> Headers:
    return Headers(raw=[(b"authorization", value.encode()) for value in values])


def make_tenant(key: str) -> Tenant:
    return Tenant(name=f"of-{key}", digest=key_digest(key))


def make_keys(clock: Clock | None = None) -> Keys:
    return Keys([make_tenant("one"), make_tenant("two")], clock or Clock())


def told(keys: Keys, host: str | None, *values: str) -> str:
    """ "ok", or the code of the refusal."""
    try:
        keys.check(headers(*values), host)
    except ApiError as error:
        return str(error.code)
    return "ok"


@pytest.mark.parametrize(
    "value",
    ["Bearer two", "bearer two", "BEARER two", "Bearer    two", " Bearer two ", "bEaReR one"],
)
def test_the_scheme_has_no_case_and_any_number_of_spaces(value: str) -> None:
    tenant = make_keys().check(headers(value), ALICE)
    assert tenant.name == f"of-{value.split()[-1]}"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ((), "give an API key"),
        (("",), "scheme is not Bearer"),
        (("two",), "scheme is not Bearer"),
        (("Basic dHdvOnR3bw==",), "scheme is not Bearer"),
        (("Token two",), "scheme is not Bearer"),
        (("Bearertwo",), "scheme is not Bearer"),
        (("Bearer",), "takes one key"),
        (("Bearer ",), "takes one key"),
        (("Bearer two two",), "takes one key"),
        (("Bearer two", "Bearer two"), "several"),
        (("Bearer tw",), "wrong"),
        (("Bearer Two",), "wrong"),
        (("Bearer twö",), "wrong"),
        (("Bearer " + "x" * 60_000,), "wrong"),
    ],
)
def test_everything_else_is_a_401_that_says_why_and_repeats_no_key(
    values: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(Unauthorized, match=sentence) as refused:
        make_keys().check(headers(*values), ALICE)
    assert refused.value.headers() == {"WWW-Authenticate": "Bearer"}
    assert len(str(refused.value)) < 100


def test_without_keys_everybody_is_let_in() -> None:
    assert Keys([]).check(headers(), None) is ANYONE
    assert Keys([]).check(headers("nonsense"), ALICE) is ANYONE


def test_guessing_has_a_rate_and_a_right_guess_is_refused_meanwhile() -> None:
    clock = Clock()
    keys = make_keys(clock)
    answers = [told(keys, MALLORY, f"Bearer guess{i}") for i in range(BURST + 5)]
    assert answers == ["invalid_api_key"] * BURST + ["too_many_failed_keys"] * 5
    assert told(keys, MALLORY, "Bearer two") == "too_many_failed_keys"
    assert told(keys, MALLORY) == "invalid_api_key", "no key is no guess"
    clock.now += REFILL_S
    assert told(keys, MALLORY, "Bearer guess") == "invalid_api_key"
    assert told(keys, MALLORY, "Bearer guess") == "too_many_failed_keys"
    clock.now += REFILL_S
    assert told(keys, MALLORY, "Bearer two") == "ok"


def test_failures_from_elsewhere_refuse_no_right_key() -> None:
    keys = make_keys()
    for i in range(2 * TOTAL_BURST):
        told(keys, f"10.0.{i // 250}.{i % 250}", "Bearer guess")
    assert told(keys, "10.9.9.9", "Bearer guess") == "too_many_failed_keys", "the bound over all"
    assert told(keys, ALICE, "Bearer two") == "ok"


def test_one_address_for_all_keeps_a_key_that_was_right_once() -> None:
    keys = make_keys()
    assert told(keys, ALICE, "Bearer two") == "ok"
    for _ in range(3 * BURST):
        told(keys, ALICE, "Bearer guess")
    assert told(keys, ALICE, "Bearer guess") == "too_many_failed_keys"
    assert told(keys, ALICE, "Bearer one") == "ok"


def test_an_unknown_address_is_bounded_over_all_and_refuses_no_right_key() -> None:
    keys = make_keys()
    answers = [told(keys, None, "Bearer guess") for _ in range(TOTAL_BURST + 3)]
    assert answers[-3:] == ["too_many_failed_keys"] * 3
    assert set(answers[:TOTAL_BURST]) == {"invalid_api_key"}
    assert told(keys, None, "Bearer two") == "ok"


def test_the_limiter_remembers_a_bounded_number_of_addresses() -> None:
    keys = make_keys()
    for i in range(MAX_ADDRESSES + 50):
        told(keys, f"2001:db8:{i:x}::1", "Bearer guess")
        told(keys, f"2001:db8:{i:x}::2", "Bearer two")
    assert len(keys._failures) == len(keys._known) == MAX_ADDRESSES


def test_an_ipv6_customer_has_one_name_whatever_address_is_taken() -> None:
    assert limited_name("2001:db8:1:2::5") == limited_name("2001:db8:1:2:ffff::9")
    assert limited_name("2001:db8:1:2::5") != limited_name("2001:db8:1:3::5")
    assert limited_name("::ffff:192.0.2.1") == limited_name("192.0.2.1") == "192.0.2.1"
    assert limited_name("fe80::1%eth0") == "fe80::/64"
    assert limited_name("x" * 1000) == "x" * 64
    assert limited_name(None) is None


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("::ffff:127.0.0.1", True)]
    + [("192.0.2.1", False), ("::2", False), ("localhost", False), ("", False), (None, False)],
)
def test_loopback_is_an_address_and_no_name(host: str | None, local: bool) -> None:
    assert is_loopback(host) is local


def test_too_many_failures_say_when_to_come_back() -> None:
    assert TooManyFailedKeys("x").headers() == {"Retry-After": "60"}
    assert TooManyFailedKeys.status == 429


@pytest.mark.parametrize("given", ["first", "middle", "last", "wrong"])
def test_every_key_is_compared_whichever_is_right(
    given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tenants = [make_tenant(name) for name in ("first", "middle", "last")]
    compared: list[bytes] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append(other)
        return one == other

    monkeypatch.setattr("hmac.compare_digest", compare)
    told(Keys(tenants, Clock()), ALICE, f"Bearer {given}")
    assert compared == [tenant.digest for tenant in tenants]


def test_replaced_keys_take_effect_at_the_next_request_and_addresses_stay_known() -> None:
    keys = make_keys()
    assert told(keys, ALICE, "Bearer one") == "ok"
    for _ in range(BURST):
        told(keys, ALICE, "Bearer guess")
        told(keys, MALLORY, "Bearer guess")
    keys.replace_tenants([make_tenant("two"), make_tenant("three")])
    assert told(keys, ALICE, "Bearer one") == "too_many_failed_keys", "it is gone, and counted"
    assert told(keys, ALICE, "Bearer three") == "ok", "its address sent a right key once"
    assert told(keys, MALLORY, "Bearer three") == "too_many_failed_keys"


def test_no_change_of_the_keys_opens_the_service() -> None:
    keys = make_keys()
    keys.replace_tenants([])
    assert keys.required
    assert told(keys, ALICE, "Bearer one") == "invalid_api_key"
    assert told(keys, ALICE) == "invalid_api_key"
