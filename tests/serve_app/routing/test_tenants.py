"""Tenants: their terms, the models that they may use, the salt that keeps their caches apart."""

from __future__ import annotations

import pickle

import pytest

from serve_app.key_forms import key_digest, parse_keys
from serve_app.routing.tenants import ANYONE, Tenant, read_tenants
from serve_app.routing.tickets import Terms
from serve_app.sections import KeyLimits, KeysSection

DEFAULT = KeyLimits(max_concurrency=3)


def tenant(name: str = "a", key: str = "sk-a") -> Tenant:
    return Tenant(name=name, digest=key_digest(key))


def test_a_key_without_limits_of_its_own_has_the_default_ones() -> None:
    assert tenant().terms(DEFAULT) == Terms(name="a", max_concurrency=3)
    own = Tenant(name="a", digest=b"", priority=-2, weight=0.5, limits=KeyLimits(
        tokens_per_minute=9))  # fmt: skip
    assert own.terms(DEFAULT) == Terms(name="a", priority=-2, weight=0.5, tokens_per_minute=9)


def test_salts_differ_between_tenants_and_between_a_tenants_own_users() -> None:
    tenants = [ANYONE, tenant("a"), tenant("b"), tenant("a.b")]
    owns = [None, "x", "y", "a", "b", "\0a", "a\0", "b\0x", "\u00e9", "x" * 16384]
    salts = [one.cache_salt(own) for one in tenants for own in owns]
    assert len(set(salts)) == len(salts)
    assert all(len(salt) == 32 for salt in salts)
    assert tenant("a").cache_salt("x") == tenant("a").cache_salt("x")


def test_a_tenant_keeps_its_salt_when_its_key_is_replaced() -> None:
    assert tenant(key="sk-a").cache_salt() == tenant(key="sk-new").cache_salt()


def test_no_salt_tells_anything_of_a_key() -> None:
    one = tenant(key="sk-secret")
    assert one.cache_salt() not in one.digest.hex()
    assert one.digest.hex()[:8] not in one.cache_salt()


@pytest.mark.parametrize(
    ("models", "name", "may"),
    [(None, "m", True), (("m",), "m", True), (("m",), "M", False), (("m",), "", False)],
)
def test_a_key_may_use_the_models_that_it_names_or_all(
    models: tuple[str, ...] | None, name: str, may: bool
) -> None:
    allowed = None if models is None else frozenset(models)
    assert Tenant(name="a", digest=b"", models=allowed).may_use(name) is may


def test_tenants_are_what_the_configuration_says(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "keys: [{name: a, key: sk-a, priority: 3, weight: 2, models: [m]}]"
    monkeypatch.setenv("SOME_KEYS", text)
    (read,) = read_tenants(KeysSection(variable="SOME_KEYS"))
    (key,) = parse_keys(text.encode())
    assert read == Tenant(name="a", digest=key.digest, priority=3, weight=2.0,
                          models=frozenset("m"))  # fmt: skip


def test_no_repr_of_a_tenant_shows_its_key_or_digest() -> None:
    one = pickle.loads(pickle.dumps(tenant(key="sk-secret")))
    assert one == tenant(key="sk-secret")
    assert "sk-secret" not in repr(one)
    assert "digest" not in repr(one)
