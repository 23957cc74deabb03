"""A job in this process, without Ray: one worker, spoken to as the pool of `pool.py`.

    with InProcessWorker() as worker:
        Driver(job, folder, worker, progress).run()

The same calls in the same order give the same bytes as any pool's. A call is done when it returns,
and its result is its own reference. What runs beside the others on Ray runs beside them here too:
the worker reads ahead in a thread of its own, and what writes files goes to one more (hashing and
writing let go of Python's lock), with a future as its reference.

What a worker on a GPU returns comes to host memory, as through Ray's object store.

The worker computes on one thread and with deterministic algorithms, which torch knows only for a
whole process; closing puts back what was before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import torch

from quant_jobs.workers.messages import to_device
from quant_jobs.workers.worker import Worker

#: Calls of a worker that run beside the others, one after the other; on Ray, by `actor.py`.
BACKGROUND = frozenset({"write", "store"})

_HOST = torch.device("cpu")


class InProcessWorker:
    """A pool (`workers.Workers`) of one worker in this process. Nobody can be lost: it dies with
    its driver."""

    size = 1

    def __init__(self) -> None:
        self._before = (
            torch.get_num_threads(),
            torch.get_deterministic_debug_mode(),
            torch.get_float32_matmul_precision(),
        )
        self._worker = Worker()
        self._background = ThreadPoolExecutor(1, thread_name_prefix="background")

    def __enter__(self) -> InProcessWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads, what they have begun apart, and give torch's settings back."""
        self._background.shutdown(cancel_futures=True)
        self._worker.close()
        num_threads, deterministic, precision = self._before
        torch.set_num_threads(num_threads)
        torch.set_deterministic_debug_mode(deterministic)
        torch.set_float32_matmul_precision(precision)

    def __len__(self) -> int:
        return 1

    @property
    def slots(self) -> list[int]:
        return [0]

    @property
    def nodes(self) -> list[int]:
        return [0]

    def describe(self) -> str:
        return "one worker in this process"

    def submit(
        self, call: Callable[[Any, int], Any], indices: Sequence[int] | None = None
    ) -> list[Any]:
        assert indices is None or set(indices) <= {0}, "there is one worker"
        return [call(self, 0)] if indices is None or indices else []

    def each(
        self, call: Callable[[Any, int], Any], indices: Sequence[int] | None = None
    ) -> list[Any]:
        return self.gather(self.submit(call, indices))

    def gather(self, references: Sequence[Any]) -> list[Any]:
        return [_result(reference) for reference in references]

    def share(self, value: Any) -> Any:
        return value

    def admit(self) -> bool:
        return False

    def recover(self) -> list[int]:
        raise AssertionError("a worker in this process dies with its driver")

    def __getattr__(self, name: str) -> Any:
        """A method of the worker, called as an actor's; a future where it runs beside the rest."""
        method = self.method(name)

        def remote(*arguments: Any) -> Any:
            given = [_result(argument) for argument in arguments]
            if name in BACKGROUND:
                return self._background.submit(method, *given)
            return to_device(method(*given), _HOST)

        def only(*arguments: Any) -> Any:
            (found,) = remote(*arguments)
            return found

        def options(num_returns: int) -> SimpleNamespace:
            return SimpleNamespace(remote=only if num_returns == 1 else remote)

        return SimpleNamespace(remote=remote, options=options)

    def method(self, name: str) -> Callable[..., Any]:
        """What a call of that name runs, in whatever thread; benches time it."""
        found: Callable[..., Any] = getattr(self._worker, name)
        return found


def _result(reference: Any) -> Any:
    return reference.result() if isinstance(reference, Future) else reference
