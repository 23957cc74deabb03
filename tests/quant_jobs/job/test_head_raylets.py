"""A head that the recipe quantizes, on three workers of a real Ray: the bytes of one worker."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.kill_rounds import NUM_WORKERS, command, recipe_of, reference
from support.quantizing import SmallModel, contents, make_small_model
from support.raylets import Raylets

from deepseek.artifact.reader import ArtifactReader
from deepseek.inventory import HEAD
from deepseek.recipe import Recipe

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

#: GPTQ of the head needs the rows of every block, from all workers, at the one that solves it.
GPTQ_HEAD: dict[str, Any] = {
    "match": HEAD,
    "weights": "int4",
    "group_size": 32,
    "algorithm": "gptq",
    "clip": "mse",
}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Raylets]:
    with Raylets(NUM_WORKERS) as raylets:
        yield raylets


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return make_small_model(tmp_path_factory.mktemp("model"), vocab_size=512)


def int8_head() -> Recipe:
    return recipe_of("int8-head")


def gptq_head() -> Recipe:
    content = recipe_of("int8-head").model_dump(mode="json")
    content["rules"][-1] = GPTQ_HEAD
    return Recipe.model_validate(content | {"name": "gptq-head"})


@pytest.mark.parametrize("make", [int8_head, pytest.param(gptq_head, marks=pytest.mark.slow)])
def test_three_workers_write_the_bytes_of_one_process(
    make: Any, cluster: Raylets, model: SmallModel, tmp_path: Path
) -> None:
    recipe: Recipe = make()
    expected = reference(model, recipe, tmp_path / "reference")
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    output = tmp_path / "out"
    ended = subprocess.run(
        command(model, file, output, NUM_WORKERS),
        env={**os.environ, "RAY_ADDRESS": cluster.address},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert f"{NUM_WORKERS} workers" in ended.stderr
    assert contents(output) == expected
    artifact = ArtifactReader(output)
    assert artifact.schemes[HEAD] == recipe.rules[-1].scheme
    assert HEAD in artifact.manifest.record("globals").errors
