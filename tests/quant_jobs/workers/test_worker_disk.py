"""A worker on Ray whose files are refused: the user reads the sentence that it raised."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.quantizing import contents, make_small_model, small_recipe

from cluster.connect import connect
from deepseek.errors import OutputError
from quant_jobs.job.driver import Driver
from quant_jobs.job.folder import JobFolder
from quant_jobs.job.job import plan_job
from quant_jobs.job.progress import Event
from quant_jobs.quantize import run_quantize
from quant_jobs.workers.pool import WorkerPool

pytestmark = pytest.mark.ray


class Stopped(BaseException):
    """Ends a run at once, as a kill would."""


def test_a_refused_layer_and_a_refused_boundary_arrive_as_the_workers_sentence(
    tmp_path: Path,
) -> None:
    model, recipe, output = make_small_model(tmp_path), small_recipe("int4"), tmp_path / "out"
    job = plan_job(model.directory, recipe, model.text, output)
    pids: set[int] = set()

    def limit(num_bytes: int) -> None:
        """For the workers' files; the driver's have no limit."""
        for pid in pids:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))

    def quantize(pool: WorkerPool, note: Callable[[Event], None]) -> None:
        with JobFolder(output, job.fingerprint) as folder:
            Driver(job, folder, pool, note).run()
        assert not list(output.rglob("*.tmp"))

    with connect(num_cpus=2), WorkerPool(2) as pool:

        def refuse_layer(event: Event) -> None:
            if (event.step, event.layer) == ("solved", 0):
                usage = pool.each(lambda worker, _: worker.usage.remote())
                pids.update(worker.pid for worker in usage)
                limit(64)

        with pytest.raises(OutputError, match=r"layer-00000\.safetensors cannot .* to go on$"):
            quantize(pool, refuse_layer)
        assert len(pids) == 2
        limit(resource.RLIM_INFINITY)

        def stop(event: Event) -> None:
            if (event.step, event.layer) == ("published", 0):
                raise Stopped

        with pytest.raises(Stopped):
            quantize(pool, stop)
        for boundary in (output / ".job").glob("boundary-*"):
            shutil.rmtree(boundary)  # so that the first thing to be written is a boundary

        limit(64)
        with pytest.raises(OutputError, match=r"boundary-00001/worker-\S* cannot .* to go on$"):
            quantize(pool, lambda event: None)
        limit(resource.RLIM_INFINITY)
        quantize(pool, lambda event: None)
    run_quantize(model.directory, recipe, model.text, tmp_path / "whole", 0, lambda event: None)
    assert contents(output) == contents(tmp_path / "whole")
