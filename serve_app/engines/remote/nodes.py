"""vLLM over several nodes: what each node's process is told, so that they find each other.

vLLM 0.32 has two ways. Its Ray executor wants a Ray of the same version in the engine's own
environment, bundles of one GPU each, and to place its ranks itself. Its own processes (`mp`) want
to be started on every node, with the number of nodes, which one this is, and the address of the
first: that is this way. The first node's process is the engine; on each other one a process without
an engine starts that node's ranks (`worker/vllm_node.py`), which wait for the first.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, replace

from serve_app.engines.remote.launch import Launch, Plan

#: Backend of the worker on the first node -> on every other one.
_OF_OTHER_NODES = {"vllm": "vllm_node"}


@dataclass(frozen=True, slots=True)
class Nodes:
    """Where the ranks of one engine are: on `count` nodes, as many on each. `address` and `port`
    are the first one's, where all meet."""

    count: int
    address: str
    port: int


def here(count: int, address: str) -> Nodes:
    """Nodes of which this is the first: `address` is its own, the port one that is free now."""
    with socket.socket() as free:
        free.bind((address, 0))
        return Nodes(count, address, free.getsockname()[1])


def plan_over_nodes(plan: Plan, nodes: Nodes, rank: int) -> Plan:
    """The plan of one node's process, the first one's with rank 0. There is no second try with less
    memory: all nodes would have to take it at once."""
    arguments = dict(plan.arguments) | {
        "distributed_executor_backend": "mp",
        "nnodes": nodes.count,
        "node_rank": rank,
        "master_addr": nodes.address,
        "master_port": nodes.port,
    }
    return replace(plan, arguments=arguments, less_memory=None)


def launch_on_node(launch: Launch, address: str, *, first: bool) -> Launch:
    """How a node's process is started; `address` is its node's, which it tells the others."""
    env = dict(launch.env) | {"VLLM_HOST_IP": address}
    backend = launch.backend if first else _OF_OTHER_NODES.get(launch.backend, launch.backend)
    return replace(launch, env=env, backend=backend)
