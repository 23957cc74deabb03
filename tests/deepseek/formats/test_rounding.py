"""Codes and scales: every code survives, errors stay within half a step, edges are defined."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek.formats import (
    dequantize_fp8_block,
    dequantize_fp8_tensor,
    dequantize_int4,
    dequantize_int8,
    fake_quantize_fp8,
    quantize_fp8_block,
    quantize_fp8_tensor,
    quantize_input_fp8,
    quantize_int4,
    quantize_int8,
    quantize_int8_asym,
    quantize_tokens_int8,
)

TINY = 2.0**-126
E4M3_NAN = (0x7F, 0xFF)


def e4m3_value(code: int) -> float:
    """From the format's definition: 1 sign, 4 exponent (bias 7), 3 mantissa bits, no infinity."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = code >> 3 & 0xF, code & 7
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def finite_e4m3() -> torch.Tensor:
    codes = [code for code in range(256) if code not in E4M3_NAN]
    return torch.tensor(codes, dtype=torch.uint8).view(torch.float8_e4m3fn)


# --- Every code -----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [TINY, 0.003, 1.0, 3e30])
def test_all_256_int8_codes_survive_their_own_scale(scale: float) -> None:
    codes = torch.arange(-128, 128).to(torch.int8).view(1, 256)
    stored = torch.full((1, 1), scale)
    weight = dequantize_int8(codes, stored)
    assert torch.equal(weight, torch.arange(-128.0, 128.0).view(1, 256) * stored)
    again, scale_again = quantize_int8(weight, scale=stored)
    assert torch.equal(again, codes)
    assert torch.equal(scale_again, stored)


@pytest.mark.parametrize("scale", [TINY, 0.003, 1.0, 3e30])
def test_all_16_int4_codes_survive_with_each_of_the_16_zero_points(scale: float) -> None:
    codes = torch.arange(-8, 8).to(torch.int8).repeat(2).expand(16, 32).contiguous()
    zeros = torch.arange(-8, 8).to(torch.int8).view(16, 1)
    stored = torch.full((16, 1), scale, dtype=torch.bfloat16)
    weight = dequantize_int4(codes, stored, zeros)
    assert torch.equal(weight, (codes.float() - zeros.float()) * stored.float())
    again, scale_again, zeros_again = quantize_int4(
        weight, 32, symmetric=False, scale=stored, zero_point=zeros
    )
    assert torch.equal(again, codes)
    assert torch.equal(scale_again, stored)
    assert zeros_again is not None
    assert torch.equal(zeros_again, zeros)
    again, _, none = quantize_int4(dequantize_int4(codes, stored), 32, scale=stored)
    assert none is None
    assert torch.equal(again, codes)


@pytest.mark.parametrize("scale", [TINY, 0.003, 1.0, 3e30])
def test_all_256_int8_codes_survive_with_each_of_the_256_zero_points(scale: float) -> None:
    codes = torch.arange(-128, 128).to(torch.int8).expand(256, 256)
    zeros = codes[0].reshape(256, 1)
    scales = torch.full((256, 1), scale)
    weight = dequantize_int8(codes, scales, zeros)
    assert weight.diagonal().count_nonzero() == 0
    given = quantize_int8_asym(weight, scale=scales, zero_point=zeros)
    assert torch.equal(given[0], codes)
    own = quantize_int8_asym(weight)
    assert torch.equal(own[0], codes)
    assert torch.equal(own[2], zeros)


def test_all_254_finite_e4m3_codes_have_their_defined_value_and_survive() -> None:
    codes = finite_e4m3()
    assert codes.numel() == 254
    defined = torch.tensor([e4m3_value(code) for code in codes.view(torch.uint8).tolist()])
    unit_scale = torch.tensor(1.0)
    assert torch.equal(dequantize_fp8_tensor(codes, unit_scale), defined)
    again, _ = quantize_fp8_tensor(defined, scale=unit_scale)
    assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))  # -0 stays -0


@pytest.mark.parametrize("scale", [TINY * 512, 1.7e-4, 1.0, 2.0**100])
def test_a_block_of_all_finite_e4m3_codes_survives_its_own_scale(scale: float) -> None:
    codes = finite_e4m3().view(2, 127)
    stored = torch.full((1, 1), scale)
    again, _ = quantize_fp8_block(dequantize_fp8_block(codes, stored), scale=stored)
    assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))


def test_e4m3_rounds_to_nearest_and_ties_to_the_even_code() -> None:
    unit_scale = torch.tensor(1.0)
    for code in range(0x7E):  # 0x7E is 448, the largest
        low, high = e4m3_value(code), e4m3_value(code + 1)
        middle, quarter = (low + high) / 2, (high - low) / 4
        values = torch.tensor([middle - quarter, middle, middle + quarter])
        got, _ = quantize_fp8_tensor(torch.cat((values, -values)), scale=unit_scale)
        even = code + code % 2
        positive = [code, even, code + 1]
        assert got.view(torch.uint8).tolist() == positive + [c | 0x80 for c in positive], code


def test_integers_round_ties_to_even() -> None:
    halves = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 6.5, 5.5]]).repeat(1, 4)
    even = [0, 2, 2, 0, -2, -2, 6, 6]
    codes, _ = quantize_int8(halves, scale=torch.ones(1, 1))
    assert codes[0, :8].tolist() == even
    codes, _, _ = quantize_int4(halves, 32, scale=torch.ones(1, 1))
    assert codes[0, :8].tolist() == even


def test_values_beyond_a_given_scale_clip_and_do_not_wrap_or_become_nan() -> None:
    weight = torch.tensor([[1000.0, -1000.0, 1.0, 0.0]]).repeat(1, 8)
    unit_scale = torch.ones(1, 1)
    assert quantize_int8(weight, scale=unit_scale)[0][0, :4].tolist() == [127, -128, 1, 0]
    assert quantize_int4(weight, 32, scale=unit_scale)[0][0, :4].tolist() == [7, -8, 1, 0]
    codes, scale = quantize_fp8_block(weight, scale=unit_scale)
    assert dequantize_fp8_block(codes, scale)[0, :4].tolist() == [448.0, -448.0, 1.0, 0.0]
    codes, scale = quantize_fp8_tensor(weight, scale=torch.tensor(1.0))
    assert dequantize_fp8_tensor(codes, scale)[0, :4].tolist() == [448.0, -448.0, 1.0, 0.0]


def test_inputs_with_a_static_fp8_scale_saturate_at_448_and_keep_nan() -> None:
    scale = torch.tensor([0.5])
    x = torch.tensor([[1e6, -1e6, float("inf"), 224.0, 1.0, 0.0]])
    assert quantize_input_fp8(x, scale).dtype == torch.float8_e4m3fn
    assert fake_quantize_fp8(x, scale).tolist() == [[224.0, -224.0, 224.0, 224.0, 1.0, 0.0]]
    assert fake_quantize_fp8(torch.tensor([float("nan")]), scale).isnan().all()


def test_fake_quantized_inputs_are_those_of_quantizing_with_the_same_scale() -> None:
    x = torch.randn((7, 3, 130), generator=torch.Generator().manual_seed(1))
    codes, scale = quantize_fp8_tensor(x)
    assert torch.equal(fake_quantize_fp8(x, scale.reshape(1)), dequantize_fp8_tensor(codes, scale))


# --- Edges ----------------------------------------------------------------------------------------


def test_zeros_have_scale_1_and_stay_zero() -> None:
    weight = torch.randn((256, 256), generator=torch.Generator().manual_seed(0))
    weight[3] = 0.0
    weight[:128, 128:] = 0.0
    weight[5, :64] = -0.0
    codes, scale = quantize_int8(weight)
    assert scale[3] == 1.0
    assert not codes[3].any()
    for symmetric in (True, False):
        codes, scale, zeros = quantize_int4(weight, 64, symmetric)
        assert (scale[3] == 1.0).all()
        assert (scale[:128, 2:] == 1.0).all()
        assert scale[5, 0] == 1.0
        assert not dequantize_int4(codes, scale, zeros)[weight == 0].any()
    fp8, scale = quantize_fp8_block(weight)
    assert scale[0, 1] == 1.0
    assert not dequantize_fp8_block(fp8, scale)[:128, 128:].any()
    fp8, scale = quantize_fp8_tensor(torch.zeros(5))
    assert scale == 1.0
    assert not fp8.float().any()


def test_a_huge_outlier_costs_only_its_own_row_group_or_block() -> None:
    weight = torch.randn((256, 256), generator=torch.Generator().manual_seed(1))
    spiked = weight.clone()
    spiked[7, 9] = 1e37
    codes, scale = quantize_int8(spiked)
    clean, clean_scale = quantize_int8(weight)
    others = torch.arange(256) != 7
    assert torch.equal(codes[others], clean[others])
    assert torch.equal(scale[others], clean_scale[others])
    assert codes[7].tolist() == [127 if column == 9 else 0 for column in range(256)]
    q4, s4, _ = quantize_int4(spiked, 32)
    c4, t4, _ = quantize_int4(weight, 32)
    assert torch.equal(q4[:, 32:], c4[:, 32:])
    assert torch.equal(s4[:, 1:], t4[:, 1:])
    assert dequantize_int4(q4, s4)[7, 9] == pytest.approx(1e37, rel=2**-8)
    f8, s8 = quantize_fp8_block(spiked)
    g8, t8 = quantize_fp8_block(weight)
    assert torch.equal(f8[128:].view(torch.uint8), g8[128:].view(torch.uint8))
    assert torch.equal(s8[:, 1], t8[:, 1])
    assert dequantize_fp8_block(f8, s8)[7, 9] == pytest.approx(1e37, rel=1e-6)


@pytest.mark.parametrize("magnitude", [1e-45, 1e-42, 1e-39, 1e-37, 1e-36])
def test_weights_near_the_subnormals_get_a_normal_scale_and_half_a_step_of_error(
    magnitude: float,
) -> None:
    weight = torch.linspace(-1, 1, 128).mul(magnitude).view(1, 128)
    assert weight.any()
    int8 = quantize_int8(weight)
    int4 = quantize_int4(weight, 128)
    asym = quantize_int4(weight, 128, symmetric=False)
    for scale, back in [
        (int8[1], dequantize_int8(*int8)),
        (int4[1], dequantize_int4(*int4)),
        (asym[1], dequantize_int4(*asym)),
    ]:
        assert (scale.float() >= TINY).all()
        assert ((back - weight).abs() <= 0.56 * scale.float()).all()
    fp8, scale = quantize_fp8_block(weight)
    assert (scale >= TINY).all()
    assert ((dequantize_fp8_block(fp8, scale) - weight).abs() <= 0.5 * 32 * scale).all()


def test_the_largest_accepted_magnitude_dequantizes_to_finite_values() -> None:
    limit = 2.0**126
    weight = torch.tensor([limit, -limit, limit / 3, 0.0]).repeat(8).view(1, 32)
    assert dequantize_int8(*quantize_int8(weight)).isfinite().all()
    assert dequantize_fp8_block(*quantize_fp8_block(weight)).isfinite().all()
    for symmetric in (True, False):
        assert dequantize_int4(*quantize_int4(weight, 32, symmetric)).isfinite().all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_one_sided_groups_keep_zero_in_the_asymmetric_range(sign: float) -> None:
    """A group of 5.0 ... 6.0 gets the range [0, 6]: a zero point must fit the 4 bits."""
    weight = sign * torch.linspace(5, 6, 32).view(1, 32)
    codes, scale, zeros = quantize_int4(weight, 32, symmetric=False)
    assert zeros is not None
    assert zeros.item() == (-8 if sign > 0 else 7)
    assert scale.item() == torch.tensor(6 / 15).bfloat16().item()
    assert ((dequantize_int4(codes, scale, zeros) - weight).abs() <= 0.56 * scale.float()).all()


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (129, 127), (160, 256), (200, 130)])
def test_each_fp8_block_has_its_own_scale_also_at_ragged_edges(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    codes, scale = quantize_fp8_block(weight)
    back = dequantize_fp8_block(codes, scale)
    assert codes.shape == back.shape == shape
    assert scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            tile = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
            tile_codes, tile_scale = quantize_fp8_tensor(weight[tile])
            assert tile_scale == scale[i, j]
            assert torch.equal(
                tile_codes.view(torch.uint8), codes[tile].contiguous().view(torch.uint8)
            )
            assert torch.equal(dequantize_fp8_tensor(tile_codes, tile_scale), back[tile])


def test_chunks_of_rows_leave_no_seam() -> None:
    """2100 x 2176 takes two chunks, cut at row 1927 (FP8: 1920), and no row may show it."""
    weight = torch.randn((2100, 2176), generator=torch.Generator().manual_seed(3))
    part = slice(1792, 2100)  # starts at a multiple of 128, with the seam inside
    codes, scale = quantize_int8(weight)
    assert torch.equal(codes[part], quantize_int8(weight[part])[0])
    assert torch.equal(scale[part], quantize_int8(weight[part])[1])
    for symmetric in (True, False):
        whole, alone = (quantize_int4(w, 128, symmetric) for w in (weight, weight[part]))
        for of_whole, of_part in zip(whole, alone, strict=True):
            assert (of_whole is None) == (of_part is None)
            assert of_whole is None or of_part is None or torch.equal(of_whole[part], of_part)
    fp8, scale = quantize_fp8_block(weight)
    alone8, alone_scale = quantize_fp8_block(weight[part])
    assert torch.equal(fp8[part].view(torch.uint8), alone8.view(torch.uint8))
    assert torch.equal(scale[14:], alone_scale)


# --- Properties -----------------------------------------------------------------------------------


@st.composite
def weights(draw: st.DrawFn) -> torch.Tensor:
    """Rows of very different size, some zeros, sometimes an outlier, sometimes an offset."""
    rows = draw(st.integers(1, 40))
    columns = 128 * draw(st.integers(1, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn((rows, columns), generator=generator)
    weight += draw(st.sampled_from([0.0, 0.0, 3.0, -20.0]))
    weight *= 10.0 ** torch.randint(-30, 31, (rows, 1), generator=generator)
    weight *= torch.rand((rows, columns), generator=generator) > draw(st.sampled_from([0.0, 0.9]))
    if draw(st.booleans()):
        weight[0, 0] *= 1e4
    return weight


PROPERTY = settings(max_examples=40, deadline=None, database=None)
#: Rounding of the division and of the product, in steps: 127 * 2^-23.
SLACK = 2e-5


@PROPERTY
@given(weights())
def test_int8_errs_by_at_most_half_a_step_and_is_idempotent(weight: torch.Tensor) -> None:
    codes, scale = quantize_int8(weight)
    back = dequantize_int8(codes, scale)
    assert ((back - weight).abs() <= (0.5 + SLACK) * scale).all()
    assert torch.equal(quantize_int8(back)[0], codes)
    assert torch.equal(quantize_int8(-weight)[0], -codes)
    assert codes.min() >= -127  # -128 is for clipped values only


@PROPERTY
@given(weights(), st.sampled_from([32, 64, 128]))
def test_int4_errs_by_at_most_half_a_step_and_is_idempotent(
    weight: torch.Tensor, group_size: int
) -> None:
    codes, scale, _ = quantize_int4(weight, group_size)
    back = dequantize_int4(codes, scale)
    step = scale.float().repeat_interleave(group_size, dim=1)
    assert ((back - weight).abs() <= (0.5 + SLACK) * step).all()
    assert torch.equal(quantize_int4(back, group_size)[0], codes)
    assert torch.equal(quantize_int4(-weight, group_size)[0], -codes)
    assert codes.min() >= -7


@PROPERTY
@given(weights(), st.sampled_from([32, 64, 128]))
def test_asymmetric_int4_errs_by_at_most_half_a_step_and_6_percent_and_keeps_zeros(
    weight: torch.Tensor, group_size: int
) -> None:
    codes, scale, zeros = quantize_int4(weight, group_size, symmetric=False)
    back = dequantize_int4(codes, scale, zeros)
    step = scale.float().repeat_interleave(group_size, dim=1)
    assert ((back - weight).abs() <= 0.56 * step).all()
    assert not back[weight == 0].any()
    again, _, _ = quantize_int4(back, group_size, symmetric=False, scale=scale, zero_point=zeros)
    assert torch.equal(again, codes)


@PROPERTY
@given(weights())
def test_asymmetric_int8_errs_by_at_most_half_a_step_and_keeps_zeros(weight: torch.Tensor) -> None:
    codes, scale, zeros = quantize_int8_asym(weight)
    back = dequantize_int8(codes, scale, zeros)
    assert ((back - weight).abs() <= (0.5 + 2 * SLACK) * scale).all()
    assert not back[weight == 0].any()
    assert torch.equal(quantize_int8_asym(back, scale=scale, zero_point=zeros)[0], codes)


@PROPERTY
@given(weights())
def test_fp8_errs_by_at_most_half_a_unit_in_the_last_place_and_is_idempotent(
    weight: torch.Tensor,
) -> None:
    codes, scale = quantize_fp8_block(weight)
    back = dequantize_fp8_block(codes, scale)
    step = scale.repeat_interleave(128, 0)[: weight.shape[0]].repeat_interleave(128, 1)
    bound = torch.maximum(weight.abs() * 2.0**-4, step * 2.0**-10)
    assert ((back - weight).abs() <= bound * (1 + 1e-5)).all()
    again = quantize_fp8_block(back)[0]
    assert torch.equal(again.view(torch.uint8), codes.view(torch.uint8))


@PROPERTY
@given(weights(), st.integers(-20, 20))
def test_scaling_by_a_power_of_two_changes_scales_and_no_code(
    weight: torch.Tensor, exponent: int
) -> None:
    weight = weight.clamp(-1e20, 1e20) * (weight.abs() > 1e-20)  # away from both limits
    factor = 2.0**exponent
    for quantize in (quantize_int8, quantize_fp8_block, lambda w: quantize_int4(w, 64)[:2]):
        codes, scale = quantize(weight)
        scaled_codes, scaled = quantize(weight * factor)
        assert torch.equal(scaled_codes.float(), codes.float())
        assert torch.equal(scaled[scale != 1], (scale * factor)[scale != 1])


# --- Tokens ---------------------------------------------------------------------------------------


@PROPERTY
@given(weights())
def test_tokens_err_by_at_most_half_a_step_and_do_not_see_each_other(x: torch.Tensor) -> None:
    codes, scale = quantize_tokens_int8(x)
    assert ((dequantize_int8(codes, scale) - x).abs() <= (0.5 + SLACK) * scale).all()
    assert scale.shape == (x.shape[0], 1)
    for row in range(x.shape[0]):
        alone, alone_scale = quantize_tokens_int8(x[row : row + 1])
        assert torch.equal(alone[0], codes[row])
        assert torch.equal(alone_scale[0], scale[row])


def test_tokens_may_have_leading_dimensions_and_bfloat16_values_and_there_may_be_none() -> None:
    x = torch.randn((2, 3, 64), generator=torch.Generator().manual_seed(4)).bfloat16()
    before = x.clone()
    codes, scale = quantize_tokens_int8(x)
    flat, flat_scale = quantize_tokens_int8(x.float().view(6, 64))
    assert torch.equal(codes.view(6, 64), flat)
    assert torch.equal(scale.view(6, 1), flat_scale)
    assert torch.equal(x, before)
    codes, scale = quantize_tokens_int8(torch.empty(0, 64))
    assert codes.shape == (0, 64)
    assert scale.shape == (0, 1)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_poisoned_token_never_dequantizes_to_a_finite_row_and_leaves_the_others(
    poison: float,
) -> None:
    x = torch.randn((3, 64), generator=torch.Generator().manual_seed(5))
    clean, clean_scale = quantize_tokens_int8(x)
    x[1, 7] = poison
    codes, scale = quantize_tokens_int8(x)
    assert not dequantize_int8(codes, scale)[1].isfinite().any()
    for row in (0, 2):
        assert torch.equal(codes[row], clean[row])
        assert torch.equal(scale[row], clean_scale[row])


def test_a_token_of_zeros_is_zeros() -> None:
    codes, scale = quantize_tokens_int8(torch.zeros(2, 64))
    assert not codes.any()
    assert scale.isfinite().all()
    assert (scale > 0).all()
