"""The interface between the driver and a pool of workers.

`pool.py` implements it on Ray, `in_process.py` in the driver's process. This file imports neither,
so that a job without Ray does not load it.

A call names a worker's method as Ray does, `lambda worker, index: worker.attend.remote(...)`, and
returns a *reference*, to pass to other calls or to `gather`. A call with
`.options(num_returns=2).remote(...)` returns one reference per element of the answer, so that each
can go to a different worker.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol


class WorkersLost(Exception):
    """Workers or their nodes died; `Workers.recover` determines which."""


class Workers(Protocol):
    """The workers of one job. `len` and all indices count active workers; `size` is the number
    requested."""

    @property
    def size(self) -> int: ...

    @property
    def slots(self) -> list[int]:
        """Maps worker index to slot. Indices change as workers die and join; a worker's slot does
        not, and its replacement takes the same one."""
        ...

    @property
    def nodes(self) -> list[int]:
        """Maps worker index to node, numbered from 0."""
        ...

    def __len__(self) -> int: ...

    def describe(self) -> str:
        """The workers in a few words, for a progress line."""
        ...

    def submit(
        self, call: Callable[[Any, int], Any], indices: Sequence[int] | None = None
    ) -> list[Any]:
        """Make `call(worker, index)` on each worker, or on those of `indices`. Returns its
        references, in that order."""
        ...

    def each(
        self, call: Callable[[Any, int], Any], indices: Sequence[int] | None = None
    ) -> list[Any]:
        """`submit`, and wait for the results.

        Raises:
            WorkersLost: a worker died; raised after all others have answered.
            IntServeError: a worker raised it for a mistake of the user's.
        """
        ...

    def gather(self, references: Sequence[Any]) -> list[Any]:
        """Wait for the results behind references; raises as `each`."""
        ...

    def share(self, value: Any) -> Any:
        """A reference to pass to several workers in place of a large argument."""
        ...

    def admit(self) -> bool:
        """Activate workers that have become ready; returns whether the active set has changed."""
        ...

    def recover(self) -> list[int]:
        """After `WorkersLost`: replace the dead, or continue without them. Returns their slots."""
        ...
