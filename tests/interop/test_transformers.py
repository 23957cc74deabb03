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
    calibrated_artifact,
    embedded_answers,
    held_out,
    judged,
    keep_or_compare,
    outcome,
)

from deepseek.artifact.manifest import FORMAT_VERSION

pytestmark = [pytest.mark.interop, pytest.mark.timeout(1800)]

#: Recipes that transformers refuses: it has no experts with INT8 activations, and it drops the zero
#: points of experts.
REFUSED = ("int4-asym", "int8", "int8-asym", "int8-smoothquant")
#: Largest median and mean KL in nats per token, as in `test_oracle.py`: transformers computes in
#: FP32, our kernels take BF16 activations; and w4a8's experts take FP8 inputs here alone.
MAX_MEDIAN_KL, MAX_MEAN_KL, MAX_MEDIAN_KL_FP8 = 3e-5, 5e-3, 5e-4
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
    artifacts = {name: calibrated_artifact(tiny_model, name, base) for name in RECIPES}
    artifacts["lost"] = lost_scale(artifacts["int4"], folder / "lost")
    words = held_out(tiny_model, base), folder, *artifacts.values()
    run_in("transformers", "run_transformers.py", *words)
    by_path = json.loads((folder / "found.json").read_text())
    results = {}
    for number, (name, path) in enumerate(artifacts.items()):
        results[name] = by_path[str(path)]
        answers = folder / f"{number}.safetensors"
        if answers.exists():
            theirs = load_file(answers)
            recipe = name if name in RECIPES else "int4"
            ours = embedded_answers(tiny_model, recipe, base, theirs["greedy"].shape[1])
            results[name]["figures"] = judged(theirs, ours)
    return results


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
    return {
        "tool": "transformers",
        "version": "5.23.0",
        "package": "transformers==5.23.0",
        "test": "tests/interop/test_transformers.py",
        "artifact_form": FORMAT_VERSION,
        "recipes": {
            name: outcome(found[name], "artifact", found[name].get("figures", {}))
            for name in RECIPES
        },
    }


def test_every_recipe_comes_out_as_recorded(fresh: dict[str, Any]) -> None:
    assert keep_or_compare("transformers", fresh) == []


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in REFUSED])
def test_it_loads_and_says_what_the_engine_says(name: str, fresh: dict[str, Any]) -> None:
    loaded = fresh["recipes"][name]
    assert loaded["loaded"], loaded
    assert loaded["wrong"] == []
    static = name == "w4a8"
    assert all(tensor.endswith("_proj.input_scale") for tensor in loaded["unread"])
    assert bool(loaded["unread"]) == static
    assert loaded["kl_median"] < (MAX_MEDIAN_KL_FP8 if static else MAX_MEDIAN_KL)
    assert loaded["kl_mean"] < MAX_MEAN_KL
    assert loaded["greedy_equal"] >= loaded["greedy_of"] - MAX_DIFFERENT


@pytest.mark.parametrize("name", REFUSED)
def test_it_refuses(name: str, fresh: dict[str, Any]) -> None:
    assert not fresh["recipes"][name]["loaded"]


def test_a_lost_scale_is_noticed(found: dict[str, dict[str, Any]]) -> None:
    """So that the tests above can fail."""
    lost = found["lost"]
    assert "refused" in lost or lost["wrong"] or lost["figures"]["kl_median"] > MAX_MEDIAN_KL
