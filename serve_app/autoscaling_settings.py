"""The `autoscaling` section of a pool: how many engine replicas it may have, and what moves them.

It stands beside the rooms, and not in `serve_app/autoscaling`, because the models of the
configuration (sections.py), on which every room stands, are made of it.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from serve_app.setting_types import Count, CountOrZero, Seconds, Section

#: A part of something, such as of the KV tokens of all replicas.
Share = Annotated[float, Field(gt=0.0, le=1.0)]


class AutoscalingSection(Section):
    """How the number of a pool's engine replicas follows its load."""

    min_replicas: CountOrZero = Field(
        default=1, description="replicas that are always there; 0: none while nobody asks"
    )
    max_replicas: Count = Field(description="replicas beyond which the pool never grows")
    from_zero: Literal["hold", "refuse"] = Field(
        default="hold",
        description="what happens to a request that finds no replica: `hold` it until one is "
        "loaded, or `refuse` it with a 503 and Retry-After; either starts one",
    )
    target_ttft_s: Seconds | None = Field(
        default=2.0,
        description="seconds to the first token that nine of ten requests shall have, waiting "
        "included; null: it moves nothing",
    )
    target_itl_s: Seconds | None = Field(
        default=0.05,
        description="seconds between two tokens that nine of ten requests shall have; null: it "
        "moves nothing",
    )
    target_kv_share: Share | None = Field(
        default=0.8,
        description="share of the KV tokens of all replicas that may be in use; null: it moves "
        "nothing",
    )
    target_places_share: Share | None = Field(
        default=0.8,
        description="share of the places (`max_ongoing_requests` of each replica) that may be "
        "taken, waiting requests counted as if they had one; null: it moves nothing",
    )
    target_wait_s: Seconds | None = Field(
        default=None,
        description="seconds that the request which has waited longest may have waited; null: "
        "`target_ttft_s`",
    )
    scale_up_at: float = Field(
        default=0.55,
        gt=0.0,
        le=2.0,
        description="load above which the pool grows: the worst latency divided by its target, "
        "or the share of KV or places in use, by which its target alone is this load",
    )
    scale_down_at: float = Field(
        default=0.40, gt=0.0, le=2.0, description="load below which it shrinks by one"
    )
    window_s: Seconds = Field(default=45.0, description="seconds over which the load is averaged")
    max_growth: float = Field(
        default=1.0,
        gt=0.0,
        le=100.0,
        description="how much of what it has the pool may grow by within `up_period_s`: 1 doubles "
        "it; one replica is always allowed",
    )
    up_period_s: Seconds = Field(default=60.0, description="seconds for which `max_growth` holds")
    down_period_s: Seconds = Field(
        default=120.0, description="seconds between two steps down, each of one replica"
    )
    warmup_trust: float = Field(
        default=0.5,
        ge=0.0,
        le=1.0,
        description="how much of the load's excess over `scale_up_at` counts while replicas load, "
        "and for one window afterwards: they were started because of it",
    )
    own_latency_below: float = Field(
        default=0.2,
        ge=0.0,
        le=1.0,
        description="share of KV and places in use below which, with nobody waiting, a latency is "
        "learned as the engine's own: more replicas would not lower it, so it starts none",
    )
    idle_s: Seconds = Field(
        default=600.0,
        description="seconds without any request after which the last replica goes, where "
        "`min_replicas` is 0",
    )

    @model_validator(mode="after")
    def _check(self) -> AutoscalingSection:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas {self.max_replicas} is less than min_replicas {self.min_replicas}; "
                "raise it"
            )
        if self.scale_down_at >= self.scale_up_at:
            raise ValueError(
                f"scale_down_at {self.scale_down_at} is not below scale_up_at {self.scale_up_at}, "
                "so the pool would never rest; lower it"
            )
        targets = (self.target_ttft_s, self.target_itl_s, self.target_kv_share)
        if all(t is None for t in (*targets, self.target_places_share, self.target_wait_s)):
            raise ValueError("every target is null, so nothing would move the pool; set one")
        return self
