"""The engine replicas that Serve still routes to, as the request router of this process knows them.

Serve has no public sign that a replica drains: it only stops routing to it. The router (router.py)
writes its replicas down here; an ingress that still hears the heartbeats of another one tells the
owner of admission to place nothing there. A module of its own, because Serve pickles the router's
module by value, and with it the router's globals: what this module holds is one for the process.
"""

from __future__ import annotations

from collections.abc import Callable

_ids: dict[str, frozenset[str]] = {}
_listeners: list[Callable[[], object]] = []


#: The name of the deployment that speaks HTTP.
INGRESS = "ingress"


def engine_deployment(pool: str) -> str:
    """The name of the deployment of a pool's engine replicas."""
    return f"engine-{pool}"


def note_candidates(deployment: str, replica_ids: frozenset[str]) -> None:
    """Serve routes to these replicas of the deployment, and to no others. Thread-safe."""
    changed = _ids.get(deployment) != replica_ids
    _ids[deployment] = replica_ids
    if changed:
        for listener in tuple(_listeners):
            listener()


def on_change(listener: Callable[[], object]) -> Callable[[], None]:
    """Call `listener` whenever a deployment gets other replicas, in the thread that notes them.
    Returns what ends that."""
    _listeners.append(listener)
    return lambda: _listeners.remove(listener)


def candidates(deployment: str) -> frozenset[str] | None:
    """The ids that were noted last; None while no router has been at work."""
    return _ids.get(deployment)
