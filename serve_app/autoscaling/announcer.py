"""Says what the autoscaling policy decides: a line in the log for each change of mind, and metrics
that Ray collects on each node."""

from __future__ import annotations

import importlib
import logging
from typing import Any

from serve_app.autoscaling.signals import Decision, Signals

log = logging.getLogger("ray.serve")

#: name -> (labels, help); Ray puts `ray_` before each. One value per pool.
GAUGES: dict[str, str] = {
    "intserve_autoscaling_desired_replicas": "Engine replicas that the policy wants.",
    "intserve_autoscaling_ready_replicas": "Engine replicas that are loaded.",
    "intserve_autoscaling_load": "The averaged load that is compared with the thresholds.",
    "intserve_autoscaling_demand_replicas": "Replicas that the use of KV and places asks for.",
    "intserve_autoscaling_blind": "1 while the policy has no figures and holds.",
}
MOVES = "intserve_autoscaling_moves_total"
MOVES_HELP = "Changes of the desired number, by what caused them and their direction."


class Announcer:
    """Says the decisions of one pool. `metrics` is a module with `Gauge` and `Counter` as
    `ray.util.metrics` has them; None: that one."""

    def __init__(self, app_name: str, pool: str, metrics: Any = None) -> None:
        if metrics is None:
            metrics = importlib.import_module("ray.util.metrics")
        self._where = f"{app_name}/{pool}" if app_name else pool
        self._tags = {"application": app_name, "pool": pool}
        labels = tuple(self._tags)
        self._gauges = {
            name: metrics.Gauge(name, description=text, tag_keys=labels)
            for name, text in GAUGES.items()
        }
        self._moves = metrics.Counter(
            MOVES, description=MOVES_HELP, tag_keys=(*labels, "cause", "direction")
        )
        self._said: tuple[int, bool] | None = None
        self._shown: dict[str, float] = {}

    def announce(self, signals: Signals, decision: Decision) -> None:
        """Say the decision, where it differs from the last one."""
        blind = decision.cause == "blind"
        values = {
            "intserve_autoscaling_desired_replicas": float(decision.desired),
            "intserve_autoscaling_ready_replicas": float(signals.ready),
            "intserve_autoscaling_blind": float(blind),
        }
        if decision.load is not None:
            values["intserve_autoscaling_load"] = round(decision.load, 2)
        if decision.demand is not None:
            values["intserve_autoscaling_demand_replicas"] = round(decision.demand, 2)
        for name, value in values.items():
            if self._shown.get(name) != value:
                self._gauges[name].set(value, tags=self._tags)
        self._shown |= values
        if self._said == (decision.desired, blind):
            return
        moved = decision.desired - signals.provisioned
        if moved and (self._said is None or self._said[0] != decision.desired):
            direction = "up" if moved > 0 else "down"
            tags = {**self._tags, "cause": decision.cause, "direction": direction}
            self._moves.inc(tags=tags)
        log.info("autoscaling of %s %s", self._where, decision.reason)
        self._said = (decision.desired, blind)
