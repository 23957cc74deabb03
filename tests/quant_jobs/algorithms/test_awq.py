"""AWQ's searches: equal to slow references, and better than plain rounding where inputs differ."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from deepseek.errors import CheckpointError
from deepseek.formats import compress, decompress
from deepseek.recipe import Scheme, WeightFormat
from quant_jobs.algorithms.awq import (
    CLIP_SHRINK,
    candidate_scales,
    note_clipped,
    scale_losses,
    search_clip,
    weight_means,
)
from quant_jobs.algorithms.ledger import Ledger
from quant_jobs.algorithms.ranges import Range, group_ranges, grouped, nearest, range_between

FORMATS: list[tuple[WeightFormat, int | None]] = [
    ("int4", 32),
    ("int4", 128),
    ("int4-asym", 64),
    ("int8", None),
    ("int8-asym", None),
]


def awq(weights: WeightFormat, group_size: int | None) -> Scheme:
    return Scheme(weights=weights, group_size=group_size, algorithm="awq")


def case(rows: int = 48, columns: int = 256, tokens: int = 96, seed: int = 0) -> Sequence[Tensor]:
    """Weights f32 [N, K] and inputs f32 [R, K] with a few channels 30 times the others."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(tokens, columns, generator=generator)
    x[:, ::41] *= 30
    return weight, x


def best_scale(weight: Tensor, x: Tensor, scheme: Scheme) -> Tensor:
    total, count = weight_means(weight, scheme)
    candidates = candidate_scales(x.abs().mean(dim=0), (total / count).float())
    return candidates[scale_losses([weight], x, candidates, scheme).argmin()]


def restore(weight: Tensor, chosen: Range, scheme: Scheme) -> Tensor:
    """Through the bytes of the artifact, f32 [N, K]."""
    stored = compress(weight, scheme, scale=chosen.scale, zero_point=chosen.zero_point)
    return decompress(stored, scheme, (weight.shape[0], weight.shape[1]))


def output_error(weight: Tensor, restored: Tensor, x: Tensor) -> float:
    wanted = x.double() @ weight.double().T
    return float((x.double() @ restored.double().T - wanted).norm() / wanted.norm())


@pytest.mark.parametrize(("weights", "group_size"), FORMATS)
def test_scale_and_clip_each_beat_plain_rounding(
    weights: WeightFormat, group_size: int | None
) -> None:
    scheme = awq(weights, group_size)
    weight, x = case(tokens=512)
    x, unseen = x[:256], x[256:]
    scale = best_scale(weight, x, scheme)
    scaled = weight * scale
    plain = output_error(weight, restore(weight, group_ranges(weight, scheme), scheme), unseen)
    clipped = output_error(weight, restore(weight, search_clip(weight, x, scheme), scheme), unseen)
    only_scaled = restore(scaled, group_ranges(scaled, scheme), scheme) / scale
    both = restore(scaled, search_clip(scaled, x / scale, scheme), scheme) / scale
    assert output_error(weight, only_scaled, unseen) < 0.8 * plain
    assert clipped < plain
    assert output_error(weight, both, unseen) < output_error(weight, only_scaled, unseen)


@pytest.mark.parametrize(("weights", "group_size"), FORMATS)
def test_losses_are_the_output_errors_of_a_double_loop(
    weights: WeightFormat, group_size: int | None
) -> None:
    scheme = awq(weights, group_size)
    weight, x = case(rows=12, tokens=20)
    other, _ = case(rows=7, tokens=20, seed=1)
    candidates = candidate_scales(x.abs().mean(dim=0), torch.rand(256) + 0.1, num=5)
    found = scale_losses([weight, other], x, candidates, scheme)
    assert found.dtype == torch.float64
    for loss, scale in zip(found.tolist(), candidates, strict=True):
        wanted = 0.0
        for one in (weight, other):
            scaled = one * scale
            restored = restore(scaled, group_ranges(scaled, scheme), scheme).double()
            for token in x.double():
                error = restored @ (token / scale) - one.double() @ token
                wanted += float(error @ error)
        assert loss == pytest.approx(wanted, rel=1e-4)
    assert found.argmin() != found.argmax()


def test_losses_of_linears_add_up_to_the_bit_in_module_order() -> None:
    scheme = awq("int4", 32)
    modules = [case(rows=9 + index, seed=index)[0] for index in range(6)]
    _, x = case()
    candidates = candidate_scales(x.abs().mean(dim=0), torch.rand(256) + 0.1)
    whole = scale_losses(modules, x, candidates, scheme)
    total = torch.zeros(20, dtype=torch.float64)
    for weight in modules:
        total += scale_losses([weight], x, candidates, scheme)
    assert torch.equal(total, whole)


@pytest.mark.parametrize("tokens", [24, 200])  # fewer and more than a group's inputs
@pytest.mark.parametrize(("weights", "group_size"), FORMATS)
def test_clip_search_is_the_best_of_all_by_brute_force(
    weights: WeightFormat, group_size: int | None, tokens: int
) -> None:
    scheme = awq(weights, group_size)
    weight, x = case(rows=5, columns=128, tokens=tokens)
    found = search_clip(weight, x, scheme)
    groups, inputs = grouped(weight, scheme), grouped(x, scheme).double()
    assert found.scale.shape == groups.shape[:2]
    clipped = 0
    for row in range(groups.shape[0]):
        for column in range(groups.shape[1]):
            group = groups[row, column]
            tried = [
                range_between(group.amin() * factor, group.amax() * factor, scheme)
                for factor in CLIP_SHRINK
            ]
            errors = []
            for one in tried:
                difference = nearest(group, one, scheme).double() - group.double()
                errors.append(float((inputs[:, column] @ difference).square().sum()))
            mine = [
                index
                for index, one in enumerate(tried)
                if one.scale == found.scale[row, column]
                and (
                    one.zero_point is None
                    or found.zero_point is None
                    or one.zero_point == found.zero_point[row, column]
                )
            ]
            assert mine
            assert errors[mine[0]] <= min(errors) * (1 + 1e-4)
            clipped += mine[0] > 0
    assert clipped > 0


@pytest.mark.parametrize(("weights", "group_size"), FORMATS)
def test_clipped_ranges_are_stored_as_they_are(
    weights: WeightFormat, group_size: int | None
) -> None:
    scheme = awq(weights, group_size)
    weight, x = case()
    weight[3] = 0.0
    found = search_clip(weight, x, scheme)
    expected = nearest(grouped(weight, scheme), found, scheme).flatten(1)
    assert torch.equal(restore(weight, found, scheme), expected)
    assert (found.scale[3] == 1.0).all()
    assert not expected[3].any()


def test_without_input_nothing_is_clipped() -> None:
    scheme = awq("int4-asym", 32)
    weight, x = case()
    x[:, 32:64] = 0.0
    found, plain = search_clip(weight, x, scheme), group_ranges(weight, scheme)
    assert torch.equal(found.scale[:, 1], plain.scale[:, 1])
    assert (found.scale[:, 0] < plain.scale[:, 0]).any()


def test_weight_means_merge_like_one_weight() -> None:
    scheme = awq("int4", 64)
    weight, _ = case()
    weight[5, :64] = 0.0  # a group without weights
    total, count = weight_means(weight, scheme)
    peak = grouped(weight, scheme).abs().amax(dim=-1, keepdim=True).clamp_min(1e-30)
    relative = (grouped(weight, scheme).abs() / peak).flatten(1).double()
    torch.testing.assert_close(total / count, relative.mean(dim=0), rtol=1e-12, atol=0.0)
    parts = [weight_means(part, scheme) for part in (weight[:20], weight[20:])]
    merged = sum(part for part, _ in parts)
    torch.testing.assert_close(merged, total, rtol=1e-12, atol=0.0)
    assert sum(rows for _, rows in parts) == count == 48


def test_candidates_are_ones_then_both_formulas_between_their_ends() -> None:
    generator = torch.Generator().manual_seed(2)
    mean_x, mean_w = (torch.rand(64, generator=generator) + 0.05 for _ in range(2))
    found = candidate_scales(mean_x, mean_w, num=8)
    wanted = [mean_x**ratio for ratio in (0.0, 0.25, 0.5, 0.75, 1.0)]
    wanted += [mean_x**ratio / mean_w ** (1 - ratio) for ratio in (0.0, 0.5, 1.0)]
    assert torch.equal(found[0], torch.ones(64))
    for row, scale in zip(found, wanted, strict=True):
        torch.testing.assert_close(row, scale / (scale.max() * scale.min()).sqrt())
    assert candidate_scales(mean_x, mean_w).shape == (20, 64)


def test_dead_channels_stay_and_clipped_scales_are_counted() -> None:
    mean_x = torch.tensor([0.0, 1e20, 1e-20, 1.0, 2.0])
    mean_w = torch.tensor([0.5, 0.5, 0.5, 0.0, 0.5])
    found = candidate_scales(mean_x, mean_w)
    assert found.isfinite().all()
    assert (found[:, [0, 3]] == 1.0).all()
    assert found.min() == 2.0**-10
    assert found.max() == 2.0**10
    ledger = Ledger()
    note_clipped(found[-1], "m", 3, ledger)
    note_clipped(found[0], "n", 3, ledger)
    counted = {(e.kind, e.layer, e.module, e.count) for e in ledger.entries()}
    assert counted == {("clipped_smoothing", 3, "m", 2)}
    assert (candidate_scales(torch.zeros(5), mean_w) == 1.0).all()


def test_plain_rounding_wins_where_scaling_cannot_help() -> None:
    """Weights already on the grid: any other scale than 1 moves them off it."""
    scheme = awq("int4", 32)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randint(-7, 8, (16, 64), generator=generator).float()
    weight[:, ::32] = 7.0
    assert torch.equal(best_scale(weight, case(columns=64)[1], scheme), torch.ones(64))


def test_inputs_are_not_written_to() -> None:
    """Tensors that arrive in messages are read-only memory."""
    weight, x = case()
    kept_weight, kept_x = weight.clone(), x.clone()
    for weights, group_size in FORMATS:
        scheme = awq(weights, group_size)
        best_scale(weight, x, scheme)
        search_clip(weight, x, scheme)
    assert torch.equal(weight, kept_weight)
    assert torch.equal(x, kept_x)


def test_weights_that_no_format_can_hold_are_refused() -> None:
    weight, x = case()
    weight[2, 2] = torch.nan
    with pytest.raises(CheckpointError, match="NaN"):
        search_clip(weight, x, awq("int4", 32))
    with pytest.raises(CheckpointError, match="NaN"):
        scale_losses([weight], x, torch.ones(1, 256), awq("int4", 32))
