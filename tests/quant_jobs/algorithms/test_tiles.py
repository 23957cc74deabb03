"""INT8 tiles of 128 x 128: their ranges, ragged ones included, and GPTQ on their grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from deepseek.formats import compress, decompress, num_tiles, quantize_int8_block
from deepseek.recipe import Clip, Scheme
from quant_jobs.algorithms.gptq import gptq, inverse_factor
from quant_jobs.algorithms.ranges import choose_range, group_ranges

SHAPES = [(256, 256), (160, 200), (40, 96), (130, 384)]


def scheme(clip: Clip = "max", **more: object) -> Scheme:
    tiles = {"weights": "int8-block", "activations": "int8", "clip": clip}
    return Scheme.model_validate(tiles | more)


def heavy_tailed(shape: tuple[int, int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    return weight * (1 + 5 * (torch.rand(shape, generator=generator) > 0.99))


def tiles_of(weight: Tensor) -> list[list[Tensor]]:
    return [list(strip.split(128, dim=1)) for strip in weight.split(128)]


@pytest.mark.parametrize("shape", SHAPES)
def test_clip_max_is_the_formats_own_choice_to_the_bit(shape: tuple[int, int]) -> None:
    weight = heavy_tailed(shape)
    assert torch.equal(group_ranges(weight, scheme()).scale, quantize_int8_block(weight)[1])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("clip", ["percentile", "mse"])
def test_a_tiles_range_is_that_of_its_own_weights(shape: tuple[int, int], clip: Clip) -> None:
    weight = heavy_tailed(shape)
    found = group_ranges(weight, scheme(clip)).scale
    assert found.shape == num_tiles(shape)
    for row, tiles in enumerate(tiles_of(weight)):
        for column, tile in enumerate(tiles):
            alone = choose_range(tile.reshape(1, -1), scheme(clip)).scale
            assert found[row, column] == alone[0]


def test_the_percentile_of_a_ragged_tile_is_numpys_of_its_weights_alone() -> None:
    weight = heavy_tailed((130, 200))
    found = group_ranges(weight, scheme("percentile", percentile=90.0)).scale
    for row, tiles in enumerate(tiles_of(weight)):
        for column, tile in enumerate(tiles):
            peak = np.quantile(tile.abs().double().numpy(), 0.9)
            assert found[row, column].item() == pytest.approx(peak / 127, rel=1e-6)


def test_a_tile_of_zeros_has_scale_1_with_every_clip() -> None:
    weight = heavy_tailed((256, 256))
    weight[128:, :128] = 0.0
    for clip in ("max", "percentile", "mse"):
        found = group_ranges(weight, scheme(clip)).scale
        assert found[1, 0] == 1.0
        assert (found != 1.0).sum() == 3


def correlated(tokens: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    few = torch.randn(tokens, columns // 4, generator=generator)
    mixed = few @ torch.randn(columns // 4, columns, generator=generator)
    x = mixed * (columns // 4) ** -0.5 + 0.3 * torch.randn(tokens, columns, generator=generator)
    x[:, ::29] *= 6
    return x


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("rows", [128, 72])
def test_gptq_stays_on_the_grid_of_its_tiles_and_errs_less_than_nearest(
    rows: int, act_order: bool
) -> None:
    one = scheme(algorithm="gptq", act_order=act_order)
    weight, x = heavy_tailed((rows, 320)), correlated(700, 320)
    factor = inverse_factor(x.T @ x, one.damping, act_order=act_order)
    (solved,) = gptq(weight[None].clone(), [factor], one)
    scale = solved.scale[::128]
    assert torch.equal(scale, group_ranges(weight, one).scale)
    stored = compress(solved.weight, one, scale=scale)
    restored = decompress(stored, one, (rows, 320))
    torch.testing.assert_close(restored, solved.weight, rtol=1e-6, atol=0.0)
    plain = decompress(compress(weight, one), one, (rows, 320))
    loss = (x @ (restored - weight).T).square().sum()
    assert loss < 0.7 * (x @ (plain - weight).T).square().sum()


def test_linears_that_gptq_solves_stacked_have_tiles_of_their_own() -> None:
    """The second begins in the middle of 128 rows."""
    one = scheme(algorithm="gptq")
    first, second = heavy_tailed((72, 256)), heavy_tailed((72, 256), seed=1)
    x = correlated(700, 256)
    factor = inverse_factor(x.T @ x, one.damping)
    (together,) = gptq(torch.cat((first, second))[None], [factor], one, stacked=2)
    for part, weight in zip(together.split(2), (first, second), strict=True):
        (alone,) = gptq(weight[None].clone(), [factor], one)
        assert torch.equal(part.scale, alone.scale)
        torch.testing.assert_close(part.weight, alone.weight, rtol=1e-6, atol=0.0)
