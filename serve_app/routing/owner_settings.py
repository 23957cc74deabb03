"""What ingresses tell an owner of admission: how to queue, how to choose, how much fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from serve_app.config import ServeConfig
from serve_app.sections import AdmissionSection, Live, RoutingSection
from serve_app.setting_types import POOL


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnerSettings:
    """`places` are the sequences that one replica holds at a time, by pool. A pool of
    `wakes_up` may have no replica and starts one when somebody asks: its requests are held until
    it is there, or refused at once where it is in `refuses` too."""

    admission: AdmissionSection = field(default_factory=AdmissionSection)
    routing: RoutingSection = field(default_factory=RoutingSection)
    places: Mapping[str, int] = field(default_factory=lambda: {POOL: 64})
    wakes_up: frozenset[str] = frozenset()
    refuses: frozenset[str] = frozenset()

    @classmethod
    def of(cls, config: ServeConfig, live: Live) -> OwnerSettings:
        """Those of a configuration, with the sections that hold now."""
        from_zero = {
            name: pool.autoscaling.from_zero
            for name, pool in config.pools.items()
            if pool.autoscaling is not None and not pool.autoscaling.min_replicas
        }
        return cls(
            admission=live.admission,
            routing=live.routing,
            places=config.places,
            wakes_up=frozenset(from_zero),
            refuses=frozenset(name for name, what in from_zero.items() if what == "refuse"),
        )
