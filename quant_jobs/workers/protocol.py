"""What the driver needs of its workers, wherever they are: `pool.py` has them on Ray, `here.py` one
in the driver's own process. Knows neither, so that a job without Ray imports none of it.

A call names a worker's method as Ray does, `lambda worker, index: worker.attend.remote(...)`. What
it returns is a *reference*, to be passed on to other calls or to `gather`; or several, for the
parts of an answer that go different ways, from `worker.attend.options(num_returns=2).remote(...)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol


class WorkersLost(Exception):
    """Some workers died, or their nodes did; `Workers.recover` finds out which."""


class Workers(Protocol):
    """The workers of one job. `len` and every index count those that are at work now, `size` those
    that were asked for."""

    @property
    def size(self) -> int: ...

    @property
    def slots(self) -> list[int]:
        """Who is at work: by index, a number that stays with its worker."""
        ...

    @property
    def nodes(self) -> list[int]:
        """By index, the node that a worker is on, numbered from 0."""
        ...

    def __len__(self) -> int: ...

    def describe(self) -> str:
        """Who they are, for a line of progress."""
        ...

    def submit(
        self, call: Callable[[Any, int], Any], indices: Sequence[int] | None = None
    ) -> list[Any]:
        """`call(worker, index)` on each worker, or on those of `indices`: references, in that
        order."""
        ...

    def each(
        self, call: Callable[[Any, int], Any], indices: Sequence[int] | None = None
    ) -> list[Any]:
        """`submit`, and the results themselves.

        Raises:
            WorkersLost: after all others have answered, so that nobody is still at work.
            IntServeError: what a worker raised as the user's mistake.
        """
        ...

    def gather(self, references: Sequence[Any]) -> list[Any]:
        """The results that references stand for; raises as `each`."""
        ...

    def share(self, value: Any) -> Any:
        """A reference to pass to several workers in place of a large argument."""
        ...

    def admit(self) -> bool:
        """Take in workers that have become ready since; whether who is at work has changed."""
        ...

    def recover(self) -> list[int]:
        """After `WorkersLost`: replace the dead, or go on without them; the places of the dead."""
        ...
