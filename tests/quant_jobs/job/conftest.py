"""A small job in this process, whole: what the tests of disks and of lost files start from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.quantizing import SmallModel, make_small_model, small_recipe

from deepseek.artifact.manifest import Manifest
from quant_jobs.job.driver import Driver
from quant_jobs.job.folder import JobFolder
from quant_jobs.job.job import finished, plan_job
from quant_jobs.job.progress import Event, Progress

#: Runs the job of a small model into an output, on a worker in this process.
RunJob = Callable[..., Manifest]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    """Its embedding is larger than the edges of a shard that the fingerprint covers."""
    return make_small_model(tmp_path_factory.mktemp("model"), vocab_size=512)


@pytest.fixture(scope="module")
def worker() -> Iterator[Any]:
    from quant_jobs.workers.in_process import InProcessWorker

    with InProcessWorker() as started:
        yield started


@pytest.fixture(scope="module")
def run_job(worker: Any, model: SmallModel) -> RunJob:
    def ignore(event: Event) -> None:
        pass

    def run(
        output: Path,
        progress: Progress = ignore,
        *,
        source: SmallModel = model,
        recipe: str = "int8-smoothquant",
    ) -> Manifest:
        job = plan_job(source.directory, small_recipe(recipe), source.text, output)
        if (done := finished(job)) is not None:
            return done
        with JobFolder(output, job.fingerprint) as folder:
            return Driver(job, folder, worker, progress).run()

    return run


@pytest.fixture(scope="module")
def whole(run_job: RunJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a job that nothing disturbed."""
    output = tmp_path_factory.mktemp("whole") / "out"
    run_job(output)
    return output
