"""Quantize a checkpoint: check the inputs, take the job's folder, start workers, run the driver.

The driver is `job/driver.py`. `--workers 0` needs no Ray; which kind of workers runs the job is
decided here alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from deepseek.artifact.manifest import Manifest
from deepseek.artifact.tensors import layer_keys
from deepseek.errors import DeployError
from deepseek.recipe import Recipe
from quant_jobs.job.driver import Driver
from quant_jobs.job.folder import JobFolder
from quant_jobs.job.job import Calibration, finished, plan_job
from quant_jobs.job.progress import Progress, TerminalProgress
from quant_jobs.workers.devices import Device, check_gpus
from quant_jobs.workers.protocol import Workers


def run_quantize(
    model: Path,
    recipe: Recipe | str,
    calibration: Calibration,
    output: Path,
    workers: int,
    progress: Progress | None = None,
    *,
    device: Device = "cpu",
    cpus_per_worker: int = 1,
) -> Manifest:
    """Quantize the checkpoint in `model` into `output`, or go on where a killed run stopped.

    Connects to Ray (or starts a local one) for as long as it takes; `workers` 0 needs no Ray, one
    worker in this process does it all. A finished output of the same inputs is returned as it is.
    `progress` None shows a progress line on stderr. On `device` cuda every worker has a GPU of its
    own. `cpus_per_worker` is what each reserves of Ray's CPUs; it computes on one thread.

    Raises:
        IntServeError: its subclasses, for what is wrong with each input, before any work is done;
            itself when workers keep dying.
    """
    if not workers and cpus_per_worker != 1:
        raise DeployError(
            "--cpus-per-worker reserves CPUs of Ray, and --workers 0 uses none; leave one of the "
            "two out"
        )
    job = plan_job(model, recipe, calibration, output, device)
    if (done := finished(job)) is not None:
        return done
    with ExitStack() as stack:
        if device == "cuda":  # before the output is bound to it
            if workers:
                stack.enter_context(_ray(workers * cpus_per_worker))
            check_gpus(on_ray=workers > 0)
        folder = stack.enter_context(JobFolder(output, job.fingerprint))
        pool = stack.enter_context(start_workers(workers, device, cpus_per_worker))
        if progress is not None:
            return Driver(job, folder, pool, progress).run()
        with TerminalProgress(len(layer_keys(job.source.config))) as terminal:
            return Driver(job, folder, pool, terminal).run()


def _ray(num_cpus: int) -> AbstractContextManager[object]:
    """The Ray of a job; within another one of these, that one."""
    from cluster.connect import connect

    return connect(num_cpus=num_cpus)


@contextmanager
def start_workers(
    number: int, device: Device = "cpu", cpus_per_worker: int = 1
) -> Iterator[Workers]:
    """The workers of a job, for as long as it takes. What the other kind needs (Ray here, what
    computes there) is not even imported."""
    if not number:
        from quant_jobs.workers.in_process import InProcessWorker

        with InProcessWorker() as here:
            yield here
        return
    from quant_jobs.workers.pool import WorkerPool

    gpus = 1 if device == "cuda" else 0
    with (
        _ray(number * cpus_per_worker),
        WorkerPool(number, cpus=cpus_per_worker, gpus=gpus) as pool,
    ):
        yield pool
