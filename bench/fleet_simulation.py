"""Autoscaling policies in a simulated fleet: goodput under the SLO, GPU hours, turns.

    python bench/fleet_simulation.py [--nodes 1 16 64] [--hours 2] [--load 180] [--seed 0]
        [--traces poisson diurnal burst gaps reading heavy-tailed] [--plot fleet.png] [--json]

The policy of `serve_app/autoscaling` itself decides, beside Serve's default policy, a fixed fleet
and an oracle, over the same requests. No Ray, no GPU and no clock: a run is the same each time, on
any machine. `bench/simulation` is the simulator.
"""

from __future__ import annotations

from simulation.command import main

if __name__ == "__main__":
    raise SystemExit(main())
