"""How long a request waits, from textbook formulas.

A fleet of replicas that run B requests each is taken as one queue before c B servers with
exponential service times (M/M/m, Erlang 1917): `slot_wait`. Prompts of one length that arrive at a
replica at random are a queue before one server with a constant service time (M/D/1, Pollaczek and
Khinchine), whose waiting time has a tail close to an exponential one (Kingman 1961):
`prefill_wait`. Formulas as in Kleinrock, Queueing Systems I (1975), sections 3.5 and 5.7.
"""

from __future__ import annotations

import math


def erlang_c(servers: int, load: float) -> float:
    """The probability that all of `servers` are busy when a request arrives, at a load of `load`
    busy servers on average; 1 when the load is not less than the servers."""
    if load >= servers:
        return 1.0
    blocked = 1.0  # Erlang B of 0, 1, 2, ... servers
    for number in range(1, servers + 1):
        blocked = load * blocked / (number + load * blocked)
        if blocked < 1e-300:
            return 0.0
    return blocked / (1.0 - load / servers * (1.0 - blocked))


def slot_wait(servers: int, load: float, service_s: float, percentile: float) -> float:
    """Seconds that a request waits at most for a free server, in `percentile` of cases (0 to 1);
    infinite when the load is not less than the servers."""
    if load >= servers:
        return math.inf
    busy = erlang_c(servers, load)
    if busy <= 1.0 - percentile:
        return 0.0
    return service_s / (servers - load) * math.log(busy / (1.0 - percentile))


def prefill_wait(utilization: float, prefill_s: float, percentile: float) -> float:
    """Seconds that a prompt waits at most for those before it, in `percentile` of cases, when a
    replica computes prompts during `utilization` of the time and one takes `prefill_s`: who waits
    does so prefill_s / (2 (1 - utilization)) on average."""
    if utilization >= 1.0:
        return math.inf
    if utilization <= 1.0 - percentile:
        return 0.0
    mean = prefill_s / (2.0 * (1.0 - utilization))
    return mean * math.log(utilization / (1.0 - percentile))
