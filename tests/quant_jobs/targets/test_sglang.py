"""`build --target sglang`: the directories of every dialect, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.sglang_builds import FITTING, build_sglang
from support.trtllm_builds import make_buildable

from deepseek.artifact.reader import ArtifactReader
from deepseek.errors import DeployError, IntServeError
from quant_jobs.check import run_check


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact and its engine for every recipe of `FITTING`: NAME/artifact, NAME/engine."""
    root = tmp_path_factory.mktemp("sglang")
    for recipe in FITTING:
        make_buildable(root / recipe, recipe)
        build_sglang(root / recipe / "artifact", root / recipe / "engine")
    return root


def fields(engine: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((engine / "engine.json").read_text())
    return content["target_fields"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("recipe", FITTING)
def test_the_dialect_is_the_one_in_which_the_artifact_runs_as_it_was_judged(
    made: Path, recipe: str
) -> None:
    assert fields(made / recipe / "engine")["dialect"] == FITTING[recipe]


@pytest.mark.parametrize("recipe", FITTING)
def test_every_rank_holds_the_artifacts_values_bit_for_bit(made: Path, recipe: str) -> None:
    result = run_check(made / recipe / "engine", made / recipe / "artifact")
    assert result.compared > 100
    assert result.verified > 50
    assert len(result.ranks) == 4
