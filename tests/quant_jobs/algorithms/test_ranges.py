"""Clipping ranges: equal to the formats' own at `max`, to slow references elsewhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from deepseek.errors import CheckpointError
from deepseek.formats import quantize_int4, quantize_int8
from deepseek.recipe import Clip, Scheme, WeightFormat
from quant_jobs.algorithms.ranges import MSE_SHRINK, Range, choose_range, group_ranges, nearest

FORMATS: list[tuple[WeightFormat, int | None]] = [
    ("int4", 32),
    ("int4-asym", 128),
    ("int8", None),
    ("int8-asym", None),
]


def scheme(
    weights: WeightFormat, group_size: int | None, clip: Clip = "max", percentile: float = 99.9
) -> Scheme:
    return Scheme(weights=weights, group_size=group_size, clip=clip, percentile=percentile)


def heavy_tailed(rows: int = 24, columns: int = 256, seed: int = 0) -> Tensor:
    """f32 [N, K], off center, a few large values; one row of zeros, one positive, one negative."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) + 0.3
    weight *= 1 + 5 * (torch.rand(rows, columns, generator=generator) > 0.99)
    weight[1], weight[2], weight[3] = 0.0, weight[2].abs(), -weight[3].abs()
    return weight


def normal(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


def slow_range(group: list[float], factor: float, one: Scheme) -> tuple[float, int]:
    """The conventions of deepseek.formats, one group at a time in plain Python and NumPy floats."""
    levels = 2**one.bits
    f32 = np.float32
    low, high = f32(min(group)) * f32(factor), f32(max(group)) * f32(factor)
    if one.is_symmetric:
        width, steps = max(-low, high), levels // 2 - 1
    else:
        low, high = min(low, f32(0)), max(high, f32(0))
        width, steps = f32(high - low), levels - 1
    scale = f32(1) if width == 0 else f32(width / f32(steps))
    if one.bits == 4:
        scale = f32(torch.tensor(scale).bfloat16().item())
    if one.is_symmetric:
        return float(scale), 0
    zero_point = round(float(f32(-levels // 2) - f32(low / scale)))
    return float(scale), max(-levels // 2, min(zero_point, levels // 2 - 1))


def slow_error(group: list[float], scale: float, zero_point: int, one: Scheme) -> float:
    lowest, highest = -(2 ** (one.bits - 1)), 2 ** (one.bits - 1) - 1
    error = 0.0
    for value in group:
        code = max(lowest, min(round(value / scale + zero_point), highest))
        error += ((code - zero_point) * scale - value) ** 2
    return error


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_clip_max_is_the_formats_own_choice_to_the_bit(group_size: int) -> None:
    weight = heavy_tailed()
    found = group_ranges(weight, scheme("int4", group_size))
    _, scale, _ = quantize_int4(weight, group_size)
    assert torch.equal(found.scale, scale.float())
    assert found.zero_point is None
    found = group_ranges(weight, scheme("int4-asym", group_size))
    _, scale, zero_point = quantize_int4(weight, group_size, symmetric=False)
    assert zero_point is not None
    same_as(found, Range(scale.float(), zero_point))
    assert len(set(zero_point.flatten().tolist())) > 3
    found = group_ranges(weight, scheme("int8", None))
    assert torch.equal(found.scale, quantize_int8(weight)[1])
    assert found.scale[1] == 1.0


@pytest.mark.parametrize(("weights", "group_size"), FORMATS)
@pytest.mark.parametrize("clip", ["max", "percentile", "mse"])
def test_scales_are_what_is_stored_and_zero_is_exact(
    weights: WeightFormat, group_size: int | None, clip: Clip
) -> None:
    weight, one = heavy_tailed(), scheme(weights, group_size, clip)
    found = group_ranges(weight, one)
    assert found.scale.shape == (24, 256 // (group_size or 256))
    assert found.scale.dtype == torch.float32
    if one.bits == 4:
        assert torch.equal(found.scale.bfloat16().float(), found.scale)
    assert (found.scale[1] == 1.0).all()
    assert (found.zero_point is None) == one.is_symmetric
    zeros = torch.zeros(24, 256).view(*found.scale.shape, -1)
    assert torch.equal(nearest(zeros, found, one), zeros)


@pytest.mark.parametrize(("weights", "group_size"), FORMATS)
def test_mse_is_the_best_of_all_shrunk_ranges_by_brute_force(
    weights: WeightFormat, group_size: int | None
) -> None:
    one = scheme(weights, group_size, "mse")
    # A channel of 256 levels gains from clipping only where it is long.
    weight = heavy_tailed(6, 128) if group_size else normal(2, 8192)
    found = group_ranges(weight, one)
    groups = weight.view(*found.scale.shape, -1)
    shrunk = 0
    for row, column in np.ndindex(*found.scale.shape):
        group = groups[row, column].tolist()
        ranges = [slow_range(group, factor, one) for factor in MSE_SHRINK]
        errors = [slow_error(group, *tried, one) for tried in ranges]
        zero_point = 0 if found.zero_point is None else int(found.zero_point[row, column])
        mine = (float(found.scale[row, column]), zero_point)
        assert mine in ranges
        # Two ranges may err alike but for the rounding of a float32 sum.
        assert errors[ranges.index(mine)] <= min(errors) * (1 + 1e-5)
        shrunk += ranges.index(mine) > 0
    assert shrunk > found.scale.numel() / 4


def test_of_ranges_that_err_alike_the_largest_is_kept() -> None:
    one = scheme("int8", None, "mse")
    lone = torch.zeros(1, 64)
    lone[0, 5] = 127.0  # exact at full range; every smaller range clips it
    assert choose_range(lone, one).scale.tolist() == [1.0]
    assert choose_range(torch.zeros(2, 64), one).scale.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("percentile", [75.0, 99.0, 99.9])
def test_percentile_is_numpys_with_linear_interpolation(percentile: float) -> None:
    weight = heavy_tailed()[4:]
    found = group_ranges(weight, scheme("int8", None, "percentile", percentile))
    peak = np.quantile(weight.abs().double().numpy(), percentile / 100, axis=1)
    torch.testing.assert_close(found.scale[:, 0].double(), torch.tensor(peak) / 127)
    found = group_ranges(weight, scheme("int8-asym", None, "percentile", percentile))
    low, high = np.quantile(
        weight.double().numpy(), [1 - percentile / 100, percentile / 100], axis=1
    )
    width = torch.tensor(np.maximum(high, 0) - np.minimum(low, 0))
    torch.testing.assert_close(found.scale[:, 0].double(), width / 255)


@pytest.mark.parametrize(("weights", "group_size"), FORMATS)
def test_percentile_100_is_max_and_a_lone_weight_keeps_its_range(
    weights: WeightFormat, group_size: int | None
) -> None:
    weight = heavy_tailed()
    weight[5], weight[5, 7] = 0.0, -3.0
    for percentile, rows in ((100.0, slice(None)), (60.0, slice(5, 6))):
        found = group_ranges(weight[rows], scheme(weights, group_size, "percentile", percentile))
        same_as(found, group_ranges(weight[rows], scheme(weights, group_size)))


@pytest.mark.parametrize(("weights", "group_size"), FORMATS)
def test_mse_errs_less_than_max_at_the_same_weights(
    weights: WeightFormat, group_size: int | None
) -> None:
    weight = normal(8, 8192)
    errors = []
    for clip in ("max", "mse"):
        one = scheme(weights, group_size, clip)
        found = group_ranges(weight, one)
        groups = weight.view(*found.scale.shape, -1)
        errors.append(float((nearest(groups, found, one) - groups).square().sum()))
    assert errors[1] < 0.99 * errors[0]


@pytest.mark.parametrize("clip", ["max", "percentile", "mse"])
def test_a_stack_of_weights_gets_the_ranges_of_each(clip: Clip) -> None:
    """Whatever is searched together, in chunks cut wherever they fall, the bytes are the same."""
    one = scheme("int4-asym", 128, clip)
    stack = torch.stack([heavy_tailed(700, 256, seed) for seed in range(5)]).view(5, 700, 2, 128)
    together = choose_range(stack, one)
    assert together.scale.shape == (5, 700, 2)
    for index, weight in enumerate(stack):
        zero_point = None if together.zero_point is None else together.zero_point[index]
        same_as(Range(together.scale[index], zero_point), choose_range(weight, one))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1e38])
def test_weights_that_no_format_can_hold_are_refused(bad: float) -> None:
    weight = heavy_tailed()
    weight[4, 4] = bad
    for clip in ("max", "percentile", "mse"):
        with pytest.raises(CheckpointError, match="NaN, infinity"):
            group_ranges(weight, scheme("int4", 32, clip))


def same_as(found: Range, wanted: Range) -> None:
    assert torch.equal(found.scale, wanted.scale)
    assert (found.zero_point is None) == (wanted.zero_point is None)
    if found.zero_point is not None and wanted.zero_point is not None:
        assert torch.equal(found.zero_point, wanted.zero_point)
