"""CPUs and GPUs that workers reserve. Ray counts the GPUs it is told of, so these are made up."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.util import placement_group_table
from support.quantizing import make_small_model, small_recipe

from deepseek.errors import DeployError, IntServeError
from quant_jobs.job.driver import Driver
from quant_jobs.job.folder import JobFolder
from quant_jobs.job.job import plan_job
from quant_jobs.workers.pool import WorkerPool

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there are real GPUs here"),
]


@pytest.fixture(scope="module")
def made_up() -> Iterator[None]:
    """A Ray of 6 CPUs that believes in 2 GPUs."""
    ray.init("local", num_cpus=6, num_gpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def pair(made_up: None) -> Iterator[WorkerPool]:
    with WorkerPool(2, cpus=2, gpus=1) as pool:
        pool.admit()
        yield pool


def test_each_worker_has_its_cpus_and_a_gpu_of_its_own(pair: WorkerPool) -> None:
    assert pair.describe() == "2 workers of 2 CPUs and 1 GPU each"
    placed = [group for group in placement_group_table().values() if group["state"] == "CREATED"]
    assert [group["bundles"][0] for group in placed] == [{"CPU": 2.0, "GPU": 1.0}] * 2
    left = ray.available_resources()
    assert (left["CPU"], left.get("GPU", 0.0)) == (2.0, 0.0)

    def look(worker: Any) -> str | None:
        return os.environ.get("CUDA_VISIBLE_DEVICES")

    devices = pair.each(lambda worker, _: worker.__ray_call__.remote(look))
    assert sorted(devices) == ["0", "1"]


def test_a_gpu_that_pytorch_cannot_use_ends_the_job_in_one_sentence(
    pair: WorkerPool, tmp_path: Path
) -> None:
    small = make_small_model(tmp_path)
    job = plan_job(small.directory, small_recipe("int8"), small.text, tmp_path / "out", "cuda")
    with (
        JobFolder(job.output, job.fingerprint) as folder,
        pytest.raises(DeployError, match="^PyTorch cannot use the GPU of a worker"),
    ):
        Driver(job, folder, pair, lambda event: None).run()


def test_too_few_gpus_or_cpus_are_said_before_and_after_the_wait(pair: WorkerPool) -> None:
    with WorkerPool(3, gpus=1, start_timeout_s=0.2) as pool:
        assert pool.describe() == (
            "3 workers of 1 CPU and 1 GPU each "
            "(waiting for nodes: the cluster has 6 CPUs and 2 GPUs)"
        )
        with pytest.raises(
            IntServeError,
            match=r"none of 3 workers started within 0 s \(each takes 1 CPU and 1 GPU of a node; "
            r"the cluster has 6 CPUs and 2 GPUs in all\); add nodes",
        ):
            pool.admit()
    with WorkerPool(2, cpus=4, start_timeout_s=0.2) as pool:
        assert pool.describe() == (
            "2 workers of 4 CPUs each (waiting for nodes: the cluster has 6 CPUs)"
        )
