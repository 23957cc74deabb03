"""Our model of vLLM's loader against vLLM's own, on two ranks: the same bytes in every parameter,
or a refusal of both; and its parser takes the launch file."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.environments import environment, run_in
from support.vllm_builds import MUTATIONS, build_vllm_engine, make_vllm_artifact
from torch import Tensor

from deepseek.artifact.engine_manifest import RankLayout
from deepseek.fused_loader.modules import Experts
from deepseek.vllm.loader import LoaderModel, LoaderRefusal

pytestmark = [pytest.mark.interop, pytest.mark.timeout(1800)]

RECIPES = ("int4", "int8", "int8-weight-only", "int8-experts", "int4-all", "int4-asym")
#: Edits at which vLLM itself stops.
STOPS = ("fewer rows", "stray tensor", "ignored linear", "ignored part")


class FilledBefore(LoaderModel):
    """Parameters hold 0xAB before they are loaded, as in the script, so that what nothing fills is
    compared too."""

    def _empty(self, parameter: tuple[tuple[int, ...], torch.dtype]) -> Tensor:
        created = super()._empty(parameter)
        created.view(torch.uint8).fill_(0xAB)
        return created


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("engines")
    found = {}
    for recipe in RECIPES:
        artifact = make_vllm_artifact(root, recipe)
        options = {"kv_cache": "fp8"} if recipe == "int8" else {}
        build_vllm_engine(artifact.directory, root / f"e-{recipe}", **options)
        found[recipe] = root / f"e-{recipe}"
    found["source"] = root / "e-source"
    build_vllm_engine(root / "source", found["source"])
    for name, (edit, _) in MUTATIONS.items():
        found[name] = root / name.replace(" ", "-")
        shutil.copytree(found["int4"], found[name])
        edit(found[name])
    return found


@pytest.fixture(scope="module", params=[1, 0], ids=["ep", "tp"])
def theirs(request: pytest.FixtureRequest, directories: dict[str, Path]) -> tuple[int, Any]:
    """(whether experts are divided by expert, what vLLM made of each directory by rank)."""
    (packages,) = environment("vllm_loader").parents[1].glob("lib/python*/site-packages")
    output = next(iter(directories.values())).parent / f"found-{request.param}.json"
    words = [packages, output, request.param, *directories.values()]
    run_in("vllm_bench", "run_vllm_ranks.py", *words)
    return request.param, json.loads(output.read_text())


@pytest.mark.parametrize("name", [*RECIPES, "source", *MUTATIONS])
def test_every_parameter_of_every_rank_holds_the_same_bytes_or_both_refuse(
    name: str, directories: dict[str, Path], theirs: tuple[int, Any]
) -> None:
    ep, found = theirs
    directory = directories[name]
    for rank in (0, 1):
        of_vllm = found[str(rank)][str(directory)]
        assert ("refused" in of_vllm) == (name in STOPS), of_vllm.get("refused")
        if name in STOPS:
            with pytest.raises(LoaderRefusal):
                held(directory, rank, ep)
        else:
            assert held(directory, rank, ep) == without_shapes(of_vllm["parameters"])


def test_its_parser_reads_the_launch_file_as_it_was_meant(
    directories: dict[str, Path], theirs: tuple[int, Any]
) -> None:
    _, found = theirs
    arguments = found["0"][str(directories["int8"])]["arguments"]
    assert arguments == {
        "dtype": "bfloat16",
        "load_format": "safetensors",
        "tensor_parallel_size": 2,
        "enable_expert_parallel": True,
        "distributed_executor_backend": None,
        "kv_cache_dtype": "fp8",
        "max_model_len": 256,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 8192,
        "gpu_memory_utilization": 0.92,
        "speculative_config": None,
    }


def held(directory: Path, rank: int, ep: int) -> dict[str, str]:
    """The SHA-256 of every parameter of a rank by vLLM's name."""
    model = FilledBefore(directory, RankLayout(tp=2, ep=2 if ep else 1))
    found = {}
    for layer in model.layers:
        for module, parameters in model.load(rank, layer):
            inner = ".routed_experts" if isinstance(module, Experts) else ""
            for suffix, values in parameters.items():
                data = values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                found[f"{module.name}{inner}.{suffix}"] = hashlib.sha256(data).hexdigest()
    return without_shapes(found)


def without_shapes(parameters: dict[str, str]) -> dict[str, str]:
    """Of a fused linear the shape that is read last is kept, and nothing computes with it."""
    return {n: digest for n, digest in parameters.items() if not n.endswith("weight_shape")}
