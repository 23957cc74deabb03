"""The command of `bench/fleet_simulation.py`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from serve_app.autoscaling_settings import AutoscalingSection

from .arrivals import arrivals, traces
from .engine import Request
from .fleet import Fleet, FleetModel, Run
from .policies import Fixed, Oracle, Ours, Scaler, ServeDefault
from .report import HEAD, Result, Slo, as_json, plot, result

SCALERS = ("IntServe", "Serve default", "fixed", "oracle")


def scaler(
    name: str,
    model: FleetModel,
    nodes: int,
    requests: Sequence[Request],
    horizon_s: float,
    slo: Slo,
) -> Scaler:
    """The named scaler for a cluster of so many nodes. One node may go to zero; a larger cluster
    keeps at least one replica in sixteen. All but the fixed fleet begin with a quarter."""
    least, start = nodes // 16 or (0 if nodes == 1 else 1), max(1, nodes // 4)
    if name == "IntServe":
        section = AutoscalingSection(
            min_replicas=least,
            max_replicas=nodes,
            target_ttft_s=slo.ttft_s,
            target_itl_s=slo.itl_s,
        )
        return Ours(section, start)
    if name == "Serve default":
        ongoing = 0.8 * model.engine.places
        return ServeDefault(
            minimum=least, maximum=nodes, start=start, target_ongoing_requests=ongoing
        )
    if name == "fixed":
        return Fixed(nodes)
    return Oracle(
        requests,
        model.engine,
        minimum=least,
        maximum=nodes,
        load_s=1.1 * model.load_s,
        horizon_s=horizon_s,
    )


def simulate(
    trace_name: str, nodes: int, name: str, model: FleetModel, hours: float, seed: int, slo: Slo
) -> tuple[Result, Run]:
    """One run: its figures, and what happened in it."""
    trace = next(t for t in traces(hours) if t.name == trace_name)
    horizon_s = hours * 3600.0
    requests = list(arrivals(trace, model.engine, nodes, horizon_s, seed))
    decides = scaler(name, model, nodes, requests, horizon_s, slo)
    run = Fleet(model, decides, seed).run(requests, horizon_s)
    return result(trace_name, nodes, name, run, slo), run


def main(arguments: Sequence[str] | None = None) -> int:
    names = [trace.name for trace in traces(1.0)]
    parser = argparse.ArgumentParser(description="Autoscaling policies in a simulated fleet.")
    parser.add_argument("--traces", nargs="+", choices=names, default=names)
    parser.add_argument("--nodes", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--policies", nargs="+", choices=SCALERS, default=list(SCALERS))
    parser.add_argument("--hours", type=float, default=2.0, help="of simulated time; a day's wave")
    parser.add_argument("--load", type=float, default=180.0, help="seconds to load a replica")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", type=Path, help="where to write a picture of the fleets")
    given = parser.parse_args(arguments)
    slo = Slo()
    runs: dict[tuple[str, int, str], Run] = {}
    rows: list[Result] = []
    if not given.json:
        print(HEAD, flush=True)
    for nodes in given.nodes:
        model = FleetModel(load_s=given.load, max_queued=max(128, 8 * nodes))
        for trace_name in given.traces:
            for name in given.policies:
                row, run = simulate(trace_name, nodes, name, model, given.hours, given.seed, slo)
                rows.append(row)
                if given.plot:
                    runs[trace_name, nodes, name] = run
                    run.served.clear()  # of millions of requests the picture needs none
                if not given.json:
                    print(row.row(), flush=True)
    if given.json:
        json.dump(as_json(rows), sys.stdout, indent=1)
    if given.plot:
        plot(runs, given.hours * 3600.0, given.plot)
    return 0
