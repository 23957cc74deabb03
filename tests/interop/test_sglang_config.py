"""SGLang's own config, choice of schemes, model and loader on artifacts of ours: loaded with every
parameter holding the artifact's values, or refused in words that are recorded. No kernel runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.environments import environment, run_in
from support.interop import MTP_LAYER, checkpoints, keep_or_compare, records_of

pytestmark = [pytest.mark.interop, pytest.mark.timeout(1800)]

#: Recipes that are not built for it: its loader of packed experts cannot take zero points.
NOT_BUILT = {"int4-asym", "int8-asym"}
#: Parameters that a checkpoint without reordered activations does not have.
OF_REORDERING = ("_g_idx", "_g_idx_sort_indices")
#: A shape that nothing reads; its loader puts two of them into the place of one.
SHAPE = ".fused_qkv_a_proj_with_mqa.weight_shape"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="module")
def found(tiny_model: Path, base: Path) -> dict[str, dict[str, Any]]:
    """What SGLang made of each artifact; started once, because importing it takes longest."""
    folder = base / "sglang"
    folder.mkdir()
    given = checkpoints(tiny_model, "sglang", base)
    words = {name: str(path) for name, path in given.items()}
    words["int8 as w8a8_int8"] = f"{given['int8']}=w8a8_int8"
    words["silent"] = f"{silent_about_o_proj(given['int8'], folder / 'silent')}=w8a8_int8"
    (packages,) = environment("sglang").parents[1].glob("lib/python*/site-packages")
    output = folder / "found.json"
    run_in("vllm_bench", "run_sglang_model.py", packages, output, *words.values())
    by_word = json.loads(output.read_text())
    return {name: by_word[word] for name, word in words.items()}


def silent_about_o_proj(artifact: Path, copy: Path) -> Path:
    """A copy whose config leaves `o_proj` as it is."""
    shutil.copytree(artifact, copy)
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["ignore"].append("re:.*[.]o_proj$")
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.fixture(scope="module")
def fresh(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return records_of("sglang", "0.5.23", found, package="sglang", test="test_sglang_config.py")


def test_every_recipe_comes_out_as_recorded(fresh: dict[str, Any]) -> None:
    assert keep_or_compare(fresh) == []


def test_it_loads_what_is_built_for_it(fresh: dict[str, Any]) -> None:
    outcomes = fresh["sglang"]["recipes"]
    assert {name for name, made in outcomes.items() if made["input"] != "engine"} == NOT_BUILT
    assert {name for name, made in outcomes.items() if not made["loaded"]} == NOT_BUILT


def test_what_it_loads_holds_the_values_of_the_artifact(found: dict[str, dict[str, Any]]) -> None:
    loaded = [name for name, made in found.items() if "refused" not in made and name != "silent"]
    assert "int8 as w8a8_int8" in loaded
    for name in loaded:
        assert found[name]["wrong"] == []
        absent = (*OF_REORDERING, SHAPE)
        assert [p for p in found[name]["unfilled"] if not p.endswith(absent)] == []
        assert [t for t in found[name]["unread"] if not t.startswith(MTP_LAYER)] == []


def test_a_config_that_is_silent_about_a_linear_is_noticed(
    found: dict[str, dict[str, Any]],
) -> None:
    """So that the tests above can fail."""
    silent = found["silent"]
    assert "refused" in silent or "o_proj" in " ".join((*silent["wrong"], *silent["unread"]))
