"""Each emulated kernel against a slow one: loops over groups and tiles in float64, roundings by
table."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from deepseek.engine.arithmetic import ARITHMETICS, EMBEDDED, Arithmetic
from deepseek.engine.emulated import (
    ceil_power_of_two,
    requantize_tiles,
    round_absorbed,
    unpack_tiles,
)
from deepseek.engine.linear import (
    Float32Linear,
    Int4DynamicLinear,
    Int4Linear,
    Int4StaticFp8Linear,
    Int8AsymLinear,
    Int8DynamicLinear,
    Int8Linear,
    Kernels,
    RowRule,
    encode,
    make_linear,
)
from deepseek.engine.packed_layout import PackedLinear
from deepseek.engine.packing import _pack_linear, _Stored
from deepseek.engine.target_inputs import (
    round_static_fp8,
    round_tiles_fp8,
    round_token_int8,
    truncate_groups_int8,
)
from deepseek.formats import compress, int8_codes, quantize_fp8_block, unpack_int4
from deepseek.formats import unpack_zero_point as unpack_zeros
from deepseek.inventory import TensorSpec
from deepseek.recipe import Scheme

FP8 = Scheme(weights="fp8-block")
SCHEMES = {
    "bf16": Scheme(weights="bf16"),
    "fp8-block": FP8,
    "int8": Scheme(weights="int8"),
    "int8-asym": Scheme(weights="int8-asym"),
    "int8-a8": Scheme(weights="int8", activations="int8"),
    "int8-block": Scheme(weights="int8-block", activations="int8"),
    "int4-g32": Scheme(weights="int4", group_size=32),
    "int4-g128": Scheme(weights="int4", group_size=128),
    "int4-asym-g128": Scheme(weights="int4-asym", group_size=128),
    "int4-g128-afp8": Scheme(weights="int4", group_size=128, activations="fp8"),
    "int4-g128-a8": Scheme(weights="int4", group_size=128, activations="int8"),
    "int4-asym-g64-a8": Scheme(weights="int4-asym", group_size=64, activations="int8"),
}
TARGETS = [name for name in ARITHMETICS if name != EMBEDDED.name]
INPUT_SCALE = torch.tensor([0.0137])  # its reciprocal is no BF16 number
#: The largest FP32 error of a sum of K products, as a share of the sum of their magnitudes.
SUM_ERROR = 2e-6
#: The steps of BF16 do not shrink below this; the slow kernel's sums go on.
SMALLEST_STEP = 2.0**-133


def kernels_of(arithmetic: Arithmetic) -> Kernels:
    return Kernels(RowRule(4), has_vnni=False, is_batch_invariant=True, arithmetic=arithmetic)


def weights(num_outputs: int, num_inputs: int) -> Tensor:
    """Gaussian, with a row of zeros, one of subnormal scales, and one with an outlier."""
    weight = 0.05 * torch.randn(num_outputs, num_inputs, generator=torch.Generator().manual_seed(0))
    weight[1] = 0.0
    weight[2] *= 1e-36
    weight[3, 5] = 30.0
    return weight.bfloat16().float()


def inputs(num_tokens: int, num_inputs: int) -> Tensor:
    """BF16 activations: a token of zeros, one of tiny values, one beyond any static scale."""
    x = torch.randn(num_tokens, num_inputs, generator=torch.Generator().manual_seed(9))
    x[1] = 0.0
    x[2] *= 1e-30
    x[3, ::7] *= 100.0
    return x.bfloat16().float()


def pack(weight: Tensor, scheme: Scheme) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The stored tensors, and those of the engine's kernel."""
    spec = TensorSpec("m.a.weight", tuple(weight.shape), "attention", "linear", "column", 0)
    given = {"input_scale": INPUT_SCALE} if scheme.activations == "fp8" else {}
    stored = compress(weight, scheme, **given)
    linear = PackedLinear("m.a", (spec,), scheme)
    packed = _pack_linear(linear, _Stored({"m.a": dict(stored)}, {}), "torch")
    return stored, {name.removeprefix("m.a."): tensor for name, tensor in packed.items()}


def bf16(values: Tensor) -> Tensor:
    return values.float().bfloat16().double()


E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()


def e4m3(values: Tensor) -> Tensor:
    """The nearest of the 127 magnitudes, the even code at a tie, the largest beyond all."""
    distance = (values.double().abs()[..., None] - E4M3).abs()
    best = distance.min(dim=-1, keepdim=True).values
    codes = torch.arange(127).expand_as(distance)
    nearest = distance == best
    even = torch.where(nearest & (codes % 2 == 0), codes, -1).amax(dim=-1)
    first = torch.where(nearest, codes, 999).amin(dim=-1)
    chosen = torch.where(nearest.sum(dim=-1) > 1, even, first)
    return E4M3[chosen] * values.double().sign()


def power_of_two(scale: float) -> float:
    power = 2.0**-140
    while power < scale:
        power *= 2
    return power


def slow_tiles(values: Tensor, floor: float, *, power: bool) -> Tensor:
    """Quantize each tile [rows, 128] of `values` for itself, as one block per call."""
    amax = max(values.abs().max().item(), floor)
    scale = torch.tensor(amax) * torch.tensor(1.0 / 448)
    if power:
        scale = torch.tensor(power_of_two(scale.item()))
    return e4m3(values.float() / scale) * scale.double()


def slow_linear(
    arithmetic: Arithmetic, scheme: Scheme, stored: Mapping[str, Tensor], weight: Tensor, x: Tensor
) -> Tensor:
    """[T, K] -> [T, N] in float64, before the last rounding. No target quantizes inputs of INT4 to
    INT8."""
    num_outputs, num_inputs = weight.shape
    out = torch.zeros(len(x), num_outputs, dtype=torch.float64)
    rounded = scheme.weights in arithmetic.rounded_weights
    if scheme.weights == "bf16":
        return x.double() @ bf16(stored["weight"]).T
    if scheme.weights == "fp8-block":
        codes, scale = stored["weight"].double(), stored["weight_scale"].double()
        for first in range(0, num_inputs, 128):
            columns = slice(first, first + 128)
            for row in range(0, num_outputs, 128):
                rows = slice(row, row + 128)
                tile = codes[rows, columns] * scale[row // 128, first // 128]
                if arithmetic.block_inputs == "fp8-pow2":
                    tile = slow_tiles(tile, 1e-4, power=True)
                if rounded:
                    tile = bf16(tile)
                for token in range(len(x)):
                    values = x[token, columns].double()
                    if arithmetic.block_inputs != "none":
                        power = arithmetic.block_inputs == "fp8-pow2"
                        values = slow_tiles(x[token, columns], 1e-10, power=power)
                    out[token, rows] += tile @ values
        return out
    if scheme.weights == "int8-block":
        codes, scale = stored["weight"].double(), stored["weight_scale"].double()
        for token in range(len(x)):
            for first in range(0, num_inputs, 128):
                columns = slice(first, first + 128)
                step = x[token, columns].abs().max().clamp_min(1e-10) / 127
                cut = (x[token, columns] / step).clamp(-128, 127).to(torch.int8).double()
                for n in range(num_outputs):
                    factor = step.double() * scale[n // 128, first // 128]
                    out[token, n] += (codes[n, columns] @ cut) * factor
        return out
    if scheme.weights.startswith("int8"):
        codes = int8_codes(stored, (num_outputs, num_inputs)).double()
        if "weight_zero_point" in stored:
            codes -= unpack_zeros(stored["weight_zero_point"], num_outputs, 8).double()
        scale = stored["weight_scale"].flatten()
        for token in range(len(x)):
            values, factor = x[token].double(), 1.0
            if scheme.activations == "int8" and arithmetic.token_inputs == "int8":
                amax = x[token].abs().max()
                inverse = 127.0 / amax if amax > 0 else torch.tensor(0.0)
                values, factor = (x[token] * inverse).round().double(), (amax / 127).double()
            for n in range(num_outputs):
                if rounded and (scheme.activations == "none" or arithmetic.token_inputs == "none"):
                    out[token, n] = values @ bf16(codes[n].float() * scale[n])
                else:
                    out[token, n] = (values @ codes[n]) * factor * scale[n].double()
        return out
    assert scheme.group_size is not None
    codes = unpack_int4(stored["weight_packed"], num_inputs).double()
    scale = stored["weight_scale"]
    zeros = torch.zeros(scale.shape)
    if "weight_zero_point" in stored:
        zeros = unpack_zeros(stored["weight_zero_point"], num_outputs).double()
    values, factor = x.double(), 1.0
    if scheme.activations == "fp8" and arithmetic.static_inputs != "none":
        factor, rounded = INPUT_SCALE.double(), False
        if arithmetic.static_inputs == "bf16-reciprocal":
            values = e4m3(bf16(x * bf16(1 / INPUT_SCALE).float()))
        elif arithmetic.static_inputs == "reciprocal":
            values = e4m3(x * (1 / INPUT_SCALE))
        else:
            values = e4m3(x / INPUT_SCALE)
    for group in range(scale.shape[1]):
        columns = slice(group * scheme.group_size, (group + 1) * scheme.group_size)
        steps = codes[:, columns] - zeros[:, group, None]
        if rounded:
            out += values[:, columns] @ bf16(steps * scale[:, group, None].double()).T
        else:
            out += (values[:, columns] @ steps.T) * scale[:, group].double()
    return out * factor


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SCHEMES)
def test_an_emulated_kernel_rounds_as_the_slow_one_does(name: str, target: str) -> None:
    """Equal to a BF16 step, where the order of the FP32 sum decides, and to the bit elsewhere."""
    arithmetic, scheme, shape = ARITHMETICS[target], SCHEMES[name], (144, 384)
    weight, x = weights(*shape), inputs(6, shape[1])
    stored, packed = pack(weight, scheme)
    linear = make_linear(scheme, packed, kernels_of(arithmetic))
    got = linear.matmul(encode(x, [linear.encoding])[linear.encoding]).double()
    exact = slow_linear(arithmetic, scheme, stored, weight, x)
    want = bf16(exact)
    assert got.shape == want.shape
    assert torch.equal(got, bf16(got)), "the output has left the kernel: it is BF16"
    slack = SUM_ERROR * (x.double().abs() @ weight.double().abs().T)
    assert ((got - exact).abs() <= 2.0**-8 * exact.abs() + slack + SMALLEST_STEP).all()
    assert ((got - want).abs() > SMALLEST_STEP).double().mean() < 0.01
    assert torch.equal(got[1], torch.zeros(shape[0], dtype=torch.float64)), "a token of zeros"
    assert linear.num_bytes == sum(tensor.nbytes for tensor in packed.values())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SCHEMES)
def test_a_row_has_the_same_bits_in_any_batch(name: str, target: str) -> None:
    scheme = SCHEMES[name]
    _, packed = pack(weights(160, 256), scheme)
    linear = make_linear(scheme, packed, kernels_of(ARITHMETICS[target]))
    x = inputs(30, 256)
    whole = linear.matmul(encode(x, ["f32"])["f32"])
    for first, last in ((0, 1), (5, 7), (11, 14), (3, 28)):
        some = linear.matmul(encode(x[first:last].clone(), ["f32"])["f32"])
        assert torch.equal(some, whole[first:last]), (first, last)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SCHEMES)
def test_a_token_that_is_not_finite_shows_and_harms_no_other(name: str, target: str) -> None:
    scheme = SCHEMES[name]
    _, packed = pack(weights(160, 256), scheme)
    linear = make_linear(scheme, packed, kernels_of(ARITHMETICS[target]))
    x = inputs(6, 256)
    clean = linear.matmul(encode(x, ["f32"])["f32"])
    x[4, 3], x[5, 200] = float("nan"), float("inf")
    got = linear.matmul(encode(x, ["f32"])["f32"])
    assert torch.equal(got[:4], clean[:4])
    assert got[4].isnan().any()
    # A static scale saturates infinity, as the runtime's cast does.
    if scheme.activations != "fp8" or ARITHMETICS[target].static_inputs == "none":
        assert not got[5].isfinite().all()


def test_the_embedded_arithmetic_has_the_kernels_and_the_bits_that_it_always_had() -> None:
    kernels = kernels_of(EMBEDDED)
    expected = {
        "bf16": Float32Linear,
        "fp8-block": Float32Linear,
        "int8": Int8Linear,
        "int8-asym": Int8AsymLinear,
        "int8-a8": Int8DynamicLinear,
        "int4-g128": Int4Linear,
        "int4-g128-afp8": Int4StaticFp8Linear,
        "int4-g128-a8": Int4DynamicLinear,
    }
    for name, kind in expected.items():
        _, packed = pack(weights(64, 128), SCHEMES[name])
        assert type(make_linear(SCHEMES[name], packed, kernels)) is kind
    x = inputs(4, 128)
    assert kernels.round(x) is x
    assert kernels.round_factor(x) is x
    assert kernels.round_angle(x) is x
    w_uk, w_uv = torch.randn(2, 8, 16), torch.randn(2, 16, 8)
    kept = round_absorbed(w_uk, w_uv, FP8, kernels)
    assert kept[0] is w_uk
    assert kept[1] is w_uv


def test_int4_tiles_are_unpacked_to_the_codes_that_were_packed() -> None:
    for shape, group in (((48, 64), 32), ((160, 640), 128)):
        codes = torch.randint(0, 16, shape, generator=torch.Generator().manual_seed(1))
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
        rows = unpack_tiles(packed, group)
        assert rows.nbytes == packed.nbytes
        assert torch.equal(rows & 15, codes[:, 0::2].to(torch.uint8))
        assert torch.equal(rows >> 4, codes[:, 1::2].to(torch.uint8))


def test_a_power_of_two_stays_and_all_else_goes_up() -> None:
    given = torch.tensor([1.0, 1.0000001, 0.75, 2.0**-126, 2.0**-40 * 1.5, 3.0, 2.0**100])
    want = torch.tensor([1.0, 2.0, 1.0, 2.0**-126, 2.0**-39, 4.0, 2.0**100])
    assert torch.equal(ceil_power_of_two(given), want)


@pytest.mark.parametrize("power", [False, True])
@pytest.mark.parametrize("width", [64, 128, 320])
def test_tiles_of_an_input_are_rounded_each_with_its_own_scale(width: int, power: bool) -> None:
    x = inputs(6, width)
    x[4, :64] = 0.0
    x[5] = 1e-12  # below the floor of amax, 1e-10
    got = round_tiles_fp8(x, power_of_two=power)
    assert got.shape == x.shape
    for token in range(len(x)):
        for first in range(0, width, 128):
            columns = slice(first, first + 128)
            want = slow_tiles(x[token, columns], 1e-10, power=power)
            torch.testing.assert_close(got[token, columns].double(), want, rtol=1e-6, atol=0)


def test_tiles_are_quantized_again_with_powers_of_two_and_small_ones_lose_their_bits() -> None:
    """The floor of amax is 1e-4: a tile whose weights are all smaller keeps fewer bits there."""
    weight = torch.randn(200, 256, generator=torch.Generator().manual_seed(2))
    weight[:128, 128:] *= 2e-9
    weight = quantize_and_back(weight)
    got = requantize_tiles(weight).double()
    for row in range(0, 200, 128):
        for first in range(0, 256, 128):
            tile = (slice(row, row + 128), slice(first, first + 128))
            want = slow_tiles(weight[tile], 1e-4, power=True)
            assert torch.equal(got[tile], want)
    small = (slice(0, 128), slice(128, 256))
    assert (got[small] - weight[small]).norm() > 0.05 * weight[small].norm()
    assert (got - weight).norm() < 0.03 * weight.norm()


def quantize_and_back(weight: Tensor) -> Tensor:
    codes, scale = quantize_fp8_block(weight)
    expanded = scale.repeat_interleave(128, 0)[: weight.shape[0]].repeat_interleave(128, 1)
    return codes.float() * expanded[:, : weight.shape[1]]


def test_the_halves_of_kv_b_proj_are_rounded_as_each_target_holds_them() -> None:
    """Heads of 24 + 40 rows: the tiles of vLLM's second quantization cross them."""
    weight = quantize_and_back(torch.randn(4 * 64, 128, generator=torch.Generator().manual_seed(3)))
    by_head = weight.view(4, 64, 128)
    halves = by_head[:, :24].contiguous(), by_head[:, 24:].transpose(1, 2).contiguous()
    kept = round_absorbed(*halves, FP8, kernels_of(ARITHMETICS["trtllm"]))
    assert torch.equal(kept[0], halves[0])
    plain = round_absorbed(*halves, FP8, kernels_of(ARITHMETICS["sglang"]))
    assert torch.equal(plain[1], halves[1].bfloat16().float())
    again = requantize_tiles(weight).bfloat16().float().view(4, 64, 128)
    vllm = round_absorbed(*halves, FP8, kernels_of(ARITHMETICS["vllm"]))
    assert torch.equal(vllm[0], again[:, :24])
    assert torch.equal(vllm[1], again[:, 24:].transpose(1, 2))
    assert not torch.equal(vllm[0], halves[0].bfloat16().float())
    unquantized = Scheme(weights="bf16")
    bf16_halves = round_absorbed(*halves, unquantized, kernels_of(ARITHMETICS["trtllm"]))
    assert torch.equal(bf16_halves[0], halves[0].bfloat16().float())


def test_the_rounded_reciprocal_is_a_gain_error_that_division_does_not_have() -> None:
    """Scale and bf16(1 / scale) do not cancel: up to 0.39 %, the same for every value."""
    scale = torch.tensor([0.0137])
    x = torch.full((1, 4), 448 * 0.0137 / 2).bfloat16().float()
    divided, _ = round_static_fp8(x, scale, "divide")
    multiplied, factor = round_static_fp8(x, scale, "bf16-reciprocal")
    assert factor is scale
    gain = bf16(1 / scale) * scale.double()
    assert 1e-4 < (gain - 1).abs() < 0.0039
    assert torch.equal(multiplied.double(), e4m3(bf16(x * bf16(1 / scale).float())))
    assert torch.equal(divided.double(), e4m3(x / scale))


def test_groups_are_cut_toward_zero_and_tokens_are_rounded() -> None:
    x = torch.tensor([[127.0, 1.9, -1.9, 0.9] + [0.0] * 124])
    codes, scale = truncate_groups_int8(x)
    assert codes[0, 0, :4].tolist() == [127.0, 1.0, -1.0, 0.0]
    assert scale.tolist() == [[1.0]]
    rounded, _ = round_token_int8(x)
    assert rounded[0, :4].tolist() == [127.0, 2.0, -2.0, 1.0]


def test_integer_sums_are_exact_beyond_the_mantissa_of_fp32() -> None:
    """2,048 products of 127 * 127 and one of 1: the sum needs 25 bits."""
    codes = torch.full((16, 2048), 127, dtype=torch.int8)
    codes[0, 0] = 126
    scheme = SCHEMES["int8-a8"]
    tensors = {"codes": codes, "scale": torch.ones(16)}
    linear = make_linear(scheme, tensors, kernels_of(ARITHMETICS["vllm"]))
    x = torch.full((1, 2048), 127.0)
    exact = linear._product(x)  # type: ignore[attr-defined]
    want = x.double() @ codes.double().T
    assert torch.equal(exact.double(), want.float().double())
    assert exact[0, 0] != exact[0, 1]
