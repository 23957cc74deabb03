"""The byte table of DeepSeek-V3 as it is built for vLLM and SGLang, against the plan and shapes."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.deployability import check, served_schemes
from cluster.server_bytes import RECIPES, ServerBytes, server_bytes
from deepseek.config import ModelConfig
from deepseek.recipe import load_recipe


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, str], ServerBytes]:
    return {(row.target, row.recipe): row for row in server_bytes()}


def test_the_table_has_recipes_that_the_target_loads(tiny_model: Path) -> None:
    config = ModelConfig.from_directory(tiny_model)
    for target, names in RECIPES.items():
        for name in names:
            schemes = served_schemes(config, load_recipe(name).resolve(config))
            assert not check(schemes, "bf16", target, "sm90"), (target, name)


@pytest.mark.heavy
def test_each_rank_holds_what_is_planned_within_2_percent(
    rows: dict[tuple[str, str], ServerBytes],
) -> None:
    """The plan counts the artifact's tensors, with scales in FP32 where the directory has BF16."""
    assert rows.keys() == {(target, name) for target in RECIPES for name in RECIPES[target]}
    for row in rows.values():
        for heading, size in row.per_rank.items():
            assert size == pytest.approx(row.planned[heading], rel=0.02), (row.recipe, heading)
            assert row.total / 16 < size < row.total


@pytest.mark.heavy
def test_int4_experts_take_what_was_computed_from_the_shapes_elsewhere(
    rows: dict[tuple[str, str], ServerBytes],
) -> None:
    """INT4 g128 experts and the release's FP8 beside them; INT4 everywhere."""
    for key, size in ((("vllm", "int4"), 356.3), (("vllm", "int4-all"), 348.9)):
        assert rows[key].total / 1e9 == pytest.approx(size, rel=0.01)
    assert rows["sglang", "w4a8"].total / 1e9 == pytest.approx(356.3, rel=0.02)
