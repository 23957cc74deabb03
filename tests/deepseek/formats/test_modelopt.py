"""Our rounding against NVIDIA ModelOpt's TensorQuantizer, the oracle of calibration and QAT.

Two differences are deliberate. Our INT4 scale is rounded to bfloat16, as stored, *before* the codes
are computed, so a code near a tie can differ by one. And ModelOpt multiplies by 127/amax where we
divide by the scale, which is the same up to the last bit of float32.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from deepseek.formats import (
    compress,
    decompress,
    dequantize_int8,
    dequantize_int8_block,
    quantize_int4,
    quantize_int8,
    quantize_int8_block,
)
from deepseek.recipe import Scheme

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def modelopt_quantizers() -> Any:
    """(TensorQuantizer, QuantizerAttributeConfig); importing ModelOpt takes seconds and warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`torch.jit.script", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="transformers .* is not tested with")
        from modelopt.torch.quantization.config import QuantizerAttributeConfig
        from modelopt.torch.quantization.nn import TensorQuantizer
    return TensorQuantizer, QuantizerAttributeConfig


def fake_quantize(
    modelopt: Any, weight: torch.Tensor, **attributes: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Calibrate by maximum on the weight itself; (fake-quantized weight, amax)."""
    tensor_quantizer, config = modelopt
    quantizer = tensor_quantizer(config(**attributes))
    quantizer.enable_calib()
    quantizer.disable_quant()
    quantizer(weight)
    quantizer.load_calib_amax()
    quantizer.disable_calib()
    quantizer.enable_quant()
    return quantizer(weight), quantizer.amax


def gaussian(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_int8_per_channel_equals_modelopt_to_the_last_bits_of_float32(
    modelopt_quantizers: Any,
) -> None:
    weight = gaussian((128, 1024))
    theirs, amax = fake_quantize(modelopt_quantizers, weight, num_bits=8, axis=0)
    codes, scale = quantize_int8(weight)
    assert torch.equal(codes.float(), (theirs / scale).round())
    assert torch.allclose(dequantize_int8(codes, scale), theirs, rtol=2e-7, atol=0)
    given = compress(weight, Scheme(weights="int8", activations="int8"), amax=amax)
    assert torch.equal(given["weight"], codes)
    assert torch.equal(given["weight_scale"], scale)


def test_int8_tiles_equal_modelopts_blocks_of_128_by_128(modelopt_quantizers: Any) -> None:
    weight = gaussian((256, 384))
    blocks = {-1: 128, -2: 128}
    theirs, _ = fake_quantize(modelopt_quantizers, weight, num_bits=8, block_sizes=blocks)
    codes, scale = quantize_int8_block(weight)
    assert torch.allclose(dequantize_int8_block(codes, scale), theirs, rtol=2e-7, atol=0)


def test_a_clipping_amax_gives_modelopts_values_down_to_the_extra_negative_code(
    modelopt_quantizers: Any,
) -> None:
    tensor_quantizer, config = modelopt_quantizers
    weight = gaussian((64, 512), seed=1)
    quantizer = tensor_quantizer(config(num_bits=8, axis=0))
    quantizer.amax = weight.abs().amax(1, keepdim=True) * 0.6
    theirs = quantizer(weight)
    codes, scale = quantize_int8(weight, amax=quantizer.amax)
    assert codes.min() == -128
    assert torch.equal(codes.float(), (theirs / scale).round())


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_equals_modelopt_bit_for_bit_where_the_scale_is_exact_in_bfloat16(
    modelopt_quantizers: Any, group_size: int
) -> None:
    """Groups whose amax is 7 times a power of two: nothing is lost in storing the scale."""
    groups = gaussian((64, 512), seed=2).view(64, -1, group_size).mul(2.5).clamp(-7, 7)
    groups[:, :, 5] = 7.0
    exponents = torch.randint(-12, 3, groups.shape[:2], generator=torch.Generator().manual_seed(2))
    weight = (groups * 2.0 ** exponents.unsqueeze(-1)).flatten(1)
    block_sizes = {-1: group_size, "type": "static"}
    theirs, _ = fake_quantize(modelopt_quantizers, weight, num_bits=4, block_sizes=block_sizes)
    codes, scale, _ = quantize_int4(weight, group_size)
    assert torch.equal(scale.float(), 2.0**exponents)
    scheme = Scheme(weights="int4", group_size=group_size)
    assert torch.equal(decompress(compress(weight, scheme), scheme, (64, 512)), theirs)


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_equals_modelopt_up_to_the_stored_scale(
    modelopt_quantizers: Any, group_size: int
) -> None:
    weight = gaussian((64, 512), seed=3)
    block_sizes = {-1: group_size, "type": "static"}
    theirs, amax = fake_quantize(modelopt_quantizers, weight, num_bits=4, block_sizes=block_sizes)
    amax = amax.view(64, -1)
    codes, scale, _ = quantize_int4(weight, group_size, amax=amax)
    assert torch.equal(scale, (amax / 7).bfloat16())
    step = (amax / 7).repeat_interleave(group_size, 1)
    their_codes = (theirs / step).round()
    apart = (codes - their_codes).abs()
    # A step that is off by 1/256 moves weight/step by at most 7/256: only ties that close differ.
    fraction = (weight / step - 0.5).remainder(1.0)
    near_tie = torch.minimum(fraction, 1 - fraction) <= 7 / 256 + 1e-5
    assert apart.max() <= 1
    assert near_tie[apart > 0].all()
    assert 0 < (apart > 0).float().mean() < 0.01
