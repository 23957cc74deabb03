"""Whose the API keys are: a name, a priority and weight, limits, and the models that it may ask.

`read_tenants` reads them from the configuration, a file or an environment variable (key_file.py has
the forms). keys.py finds the tenant of a request; its terms go to the owner of admission.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from pydantic import SecretStr

from serve_app.key_file import read_key_file
from serve_app.routing.tickets import Terms
from serve_app.sections import KeyLimits, KeysSection


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """One API key. `digest` is the key's SHA-256: the key itself is not kept. `limits` None takes
    the configured default; `models` None is every model."""

    name: str
    digest: bytes
    priority: int = 0
    weight: float = 1.0
    limits: KeyLimits | None = None
    models: frozenset[str] | None = None

    def terms(self, default: KeyLimits) -> Terms:
        """What the owner of admission needs of it."""
        return Terms(
            name=self.name,
            priority=self.priority,
            weight=self.weight,
            **(self.limits or default).model_dump(),
        )

    @property
    def cache_salt(self) -> str:
        """Differs between tenants, so that no one learns from timing what another has asked."""
        return hashlib.sha256(b"intserve-salt:" + self.digest).hexdigest()[:16]


#: Who asks where no key is configured.
ANYONE = Tenant(name="anyone", digest=b"")


def key_digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def read_tenants(section: KeysSection) -> tuple[Tenant, ...]:
    """The tenants of all configured keys. Reads the file.

    Raises:
        ConfigError: the file cannot be used; says why.
    """
    keys = section.inline
    if section.file is not None:
        keys += read_key_file(section.file)
    return tuple(map(_unnamed, keys))


def _unnamed(key: SecretStr) -> Tenant:
    digest = key_digest(key.get_secret_value())
    return Tenant(name=f"key-{digest.hex()[:8]}", digest=digest)
