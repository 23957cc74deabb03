"""INT8 in tiles: the slow reference, ragged edges, and values that cannot be represented."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepseek.errors import CheckpointError
from deepseek.formats import (
    dequantize_int8_block,
    dequantize_token_groups_int8,
    input_rounding,
    quantize_int8_block,
    quantize_token_groups_int8,
)
from deepseek.recipe import Scheme

TINY = 2.0**-126
SHAPES = [(128, 128), (256, 384), (160, 200), (1, 1), (130, 129)]


def gaussian(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_scales_are_those_of_the_slow_reference(shape: tuple[int, int]) -> None:
    weight = gaussian(shape)
    codes, scale = quantize_int8_block(weight)
    restored = dequantize_int8_block(codes, scale)
    assert codes.dtype == torch.int8
    assert scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    for row in range(0, shape[0], 128):
        for column in range(0, shape[1], 128):
            tile = weight[row : row + 128, column : column + 128]
            expected = tile.abs().max() / 127
            assert scale[row // 128, column // 128] == expected
            steps = (tile / expected).round().clamp(-128, 127)
            part = slice(row, row + 128), slice(column, column + 128)
            assert torch.equal(codes[part].float(), steps)
            assert torch.equal(restored[part], steps * expected)


@pytest.mark.parametrize("scale", [TINY, 0.003, 1.0, 3e30])
def test_all_256_codes_survive_their_own_scale(scale: float) -> None:
    codes = torch.arange(-128, 128).to(torch.int8).view(2, 128)
    stored = torch.full((1, 1), scale)
    again, same = quantize_int8_block(dequantize_int8_block(codes, stored), scale=stored)
    assert torch.equal(again, codes)
    assert torch.equal(same, stored)


def test_a_tile_of_zeros_has_scale_1_and_one_of_the_smallest_numbers_a_normal_scale() -> None:
    weight = torch.zeros(256, 130)
    weight[200, 5] = 2.0**-140
    codes, scale = quantize_int8_block(weight)
    assert scale.tolist() == [[1.0, 1.0], [TINY, 1.0]]
    assert codes.count_nonzero() == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e38])
@pytest.mark.parametrize("place", [(0, 0), (129, 129), (127, 129)])
def test_a_value_that_cannot_be_represented_is_refused_wherever_it_is(
    bad: float, place: tuple[int, int]
) -> None:
    weight = gaussian((130, 130))
    weight[place] = bad
    with pytest.raises(CheckpointError, match="holds NaN, infinity or magnitudes above"):
        quantize_int8_block(weight)


def test_a_smaller_amax_clips_and_a_wrong_shape_is_a_bug() -> None:
    weight = gaussian((130, 130))
    codes, _ = quantize_int8_block(weight, amax=torch.full((2, 2), 0.01))
    assert codes.min() == -128
    assert codes.max() == 127
    for wrong in (torch.ones(1, 1), torch.ones(130, 1), torch.ones(2)):
        with pytest.raises(AssertionError):
            quantize_int8_block(weight, amax=wrong)


@pytest.mark.parametrize("shape", [(5, 256), (3, 2, 200), (1, 64), (0, 128)])
def test_tokens_are_rounded_per_128_channels(shape: tuple[int, ...]) -> None:
    x = 3 * gaussian(shape, seed=2)
    codes, scale = quantize_token_groups_int8(x)
    assert codes.shape == shape
    assert scale.shape == (*shape[:-1], -(-shape[-1] // 128))
    for group, first in enumerate(range(0, shape[-1], 128)):
        part = x[..., first : first + 128]
        expected = part.abs().amax(-1) / 127 if part.numel() else scale[..., group]
        assert torch.equal(scale[..., group], expected)
        steps = (part / expected[..., None]).round()
        assert torch.equal(codes[..., first : first + 128].float(), steps)
    rounding = input_rounding(Scheme(weights="int8-block", activations="int8"))
    assert rounding is not None
    assert torch.equal(rounding(x), dequantize_token_groups_int8(codes, scale))
    error = (dequantize_token_groups_int8(codes, scale) - x).abs()
    assert (error <= scale.repeat_interleave(128, -1)[..., : shape[-1]] * 0.5001).all()


def test_tokens_of_zeros_nan_and_infinity_stay_what_they_are() -> None:
    x = torch.zeros(3, 256)
    x[1, 130], x[2, 0] = float("nan"), float("inf")
    restored = dequantize_token_groups_int8(*quantize_token_groups_int8(x))
    assert torch.equal(restored[0], torch.zeros(256))
    assert torch.equal(restored[1, :128], torch.zeros(128))
    assert not restored[1, 128:].isfinite().any()
    assert not restored[2, :128].isfinite().any()
