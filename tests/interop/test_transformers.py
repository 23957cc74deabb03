"""transformers loads artifacts of ours by itself and says what the embedded engine says, or refuses
them in words that are recorded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.environments import run_in
from support.interop import (
    RECIPES,
    answered,
    checkpoints,
    held_out,
    keep_or_compare,
    records_of,
)

pytestmark = [pytest.mark.interop, pytest.mark.timeout(1800)]

#: Recipes that transformers refuses: it has no experts with INT8 activations, and it drops the zero
#: points of experts.
REFUSED = ("int4-asym", "int8", "int8-asym", "int8-block", "int8-smoothquant")
#: Largest median and mean KL in nats per token, as in `test_oracle.py`: transformers computes in
#: FP32, our kernels take BF16 activations; and w4a8's experts take FP8 inputs here alone.
MAX_MEDIAN_KL, MAX_MEAN_KL, MAX_MEDIAN_KL_FP8 = 3e-5, 5e-3, 5e-4
#: Of a built directory, whose weights are BF16 when they are dequantized and whose activations are
#: not quantized.
MAX_MEDIAN_KL_BUILT = 5e-4
#: Of eight greedy continuations of 32 tokens, those that may leave the path at a near tie.
MAX_DIFFERENT = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def found(tiny_model: Path, base: Path) -> dict[str, dict[str, Any]]:
    """What transformers made of each artifact."""
    folder = base / "transformers"
    folder.mkdir()
    given = checkpoints(tiny_model, "transformers", base)
    given["lost int4"] = lost_scale(given["int4"], folder / "lost")
    words = held_out(tiny_model, base), folder, *given.values()
    run_in("transformers", "run_transformers.py", *words)
    by_path = json.loads((folder / "found.json").read_text())
    found = {name: by_path[str(path)] for name, path in given.items()}
    return answered(found, given, folder, tiny_model, base)


def lost_scale(artifact: Path, copy: Path) -> Path:
    """A copy without one scale."""
    shutil.copytree(artifact, copy)
    path = copy / "model-layer-00001.safetensors"
    stored = load_file(path)
    del stored["model.layers.1.mlp.shared_experts.down_proj.weight_scale"]
    save_file(stored, path, metadata={"format": "pt"})
    return copy


@pytest.fixture(scope="module")
def fresh(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return records_of(
        "transformers", "5.23.0", found, package="transformers", test="test_transformers.py"
    )


def test_every_recipe_comes_out_as_recorded(fresh: dict[str, Any]) -> None:
    assert keep_or_compare(fresh) == []


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in REFUSED])
def test_it_loads_an_artifact_and_says_what_the_engine_says(
    name: str, fresh: dict[str, Any]
) -> None:
    loaded = fresh["transformers-artifact"]["recipes"][name]
    assert loaded["loaded"], loaded
    assert loaded["wrong"] == []
    static = name == "w4a8"
    assert all(tensor.endswith("_proj.input_scale") for tensor in loaded["unread"])
    assert bool(loaded["unread"]) == static
    assert loaded["kl_median"] < (MAX_MEDIAN_KL_FP8 if static else MAX_MEDIAN_KL)
    assert loaded["kl_mean"] < MAX_MEAN_KL
    assert loaded["greedy_equal"] >= loaded["greedy_of"] - MAX_DIFFERENT


@pytest.mark.parametrize("name", REFUSED)
def test_it_refuses_an_artifact(name: str, fresh: dict[str, Any]) -> None:
    assert not fresh["transformers-artifact"]["recipes"][name]["loaded"]


@pytest.mark.parametrize("name", RECIPES)
def test_it_loads_what_is_built_for_it(name: str, fresh: dict[str, Any]) -> None:
    loaded = fresh["transformers"]["recipes"][name]
    assert loaded["input"] == "engine"
    assert loaded["loaded"], loaded
    assert loaded["unread"] == loaded["wrong"] == []
    assert loaded["kl_median"] < MAX_MEDIAN_KL_BUILT
    assert loaded["kl_mean"] < MAX_MEAN_KL
    assert loaded["greedy_equal"] >= loaded["greedy_of"] - MAX_DIFFERENT


def test_a_lost_scale_is_noticed(found: dict[str, dict[str, Any]]) -> None:
    """So that the tests above can fail."""
    lost = found["lost int4"]
    assert "refused" in lost or lost["wrong"] or lost["figures"]["kl_median"] > MAX_MEDIAN_KL
