"""The plots that both pages have."""

from __future__ import annotations

import base64
import io
import re

import pytest
from matplotlib.image import imread

from quant_jobs.reports.figures import coverage, layer_errors

pytestmark = pytest.mark.heavy

RED = (0xC0, 0x39, 0x2B)


def red_pixels(svg: str) -> list[list[bool]]:
    """Which pixels of the plot's heat map are red, by layer and expert. The color bar is a picture
    too; the heat map comes first."""
    encoded = re.findall(r'"data:image/png;base64,([^"]+)"', svg)[0]
    image = imread(io.BytesIO(base64.b64decode(encoded)), format="png")
    return [[tuple(round(255 * v) for v in pixel[:3]) == RED for pixel in row] for row in image]


@pytest.mark.parametrize("floor", [1, 16, 3091])
def test_only_experts_below_the_floor_are_red(floor: int) -> None:
    counts = {1: [floor - 1, floor, floor + 1], 2: [10 * floor, 1000 * floor, 0]}
    assert red_pixels(coverage(counts, floor)) == [[True, False, False], [False, False, True]]


def test_where_no_expert_is_starved_none_is_red() -> None:
    """The scale begins at the smallest count, whose logarithm may round below it."""
    for smallest in (17, 3091, 4999):
        (row,) = red_pixels(coverage({1: [smallest, 5000]}, 16))
        assert row == [False, False]


def test_an_error_of_zero_and_an_odd_number_of_groups_can_be_drawn() -> None:
    errors = {
        "model.layers.0.self_attn.o_proj": 0.0,
        "model.layers.0.mlp.up_proj": 0.01,
        "model.layers.1.mlp.experts.0.down_proj": 0.02,
    }
    svg = layer_errors(errors)
    for group in ("attention", "dense MLP, shared expert", "routed down"):
        assert f">{group}</text>" in svg
    assert "routed gate and up" not in svg
