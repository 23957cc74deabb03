"""The byte table of DeepSeek-V3 as it is built for vLLM, against the plan and the shapes."""

from __future__ import annotations

import pytest

from cluster.server_bytes import RECIPES, ServerBytes, server_bytes


@pytest.fixture(scope="module")
def rows() -> dict[str, ServerBytes]:
    return {row.recipe: row for row in server_bytes()}


@pytest.mark.heavy
def test_every_recipe_that_vllm_loads_has_a_row_near_the_plan(rows: dict[str, ServerBytes]) -> None:
    """The plan counts the artifact's tensors, with scales in FP32 where the directory has BF16."""
    assert tuple(rows) == RECIPES
    for row in rows.values():
        for heading, size in row.per_rank.items():
            assert size == pytest.approx(row.planned[heading], rel=0.02), (row.recipe, heading)
            assert row.total / 16 < size < row.total


@pytest.mark.heavy
def test_int4_experts_take_what_was_computed_from_the_shapes_elsewhere(
    rows: dict[str, ServerBytes],
) -> None:
    """INT4 g128 experts and the release's FP8 beside them; INT4 everywhere."""
    assert rows["int4"].total / 1e9 == pytest.approx(356.3, rel=0.01)
    assert rows["int4-all"].total / 1e9 == pytest.approx(348.9, rel=0.01)
