"""The admission of one ingress: what its requests ask of the owner, and what the owner answers.

`Admission` is what openai/service.py and fleet.py call; `OpenAdmission` lets everybody in at once.
"""

from __future__ import annotations

from typing import Protocol

from serve_app.routing.tickets import Enter, Leave, Move


class Admission(Protocol):
    """Decides who gets a place. Methods are called on the ingress's event loop."""

    async def enter(self, visit: Enter) -> None:
        """Bring the sequences of a request into the queue, all or none. Returns once they wait or
        have places. Every sequence that has entered must `leave`.

        Raises:
            Overloaded: there is no room, or a limit of the key is reached.
            EngineUnavailable: nobody decides at present.
        """
        ...

    async def place(self, sequence_id: str) -> str | None:
        """Wait for the sequence's place: the replica's id, None where any will do.

        Raises:
            Overloaded: it has waited too long, or had to give way.
            DeadlineExceeded: its deadline has passed.
            EngineUnavailable: nobody decides at present.
        """
        ...

    async def move(self, move: Move) -> str | None:
        """Another place for a sequence whose replica is lost; errors as for `place`."""
        ...

    def landed(self, sequence_id: str, replica_id: str) -> None:
        """The sequence runs on this replica, whichever was granted."""
        ...

    def leave(self, leave: Leave) -> None:
        """The sequence has ended. Idempotent; unknown ids are ignored."""
        ...


class OpenAdmission:
    """Implements `Admission` without limits: for an engine in this process, and for tests."""

    async def enter(self, visit: Enter) -> None:
        return None

    async def place(self, sequence_id: str) -> str | None:
        return None

    async def move(self, move: Move) -> str | None:
        return None

    def landed(self, sequence_id: str, replica_id: str) -> None:
        return None

    def leave(self, leave: Leave) -> None:
        return None
