"""vLLM's own config, choice of schemes and loader take artifacts of ours: every parameter holds the
artifact's values, and every tensor but the MTP layer's is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.engines import make_artifact
from support.environments import environment, run_in

from deepseek.artifact.input_maxima import INPUT_MAXIMA_FILE
from deepseek.recipe import load_recipe
from quant_jobs.quantize import run_quantize

pytestmark = [pytest.mark.interop, pytest.mark.timeout(1800)]

FP8 = "CompressedTensorsW8A8Fp8"
#: Artifact -> scheme of the linears and of the routed experts that vLLM chooses.
SCHEMES = {
    "int4": (FP8, "CompressedTensorsWNA16MoEMethod"),
    "int8-experts": (FP8, "CompressedTensorsWNA16MoEMethod"),
    "int4-all": ("CompressedTensorsWNA16", "CompressedTensorsWNA16MoEMethod"),
    "int8-weight-only": ("CompressedTensorsWNA16", "CompressedTensorsWNA16MoEMethod"),
    "int8": ("CompressedTensorsW8A8Int8", "CompressedTensorsW8A8Int8MoEMethod"),
    "with maxima": (FP8, "CompressedTensorsWNA16MoEMethod"),
}
LINEARS = (
    *("ColumnParallelLinear", "DeepSeekV2FusedQkvAProjLinear", "MergedColumnParallelLinear"),
    "RowParallelLinear",
)
MTP_LAYER = "model.layers.4."


@pytest.fixture(scope="module")
def found(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the loader made of each artifact; started once, because importing vLLM takes longest."""
    folder = tmp_path_factory.mktemp("artifacts")
    artifacts = {
        name: make_artifact(tiny_model, name, folder)
        for name in (*SCHEMES, "w4a8")
        if name != "with maxima"
    }
    artifacts["with maxima"] = quantized(tiny_model, folder / "calibrated")
    artifacts["damaged"] = damaged(artifacts["int4"], folder / "damaged")
    (packages,) = environment("vllm_loader").parents[1].glob("lib/python*/site-packages")
    output = folder / "found.json"
    run_in("vllm_bench", "run_vllm_loader.py", packages, output, *artifacts.values())
    by_path = json.loads(output.read_text())
    return {name: by_path[str(path)] for name, path in artifacts.items()}


def quantized(source: Path, output: Path) -> Path:
    """A calibrated artifact, with the largest inputs of its experts in a file beside it."""
    recipe = load_recipe("int8-experts")
    few = recipe.model_copy(
        update={"calibration": recipe.calibration.model_copy(update={"num_blocks": 2})}
    )
    run_quantize(source, few, source / "calibration.txt", output, 0, lambda _: None)
    assert (output / INPUT_MAXIMA_FILE).exists()
    return output


def damaged(artifact: Path, copy: Path) -> Path:
    """A copy whose config says nothing of `o_proj`."""
    shutil.copytree(artifact, copy)
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["ignore"].append("re:.*[.]o_proj$")
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize("name", SCHEMES)
def test_it_loads_with_nothing_unread_and_nothing_unfilled(
    name: str, found: dict[str, dict[str, Any]]
) -> None:
    loaded = found[name]
    assert "refused" not in loaded, loaded
    linears, experts = SCHEMES[name]
    assert loaded["schemes"]["RoutedExperts"] == experts
    assert {loaded["schemes"][kind] for kind in LINEARS} == {linears}
    assert loaded["wrong"] == []
    assert [tensor for tensor in loaded["unread"] if not tensor.startswith(MTP_LAYER)] == []
    assert loaded["unread"]  # the MTP layer, which it loads as a model of its own


def test_the_maxima_beside_an_artifact_change_nothing(found: dict[str, dict[str, Any]]) -> None:
    assert found["with maxima"] == found["int8-experts"]


def test_static_input_scales_are_refused_which_is_why_maxima_are_no_tensors(
    found: dict[str, dict[str, Any]],
) -> None:
    assert "refused" in found["w4a8"]


def test_a_config_that_is_silent_about_a_linear_is_noticed(
    found: dict[str, dict[str, Any]],
) -> None:
    """So that the tests above can fail."""
    loaded = found["damaged"]
    assert "refused" in loaded or "o_proj" in " ".join((*loaded["wrong"], *loaded["unread"]))
