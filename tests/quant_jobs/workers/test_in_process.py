"""A job without Ray: one worker in the driver's process writes the bytes of any pool."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support.quantizing import SmallModel, contents, make_small_model, small_recipe
from torch import Tensor

from cluster.connect import connect
from deepseek.errors import ArtifactError
from quant_jobs.job.driver import Driver
from quant_jobs.job.folder import JobFolder
from quant_jobs.job.job import plan_job
from quant_jobs.quantize import run_quantize
from quant_jobs.reports.job_report import REPORT_FILE
from quant_jobs.workers.in_process import InProcessWorker


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return make_small_model(tmp_path_factory.mktemp("small"))


def quantize(small: SmallModel, recipe: str, output: Path, workers: int) -> dict[str, bytes]:
    run_quantize(
        small.directory, small_recipe(recipe), small.text, output, workers, lambda event: None
    )
    return contents(output)


@pytest.mark.ray
def test_it_writes_the_bytes_of_a_worker_on_ray(small: SmallModel, tmp_path: Path) -> None:
    with connect(num_cpus=1):  # one Ray for both
        for recipe in ("int4-gptq", "w4a8"):
            in_process = quantize(small, recipe, tmp_path / f"{recipe}-here", 0)
            assert quantize(small, recipe, tmp_path / f"{recipe}-ray", 1) == in_process
    report = json.loads((tmp_path / "w4a8-here" / REPORT_FILE).read_text())
    assert report["num_workers"] == report["num_nodes"] == len(report["workers"]) == 1


@pytest.mark.heavy
def test_the_command_does_not_even_import_ray(
    small: SmallModel, tmp_path: Path, root: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(small_recipe("int8").model_dump(mode="json")))
    words = [
        *("quantize", "--model", str(small.directory), "--recipe", str(recipe)),
        *("--calibration", str(small.text), "--output", str(tmp_path / "out")),
        *("--workers", "0", "--json"),
    ]
    code = (
        "import sys\n"
        "from quant_jobs.__main__ import app\n"
        "app(sys.argv[1:], standalone_mode=False)\n"
        "assert 'modelopt' in sys.modules\n"
        "assert 'ray' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["recipe"] == "int8"
    assert "int8 on one worker in this process: from the start" in done.stderr


class Noting(InProcessWorker):
    """Records in which thread each call runs."""

    def __init__(self) -> None:
        super().__init__()
        self.where: dict[str, set[str]] = {}

    def method(self, name: str) -> Callable[..., Any]:
        call = super().method(name)

        def noted(*arguments: Any) -> Any:
            self.where.setdefault(name, set()).add(threading.current_thread().name)
            return call(*arguments)

        return noted


class Receiving(InProcessWorker):
    """Watches what enters the MLP from `receive` on: layers received, and rows alive after each
    call of `solve`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[int] = []
        self.alive: list[int] = []
        self._rows: list[weakref.ref[Tensor]] = []

    def method(self, name: str) -> Callable[..., Any]:
        call = super().method(name)

        def watched(*arguments: Any) -> Any:
            result = call(*arguments)
            if name == "receive":
                self.layers.append(arguments[0])
                inputs = self._worker._original._inputs  # type: ignore[union-attr]
                self._rows = [weakref.ref(routed.z) for _, routed in inputs._blocks]
                assert self._rows
            if name == "solve":
                gc.collect()
                self.alive.append(sum(rows() is not None for rows in self._rows))
            return result

        return watched


@pytest.mark.heavy
def test_what_enters_the_mlp_is_received_once_a_layer_and_freed_when_it_is_solved(
    small: SmallModel, tmp_path: Path
) -> None:
    """With a recipe whose shared scale asks for it twice before it is solved."""
    recipe = small_recipe("int8-smoothquant")
    job = plan_job(small.directory, recipe, small.text, tmp_path / "out")
    with JobFolder(job.output, job.fingerprint) as folder, Receiving() as worker:
        Driver(job, folder, worker, lambda event: None).run()
    layers = list(range(job.source.config.num_hidden_layers))
    assert worker.layers == layers
    assert worker.alive == [0] * len(layers)


@pytest.mark.heavy
def test_it_writes_a_layer_beside_its_other_calls(small: SmallModel, tmp_path: Path) -> None:
    job = plan_job(small.directory, small_recipe("int8"), small.text, tmp_path / "out")
    with JobFolder(job.output, job.fingerprint) as folder, Noting() as worker:
        Driver(job, folder, worker, lambda event: None).run()
    assert worker.where.pop("write") == worker.where.pop("store") == {"background_0"}
    assert set().union(*worker.where.values()) == {threading.current_thread().name}


@pytest.mark.heavy
def test_what_went_wrong_beside_the_other_calls_is_raised_when_it_is_asked_for() -> None:
    class Full(InProcessWorker):
        def method(self, name: str) -> Callable[..., Any]:
            def fail() -> None:
                raise ArtifactError("the disk is full")

            return fail

    with Full() as worker:
        (reference,) = worker.submit(lambda worker, _: worker.write.remote())
        with pytest.raises(ArtifactError, match="the disk is full"):
            worker.gather([reference])


@pytest.mark.heavy
def test_it_leaves_torch_and_the_process_as_they_were(small: SmallModel, tmp_path: Path) -> None:
    def state() -> tuple[int, int, int]:
        mode = torch.get_deterministic_debug_mode()
        return torch.get_num_threads(), mode, threading.active_count()

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        before = state()
        quantize(small, "int8", tmp_path / "out", 0)
        assert state() == before
    finally:
        torch.set_num_threads(threads)
