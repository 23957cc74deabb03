"""The byte table of DeepSeek-V3 as it is built for TensorRT-LLM, against published sizes and the
plan."""

from __future__ import annotations

import pytest

from cluster.built_bytes import RANKS, RELEASE, BuiltBytes, built_bytes
from cluster.choice import tally_of
from cluster.memory import Tally
from deepseek.models import DEEPSEEK_V3
from deepseek.recipe import load_recipe
from deepseek.trtllm.layout import stored_schemes

#: (recipe, dialect) -> GB of the scheme without the MTP layer, embedding and head in BF16, as they
#: were computed from the shapes elsewhere: INT4 g128 experts with FP8 and with BF16 beside them,
#: the native FP8 release, and INT8 in place of its experts' FP8 (a scale for every output channel
#: in place of one for 16,384 values).
KNOWN_GB = {
    ("int4", "mixed"): 356.3,
    ("int4", "single"): 371.4,
    ("w4a8", "mixed"): 356.3,
    ("w4a8", "single"): 371.4,
    ("int8-experts", "mixed"): 673.1,
    ("int8-experts", "single"): 673.1 + 15.1,
    (RELEASE.name, "released"): 673.1,
}


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, str], BuiltBytes]:
    return {(row.recipe, row.dialect): row for row in built_bytes()}


@pytest.mark.heavy
def test_the_totals_are_the_known_sizes_within_1_percent(
    rows: dict[tuple[str, str], BuiltBytes],
) -> None:
    assert rows.keys() == KNOWN_GB.keys()
    for key, row in rows.items():
        assert row.total / 1e9 == pytest.approx(KNOWN_GB[key], rel=0.01), key


@pytest.mark.heavy
def test_each_rank_holds_what_is_planned_within_2_percent(
    rows: dict[tuple[str, str], BuiltBytes],
) -> None:
    """The plan counts the artifact's tensors, the engine's are those of the directory: INT8 scales
    are FP32 there and BF16 here, and MoE-TP repeats those of down_proj."""
    for row in rows.values():
        recipe = RELEASE if row.recipe == RELEASE.name else load_recipe(row.recipe)
        stored = stored_schemes(DEEPSEEK_V3, tally_of(DEEPSEEK_V3, recipe).schemes, row.dialect)
        tally = Tally(DEEPSEEK_V3, stored)
        for heading, ranks in RANKS.items():
            planned = tally.gpu_footprint(ranks.tp, "bf16", target="trtllm").weights_per_gpu
            assert row.per_rank[heading] == pytest.approx(planned, rel=0.005), (row, heading)
        assert row.plans["16 x 80 GB"].footprint.weights_per_gpu == planned


@pytest.mark.heavy
def test_int8_experts_need_cards_of_96_gb_or_two_nodes(
    rows: dict[tuple[str, str], BuiltBytes],
) -> None:
    good = {
        key: [name for name, plan in row.plans.items() if plan.good] for key, row in rows.items()
    }
    assert good["int8-experts", "mixed"] == ["8 x 96 GB", "8 x 141 GB", "16 x 80 GB"]
    assert good["int8-experts", "single"] == good["int8-experts", "mixed"]
    assert good["int4", "mixed"] == ["8 x 80 GB", "8 x 96 GB", "8 x 141 GB", "16 x 80 GB"]
