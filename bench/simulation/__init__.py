"""A discrete-event simulator of a pool of engine replicas, which appear after minutes of loading.

It runs the policy of `serve_app/autoscaling` itself, beside others (`policies.py`).
`bench/fleet_simulation.py` is the command.
"""
