"""A pool of one worker in this process, without Ray; implements `protocol.Workers`.

    with InProcessWorker() as worker:
        Driver(job, folder, worker, progress).run()

The same calls in the same order give the same bytes as on any pool. A call runs when it is made,
and its result is its own reference. As on Ray, reading ahead and writing files run beside the other
calls: the worker reads ahead in its own thread, and files are written in a second one (hashing and
writing release the GIL), with a future as the reference.

Results of a worker on a GPU are copied to host memory, as Ray's object store does.

The worker computes on one thread with deterministic algorithms. torch has these settings per
process only; `close` restores them. Used by `quantize.py` for `--workers 0`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import torch

from quant_jobs.workers.messages import to_device
from quant_jobs.workers.worker import Worker

#: Calls that run in the background, one after the other; on Ray, see `actor.py`.
BACKGROUND = frozenset({"write", "store"})

_HOST = torch.device("cpu")


class InProcessWorker:
    """A pool (`protocol.Workers`) of one worker in this process, which dies only with its driver.
    `close` ends its threads."""

    size = 1

    def __init__(self) -> None:
        self._torch_settings = (
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
        """Stop both threads, dropping calls that have not begun, and restore torch's settings."""
        self._background.shutdown(cancel_futures=True)
        self._worker.close()
        num_threads, deterministic, precision = self._torch_settings
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
        """A method of the worker with an actor's interface; background calls return a future."""
        method = self.method(name)

        def remote(*arguments: Any) -> Any:
            values = [_result(argument) for argument in arguments]
            if name in BACKGROUND:
                return self._background.submit(method, *values)
            return to_device(method(*values), _HOST)

        def remote_single(*arguments: Any) -> Any:
            (result,) = remote(*arguments)
            return result

        def options(num_returns: int) -> SimpleNamespace:
            return SimpleNamespace(remote=remote_single if num_returns == 1 else remote)

        return SimpleNamespace(remote=remote, options=options)

    def method(self, name: str) -> Callable[..., Any]:
        """The function behind a call, in whichever thread it runs; benches override this to time
        it."""
        method: Callable[..., Any] = getattr(self._worker, name)
        return method


def _result(reference: Any) -> Any:
    return reference.result() if isinstance(reference, Future) else reference
