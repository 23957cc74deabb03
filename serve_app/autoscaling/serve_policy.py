"""The autoscaling policy as Serve calls it, and what a deployment says to get it.

Serve makes one `ServePolicy` per deployment in its controller and calls it on the controller's
event loop, about ten times a second. It must not block there, and must not raise: either would
touch every application of the cluster. Serve pickles this module by value; what keeps something
between calls is therefore in modules of its own (figures.py, announcer.py).
"""

from __future__ import annotations

import logging
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from serve_app.autoscaling.announcer import Announcer
from serve_app.autoscaling.figures import FiguresReader, OwnerFetch, signals_of
from serve_app.autoscaling.policy import LatencyPolicy
from serve_app.autoscaling.signals import State
from serve_app.autoscaling_settings import AutoscalingSection

#: Where Serve finds the class.
POLICY = "serve_app.autoscaling.serve_policy:ServePolicy"
#: The key of ours in the policy state, in which Serve keeps keys of its own.
_STATE = "intserve"


def autoscaling_options(
    pool: str, section: AutoscalingSection, *, initial_replicas: int, places: int
) -> dict[str, Any]:
    """Options of a pool's deployment, in place of `num_replicas`. `places` are the sequences that
    one replica holds at a time; the pool starts with `initial_replicas`, within its bounds.

    What Serve would do to a policy's answer is set to nothing: factors of one and no delays. Only
    its bounds remain, which are the policy's own.
    """
    initial = max(section.min_replicas, min(section.max_replicas, initial_replicas))
    policy = AutoscalingPolicy(
        policy_function=POLICY,
        policy_kwargs={"pool": pool, "settings": section.model_dump(mode="json"), "places": places},
    )
    config = AutoscalingConfig(
        min_replicas=section.min_replicas,
        initial_replicas=initial,
        max_replicas=section.max_replicas,
        # Only shown in Serve's own metrics: our policy does not look at it.
        target_ongoing_requests=float(places),
        upscaling_factor=1.0,
        downscaling_factor=1.0,
        upscale_delay_s=0.0,
        downscale_delay_s=0.0,
        downscale_to_zero_delay_s=0.0,
        policy=policy,
    )
    return {"autoscaling_config": config}


class ServePolicy:
    """Implements Serve's interface of a class policy: made with JSON, called with a context."""

    def __init__(
        self,
        pool: str,
        settings: dict[str, Any],
        places: int | None = None,
        reader: FiguresReader | None = None,
        announcer: Announcer | None = None,
    ) -> None:
        self._pool = pool
        self._places = places
        self._policy = LatencyPolicy(AutoscalingSection.model_validate(settings))
        self._reader = reader
        self._announcer = announcer
        self._failed = False

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The replicas that there should be, and the state that Serve brings to the next call."""
        try:
            return self._decide(ctx)
        # Serve's controller must go on, whatever happens here, and so must the pool as it is.
        except Exception:
            if not self._failed:
                log = logging.getLogger("ray.serve")
                log.exception("autoscaling of %s failed; it holds what it has", self._pool)
            self._failed = True
            return ctx.target_num_replicas, dict(ctx.policy_state or {})

    def _decide(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        app_name = ctx.app_name or ""
        if self._reader is None:
            self._reader = FiguresReader(OwnerFetch(app_name, self._pool))
        if self._announcer is None:
            self._announcer = Announcer(app_name, self._pool)
        signals = signals_of(
            self._reader.latest(),
            now_s=ctx.current_time,
            running=ctx.current_num_replicas,
            target=ctx.target_num_replicas,
            places=self._places,
        )
        state = State.from_json((ctx.policy_state or {}).get(_STATE))
        decision, state = self._policy.decide(signals, state)
        self._announcer.announce(signals, decision)
        self._failed = False
        return decision.desired, {_STATE: state.to_json()}
