"""Jobs on a GPU: tests with a stand-in for it (`support/elsewhere.py`), and tests that need one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from statistics import mean

import pytest
import ray
import torch
from support.elsewhere import Elsewhere, There
from support.quantizing import SmallModel, contents, make_small_model, small_recipe

from deepseek.artifact.reader import ArtifactReader
from deepseek.errors import ArtifactError, DeployError
from deepseek.recipe import Recipe
from quant_jobs.job.driver import Driver
from quant_jobs.job.folder import JobFolder
from quant_jobs.job.job import plan_job, tools
from quant_jobs.job.progress import Event
from quant_jobs.quantize import run_quantize
from quant_jobs.workers.devices import Device, make_repeatable
from quant_jobs.workers.in_process import InProcessWorker

MANIFEST = "intserve.json"

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


class Stopped(BaseException):
    """Ends a run at once, as a kill would: nothing catches it."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return make_small_model(tmp_path_factory.mktemp("small"))


def quantize(
    small: SmallModel, recipe: Recipe, output: Path, device: Device, stop: str = ""
) -> dict[str, bytes]:
    """Run the job on a worker in this process; `stop` is `STEP LAYER` of the event to stop at."""

    def note(event: Event) -> None:
        if f"{event.step} {event.layer}" == stop:
            raise Stopped

    job = plan_job(small.directory, recipe, small.text, output, device)
    with JobFolder(output, job.fingerprint) as folder, InProcessWorker() as worker:
        Driver(job, folder, worker, note).run()
    return contents(output)


_PER_CHANNEL = {"match": "*", "weights": "int8", "algorithm": "gptq", "clip": "mse"}
_GROUPS = {"match": "*down_proj", "weights": "int4-asym", "group_size": 64, "algorithm": "gptq"}
_PERCENTILE = {"match": "*", "weights": "int8-asym", "clip": "percentile"}

#: Together they cover every algorithm, clip and policy.
RECIPES = {
    "int8-smoothquant": small_recipe("int8-smoothquant", expert_coverage={"policy": "all"}),
    "int4-all-awq": small_recipe("int4-all-awq"),
    "w4a8": small_recipe("w4a8", expert_coverage={"policy": "shrink"}),
    "gptq": small_recipe("int8", rules=[_PER_CHANNEL, _GROUPS | {"act_order": True}]),
    "percentile": small_recipe("int8", rules=[_PERCENTILE]),
}


@pytest.mark.heavy
@pytest.mark.parametrize(
    "name",
    # One recipe measures, one solves under Gram matrices; the others go the same ways.
    [
        name if name in ("w4a8", "gptq") else pytest.param(name, marks=pytest.mark.slow)
        for name in RECIPES
    ],
)
def test_every_tensor_is_where_it_is_used(small: SmallModel, tmp_path: Path, name: str) -> None:
    """The stand-in fails at the first tensor on the wrong device; it computes the CPU's values."""
    recipe, output = RECIPES[name], tmp_path / "elsewhere"
    expected = quantize(small, recipe, tmp_path / "cpu", "cpu")
    with Elsewhere() as elsewhere:
        with pytest.raises(Stopped):
            quantize(small, recipe, output, "cuda", "published 1")
        for path in (output / ".job").glob("boundary-*/*"):
            path.unlink()  # the next run repeats the published layers' forward passes
        written = quantize(small, recipe, output, "cuda")
    assert elsewhere.moved > 100
    manifest, on_cpu = json.loads(written.pop(MANIFEST)), json.loads(expected.pop(MANIFEST))
    assert written == expected
    assert manifest.pop("tools") == {**tools(), "device": "cuda"}
    assert on_cpu.pop("tools") == tools()
    assert manifest["layers"] == on_cpu["layers"]


@pytest.mark.heavy
def test_weights_are_not_sent_to_the_device_again_for_every_block(
    small: SmallModel, tmp_path: Path
) -> None:
    def sent(num_blocks: int) -> int:
        calibration = {"num_blocks": num_blocks, "block_tokens": 48}
        recipe = small_recipe("int4", calibration=calibration)
        with Elsewhere() as elsewhere:
            quantize(small, recipe, tmp_path / str(num_blocks), "cuda")
        return elsewhere.moved_of[torch.float8_e4m3fn]

    assert sent(8) == sent(4) > 20


def test_the_stand_in_refuses_what_a_gpu_refuses() -> None:
    with Elsewhere():
        there, here = torch.ones(3).to("cuda"), torch.ones(3)
        assert there.device.type == torch.zeros_like(there * 2).device.type == "cuda"
        assert torch.zeros(2, device="cuda").is_cuda
        assert there.cpu().device.type == there.to("cpu", torch.int8).device.type == "cpu"
        assert here.to(there).is_cuda
        assert not there.to(here).is_cuda
        for mix in (
            lambda: there + here,
            lambda: torch.stack([here, there]),
            lambda: here[there.long()],
            lambda: here.add_(there),
            lambda: there.numpy(),
            lambda: there.data_ptr(),
        ):
            with pytest.raises(AssertionError, match="elsewhere|not in host memory"):
                mix()
        assert torch.equal(
            (there[torch.arange(2)] * torch.tensor(2.0)).cpu(), torch.full((2,), 2.0)
        )
    with pytest.raises(AssertionError, match="elsewhere"):
        there + here  # also after it has ended, and in other threads
    assert isinstance(there, There)


def test_a_gpu_is_set_to_repeat_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        make_repeatable("cpu")
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ""
        assert torch.get_float32_matmul_precision() == "high"
        with Elsewhere():
            make_repeatable("cuda")
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.ray
@needs_no_gpu
@pytest.mark.parametrize(
    ("workers", "lacking"), [(0, "PyTorch finds none"), (2, "this Ray has none")]
)
def test_without_a_gpu_nothing_is_begun(
    small: SmallModel, tmp_path: Path, workers: int, lacking: str
) -> None:
    output = tmp_path / "out"
    with pytest.raises(DeployError, match=f"^--device cuda needs a GPU .*{lacking}"):
        run_quantize(
            *(small.directory, small_recipe("int8"), small.text, output, workers),
            progress=lambda event: None,
            device="cuda",
        )
    assert not output.exists()
    assert not ray.is_initialized()


@needs_no_gpu
def test_a_gpu_that_pytorch_cannot_use_is_said_in_one_sentence() -> None:
    with pytest.raises(DeployError, match=r"^PyTorch cannot use the GPU of a worker \(.*; install"):
        make_repeatable("cuda")


@pytest.mark.heavy
def test_an_output_is_bound_to_its_device(small: SmallModel, tmp_path: Path) -> None:
    recipe, output = small_recipe("int8"), tmp_path / "out"

    def again(device: Device) -> str:
        return run_quantize(
            *(small.directory, recipe, small.text, output, 0),
            progress=lambda event: None,
            device=device,
        ).digest

    with Elsewhere(), pytest.raises(Stopped):
        quantize(small, recipe, output, "cuda", "published 0")
    with pytest.raises(ArtifactError, match=r"with another device \(cuda, now cpu\); choose anoth"):
        again("cpu")
    with Elsewhere():
        quantize(small, recipe, output, "cuda")
    with pytest.raises(ArtifactError, match=r"with another device \(cuda, now cpu\); choose anoth"):
        again("cpu")
    assert again("cuda") == ArtifactReader(output).digest  # a finished output needs no GPU


@pytest.mark.ray
@pytest.mark.slow
def test_more_cpus_for_each_worker_change_no_byte(small: SmallModel, tmp_path: Path) -> None:
    assert not ray.is_initialized()
    events: list[tuple[str, float]] = []

    def note(event: Event) -> None:
        events.append((event.detail, ray.cluster_resources()["CPU"]))

    recipe = small_recipe("int8")
    output = tmp_path / "out"
    run_quantize(
        *(small.directory, recipe, small.text, output, 1), progress=note, cpus_per_worker=3
    )
    assert events[0] == ("int8 on 1 worker of 3 CPUs: from the start", 3.0)
    assert contents(output) == quantize(small, recipe, tmp_path / "here", "cpu")


def test_cpus_of_ray_without_ray_are_a_mistake(small: SmallModel, tmp_path: Path) -> None:
    with pytest.raises(DeployError, match=r"--cpus-per-worker reserves CPUs of Ray, and --workers"):
        run_quantize(*(small.directory, "int8", small.text, tmp_path / "out", 0), cpus_per_worker=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
@pytest.mark.gpu
@pytest.mark.parametrize(
    "name", ["int8", "int8-smoothquant", "int4-all-awq", "int4-all-gptq", "w4a8"]
)
def test_a_gpu_writes_the_same_bytes_every_time_and_errs_as_the_cpu_does(
    small: SmallModel, tmp_path: Path, name: str
) -> None:
    def on_gpu(workers: int, output: Path) -> dict[str, bytes]:
        run_quantize(
            *(small.directory, small_recipe(name), small.text, output, workers),
            progress=lambda event: None,
            device="cuda",
        )
        return contents(output)

    whole = on_gpu(0, tmp_path / "here")
    assert on_gpu(0, tmp_path / "again") == whole
    assert on_gpu(1, tmp_path / "ray") == whole
    quantize(small, small_recipe(name), tmp_path / "cpu", "cpu")
    actual, expected = ArtifactReader(tmp_path / "here"), ArtifactReader(tmp_path / "cpu")
    # A sum with another last digit may change a code or a search, but hardly an error. It may also
    # send a token to another expert: then that expert's error is measured on other tokens.
    for record in expected.manifest.layers:
        found = actual.manifest.record(record.layer).errors
        for module, error in record.errors.items():
            tolerance = 0.5 if ".experts." in module else 0.1
            assert found[module] == pytest.approx(error, rel=tolerance), module
        if record.errors:
            assert mean(found.values()) == pytest.approx(mean(record.errors.values()), rel=0.05)
    if name == "int8":  # its codes depend on the weights alone
        layers = range(small.config.num_hidden_layers)
        for ours, theirs in ((actual.read_layer(n), expected.read_layer(n)) for n in layers):
            for key, tensor in theirs.items():
                atol = 1.0 if tensor.dtype == torch.int8 else 0.0
                assert torch.allclose(ours[key].float(), tensor.float(), rtol=1e-5, atol=atol), key
