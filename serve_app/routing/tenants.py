"""Whose the API keys are: a name, a priority and weight, limits, and the models that it may ask.

key_forms.py reads them from the configuration, a file or an environment variable; keys.py finds the
tenant of a request, and key_watch.py puts new ones in their place. Its terms go to the owner of
admission.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields

from serve_app.key_forms import NamedKey, read_keys
from serve_app.routing.tickets import Terms
from serve_app.sections import KeyLimits, KeysSection


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant(NamedKey):
    """One API key, as requests meet it."""

    def terms(self, default: KeyLimits) -> Terms:
        """What the owner of admission needs of it."""
        return Terms(
            name=self.name,
            priority=self.priority,
            weight=self.weight,
            **(self.limits or default).model_dump(),
        )

    def may_use(self, model: str) -> bool:
        return self.models is None or model in self.models

    def cache_salt(self, own: str | None = None) -> str:
        """The salt of this tenant's requests: no two tenants share one, so that nobody learns from
        timing what another has asked. `own` is a client's, by which it separates its own users. A
        tenant that gets another key under its name keeps its salt."""
        # The name has no NUL, so that no choice of `own` makes another tenant's salt.
        mixed = f"intserve-salt\0{self.name}\0{own or ''}"
        return hashlib.sha256(mixed.encode()).hexdigest()[:32]


#: Who asks where no key is configured.
ANYONE = Tenant(name="anyone", digest=b"")


def read_tenants(section: KeysSection, content: bytes | None = None) -> tuple[Tenant, ...]:
    """The tenants of all configured keys. Reads the file, unless `content` is what it holds.

    Raises:
        ConfigError: see `read_keys`.
    """
    names = [item.name for item in fields(NamedKey)]
    keys = read_keys(section, content)
    return tuple(Tenant(**{name: getattr(key, name) for name in names}) for key in keys)
