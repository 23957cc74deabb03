"""Which engine replica a request goes to: the one that admission chose, if Serve still has it.

`ByTicket` is the request router of the engine deployment; it runs in the ingress, inside the
deployment handle. The named replica comes first, then all others but those to avoid, then the
avoided ones: a request never waits for a replica that is gone. Serve's own count per replica stays
below all of it as a safety net, set so high (app.py) that the owner of admission decides.

Serve pickles this module by value, so that classes and globals of it are not those of the process:
nothing else may stand here, and requests are told apart by their attributes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from serve_app.routing.candidates import note_candidates


class ByTicket(RequestRouter):  # type: ignore[misc]
    """Routes by `GenerateRequest.replica_id` and `avoid`; other calls go to any replica."""

    _deployment = ""

    def initialize_state(self, *, deployment: str) -> None:
        """`deployment` is the name under which candidates.py has the replicas."""
        self._deployment = deployment

    def update_replicas(self, replicas: Sequence[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._note()

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._note()

    def _note(self) -> None:
        note_candidates(
            self._deployment, frozenset(known.unique_id for known in self.curr_replicas)
        )

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return [candidate_replicas]
        # Without it Serve asks again at once, for ever, when every replica is full or gone, and
        # nothing else of this process runs meanwhile.
        pending_request.routing_context.should_backoff = True
        request: Any = pending_request.args[0] if pending_request.args else None
        named = getattr(request, "replica_id", None)
        avoid = getattr(request, "avoid", ())
        ranks: tuple[list[RunningReplica], ...] = ([], [], [])
        for replica in candidate_replicas:
            known = replica.replica_id.unique_id
            ranks[0 if known == named else 2 if known in avoid else 1].append(replica)
        return [rank for rank in ranks if rank]
