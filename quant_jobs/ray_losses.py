"""What a failed call on Ray means: a lost worker or node, or an error of the call itself."""

from __future__ import annotations

import ray
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from deepseek.errors import IntServeError

#: Ray's errors for a lost worker, node, or object that only they had in memory. OutOfMemoryError:
#: the memory monitor killed the worker because its node ran short.
LOSS_ERRORS = (RayActorError, ObjectLostError, NodeDiedError, WorkerCrashedError, OutOfMemoryError)


def is_loss(error: BaseException | None) -> bool:
    """Whether a worker or node was lost; also true for a call that failed because one of its
    arguments was lost with its worker."""
    while isinstance(error, RayTaskError) and not isinstance(error, LOSS_ERRORS):
        error = error.cause
    return isinstance(error, LOSS_ERRORS)


def cause_of(error: BaseException) -> BaseException:
    """The exception to raise for a failed call: what the user or the operating system can cause
    itself, as the worker raised it, else Ray's with the worker's traceback."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, IntServeError | OSError) else error


def cluster_total(resource: str) -> float:
    """The cluster's total of a resource, used or free."""
    return float(ray.cluster_resources().get(resource, 0))
