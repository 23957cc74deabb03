"""Quantize a checkpoint: check the inputs, lock the job's folder, start workers, run the driver.

Only this file chooses between workers on Ray and one in this process (`--workers 0`, no Ray). The
schedule is `job/driver.py`. Called by the command and by benches.
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
    verify: bool = False,
) -> Manifest:
    """Quantize the checkpoint in `model` into `output`, or resume a killed run.

    Connects to Ray, or starts a local one, until the job ends; with `workers` 0 one worker in this
    process runs the job without Ray. A finished output of the same inputs is checked, what it has
    lost is made again, and it is returned unchanged; `verify` checks every byte of a large one.
    `progress` None shows a progress line on stderr. On `device` cuda each worker has its own GPU.
    `cpus_per_worker` is how many Ray CPUs each worker reserves; it computes on one thread.

    Raises:
        IntServeError: a subclass for a wrong input, before any work is done; itself when workers
            keep dying.
    """
    if not workers and cpus_per_worker != 1:
        raise DeployError(
            "--cpus-per-worker reserves CPUs of Ray, and --workers 0 uses none; leave one of the "
            "two out"
        )
    job = plan_job(model, recipe, calibration, output, device)
    if (done := finished(job, whole=verify)) is not None:
        return done
    with ExitStack() as stack:
        if device == "cuda":  # before the output is bound to it
            if workers:
                stack.enter_context(connect_ray(workers * cpus_per_worker))
            check_gpus(on_ray=workers > 0)
        folder = stack.enter_context(JobFolder(output, job.fingerprint))
        pool = stack.enter_context(start_workers(workers, device, cpus_per_worker))
        if progress is not None:
            return Driver(job, folder, pool, progress).run()
        with TerminalProgress(len(layer_keys(job.source.config))) as terminal:
            return Driver(job, folder, pool, terminal).run()


def connect_ray(num_cpus: int) -> AbstractContextManager[object]:
    """The Ray of a job. Nested calls share one connection."""
    from cluster.connect import connect

    return connect(num_cpus=num_cpus)


@contextmanager
def start_workers(
    number: int, device: Device = "cpu", cpus_per_worker: int = 1
) -> Iterator[Workers]:
    """Start the workers of a job, and stop them on exit. Imports only what this kind of workers
    needs: no Ray for a worker in this process, no modeling code for a driver on Ray."""
    if not number:
        from quant_jobs.workers.in_process import InProcessWorker

        with InProcessWorker() as worker:
            yield worker
        return
    from quant_jobs.workers.pool import WorkerPool

    gpus = 1 if device == "cuda" else 0
    with (
        connect_ray(number * cpus_per_worker),
        WorkerPool(number, cpus=cpus_per_worker, gpus=gpus) as pool,
    ):
        yield pool
