"""Each of PyTorch's kernels against the slow reference: the decompressed weight times the input."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from deepseek.engine.linear import (
    Int8DynamicLinear,
    Int8Linear,
    Int8VnniLinear,
    Kernels,
    Linear,
    Projection,
    RowRule,
    encode,
    find_row_multiple,
    make_linear,
)
from deepseek.engine.packed_layout import PackedLinear, packed_shapes
from deepseek.engine.packing import _pack_linear, _Stored
from deepseek.formats import (
    compress,
    decompress,
    fake_quantize_fp8,
    unpack_int4,
    unpack_zero_point,
)
from deepseek.inventory import TensorSpec
from deepseek.recipe import Scheme, WeightFormat

SCHEMES = {
    "bf16": Scheme(weights="bf16"),
    "fp8-block": Scheme(weights="fp8-block"),
    "int8": Scheme(weights="int8"),
    "int8-asym": Scheme(weights="int8-asym"),
    "int8-a8": Scheme(weights="int8", activations="int8"),
    "int8-a8-vnni": Scheme(weights="int8", activations="int8"),
    "int8-block-a8": Scheme(weights="int8-block", activations="int8"),
    "int8-block-a8-vnni": Scheme(weights="int8-block", activations="int8"),
    "int4-g32": Scheme(weights="int4", group_size=32),
    "int4-g128": Scheme(weights="int4", group_size=128),
    "int4-asym-g128": Scheme(weights="int4-asym", group_size=128),
    "int4-g128-afp8": Scheme(weights="int4", group_size=128, activations="fp8"),
    "int4-g32-a8": Scheme(weights="int4", group_size=32, activations="int8"),
    "int4-g128-a8-vnni": Scheme(weights="int4", group_size=128, activations="int8"),
    "int4-asym-g64-a8": Scheme(weights="int4-asym", group_size=64, activations="int8"),
    "int4-asym-g128-a8-vnni": Scheme(weights="int4-asym", group_size=128, activations="int8"),
}
#: Of the inputs below, whose largest is near 4.
INPUT_SCALE = torch.tensor([4.0 / 448])
#: Relative error (Frobenius) of the kernel alone, the format's own error excluded; for int8-a8 and
#: int4-afp8 against products of quantized activations. Measured: 3e-7, then 2.3e-3 (BF16 in and
#: out), 1.7e-3 (BF16 out), 6e-8.
MAX_KERNEL_ERROR = {
    "bf16": 1e-6,
    "fp8-block": 1e-6,
    "int8": 4e-3,
    "int8-asym": 4e-3,
    "int8-a8": 3e-3,
    "int8-a8-vnni": 1e-6,
    "int8-block-a8": 1e-6,
    "int8-block-a8-vnni": 1e-6,
    "int4-g32": 4e-3,
    "int4-g128": 4e-3,
    "int4-asym-g128": 4e-3,
    "int4-g128-afp8": 3e-3,
    "int4-g32-a8": 1e-6,
    "int4-g128-a8-vnni": 1e-6,
    "int4-asym-g64-a8": 1e-6,
    "int4-asym-g128-a8-vnni": 1e-6,
}
#: Relative error of kernel and format together on Gaussian weights and activations.
MAX_TOTAL_ERROR = {
    "bf16": 3e-3,
    "fp8-block": 0.04,
    "int8": 0.012,
    "int8-asym": 0.012,
    "int8-a8": 0.02,
    "int8-a8-vnni": 0.02,
    "int8-block-a8": 0.02,
    "int8-block-a8-vnni": 0.02,
    "int4-g32": 0.12,
    "int4-g128": 0.16,
    "int4-asym-g128": 0.15,
    "int4-g128-afp8": 0.16,
    "int4-g32-a8": 0.12,
    "int4-g128-a8-vnni": 0.16,
    "int4-asym-g64-a8": 0.13,
    "int4-asym-g128-a8-vnni": 0.15,
}


def weights(num_outputs: int, num_inputs: int, seed: int = 0) -> Tensor:
    return 0.05 * torch.randn(
        num_outputs, num_inputs, generator=torch.Generator().manual_seed(seed)
    )


def inputs(num_tokens: int, num_inputs: int, seed: int = 9) -> Tensor:
    return torch.randn(num_tokens, num_inputs, generator=torch.Generator().manual_seed(seed))


def spec(name: str, weight: Tensor) -> TensorSpec:
    shape = tuple(weight.shape)
    return TensorSpec(f"m.{name}.weight", shape, "attention", "linear", "column", 0)


def pack(members: list[Tensor], scheme: Scheme, *, vnni: bool) -> tuple[Linear, Tensor]:
    """The kernel of these weights stacked, and what the weights dequantize to."""
    specs = tuple(spec(str(i), weight) for i, weight in enumerate(members))
    given = {"input_scale": INPUT_SCALE} if scheme.activations == "fp8" else {}
    stored = {s.module: compress(w, scheme, **given) for s, w in zip(specs, members, strict=True)}
    reference = torch.cat(
        [decompress(stored[s.module], scheme, (s.shape[0], s.shape[1])) for s in specs]
    )
    packed = _pack_linear(PackedLinear("m.f", specs, scheme), _Stored(stored, {}), "torch")
    tensors = {name.removeprefix("m.f."): tensor for name, tensor in packed.items()}
    shapes = packed_shapes(scheme, *reference.shape, layout="torch")
    assert {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} == shapes
    kernels = Kernels(RowRule(4), has_vnni=vnni, is_batch_invariant=True)
    return make_linear(scheme, tensors, kernels), reference


def forward(linear: Linear, x: Tensor) -> Tensor:
    return linear.matmul(encode(x, [linear.encoding])[linear.encoding])


def rounded_by_128(x: Tensor) -> Tensor:
    """Each token's 128 channels rounded with a scale of their own: the slow reference."""
    rounded = x.double()
    for group in rounded.split(128, dim=1):
        scale = group.abs().amax(dim=1, keepdim=True) / 127
        group.copy_((group / scale).round() * scale)
    return rounded


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("num_tokens", [1, 3, 16, 100])
@pytest.mark.parametrize("shape", [(256, 128), (160, 256), (48, 1280), (144, 352)])
@pytest.mark.parametrize("name", SCHEMES)
def test_kernels_compute_what_the_stored_tensors_say(
    name: str, shape: tuple[int, int], num_tokens: int
) -> None:
    scheme, vnni = SCHEMES[name], name.endswith("vnni")
    if scheme.group_size and shape[1] % scheme.group_size:
        return  # its formats refuse the shape
    weight, x = weights(*shape), inputs(num_tokens, shape[1])
    linear, reference = pack([weight], scheme, vnni=vnni)
    rounded = x.double()
    if scheme.weights == "int8-block":
        rounded = rounded_by_128(x)
    elif scheme.activations == "int8":
        codes = encode(x, ["int8"])["int8"]
        assert codes.scale is not None
        rounded = codes.data.double() * codes.scale
    if scheme.activations == "fp8":
        rounded = fake_quantize_fp8(x, INPUT_SCALE).double()
    got = forward(linear, x)
    assert got.dtype == torch.float32
    assert got.shape == (num_tokens, shape[0])
    kernel = relative_error(got.double(), rounded @ reference.double().T)
    total = relative_error(got, x @ weight.T)
    assert kernel < MAX_KERNEL_ERROR[name], f"{name=} {shape=} {num_tokens=} {kernel=:.2e}"
    assert total < MAX_TOTAL_ERROR[name] * 1.1, f"{name=} {shape=} {num_tokens=} {total=:.2e}"


@pytest.mark.parametrize("name", SCHEMES)
def test_a_row_has_the_same_bits_in_any_batch(name: str) -> None:
    linear, _ = pack([weights(160, 256)], SCHEMES[name], vnni=name.endswith("vnni"))
    x = inputs(70, 256)
    whole = forward(linear, x)
    for first, last in ((0, 1), (5, 7), (11, 14), (3, 68), (64, 70)):
        assert torch.equal(forward(linear, x[first:last]), whole[first:last]), (name, first, last)


@pytest.mark.parametrize("name", SCHEMES)
def test_fused_members_compute_what_they_compute_apart(name: str) -> None:
    vnni = name.endswith("vnni")
    members = [weights(128, 256, seed=1), weights(160, 256, seed=2)]
    x = inputs(9, 256)
    fused, _ = pack(members, SCHEMES[name], vnni=vnni)
    apart = [pack([member], SCHEMES[name], vnni=vnni)[0] for member in members]
    joined = torch.cat([forward(linear, x) for linear in apart], dim=1)
    torch.testing.assert_close(forward(fused, x), joined, rtol=1e-5, atol=1e-5)


def test_a_projection_of_two_schemes_puts_their_outputs_side_by_side() -> None:
    first, _ = pack([weights(128, 256, seed=1)], SCHEMES["int8-a8"], vnni=False)
    second, _ = pack([weights(160, 256, seed=2)], SCHEMES["int4-g128"], vnni=False)
    projection = Projection([first, second])
    assert projection.encodings == {"int8-in-bf16", "bf16"}
    x = inputs(5, 256)
    got = projection.forward(encode(x, projection.encodings))
    assert torch.equal(got, torch.cat((forward(first, x), forward(second, x)), dim=1))


def test_vnni_decides_between_two_kernels_of_the_same_weight() -> None:
    with_vnni, _ = pack([weights(64, 128)], SCHEMES["int8-a8"], vnni=True)
    without, _ = pack([weights(64, 128)], SCHEMES["int8-a8"], vnni=False)
    weight_only, _ = pack([weights(64, 128)], SCHEMES["int8"], vnni=True)
    assert type(with_vnni) is Int8VnniLinear
    assert type(without) is Int8DynamicLinear
    assert type(weight_only) is Int8Linear
    assert with_vnni.num_bytes == without.num_bytes == weight_only.num_bytes == 64 * 128 + 4 * 64


@pytest.mark.parametrize("shape", [(256, 384), (160, 352), (64, 64)])
def test_int8_tiles_give_the_same_bits_with_and_without_vnni(shape: tuple[int, int]) -> None:
    """A tile's sums are exact either way, so that a CPU's instructions decide nothing."""
    weight, x = weights(*shape), inputs(9, shape[1])
    with_vnni, _ = pack([weight], SCHEMES["int8-block-a8-vnni"], vnni=True)
    without, _ = pack([weight], SCHEMES["int8-block-a8"], vnni=False)
    assert torch.equal(forward(with_vnni, x), forward(without, x))


@pytest.mark.parametrize("weights_in", ["int4", "int4-asym"])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_int4_with_int8_inputs_has_the_bits_that_its_formula_says(
    weights_in: WeightFormat, group_size: int
) -> None:
    """With and without VNNI, against a loop over the groups: exact sums of integers, a product and
    a sum of FP32 numbers for each group in ascending order, and a last product."""
    scheme = Scheme(weights=weights_in, group_size=group_size, activations="int8")
    weight, x = weights(48, 384), inputs(5, 384)
    weight[3] = 0.0
    stored = compress(weight, scheme)
    codes = unpack_int4(stored["weight_packed"], 384).long()
    if weights_in == "int4-asym":
        zeros = unpack_zero_point(stored["weight_zero_point"], 48)
        assert zeros.unique().numel() > 3
        codes -= zeros.long().repeat_interleave(group_size, dim=1)
    tokens = encode(x, ["int8"])["int8"]
    assert tokens.scale is not None
    total = torch.zeros(5, 48)
    for group in range(384 // group_size):
        columns = slice(group * group_size, (group + 1) * group_size)
        dots = tokens.data[:, columns].long() @ codes[:, columns].T
        total = total + dots.float() * stored["weight_scale"][:, group].float()
    expected = total * tokens.scale
    for vnni in (False, True):
        linear, _ = pack([weight], scheme, vnni=vnni)
        assert torch.equal(forward(linear, x), expected), vnni
    shapes = packed_shapes(scheme, 48, 384, layout="torch").values()
    assert linear.num_bytes == sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)


def test_an_outlier_among_the_inputs_costs_its_own_tile_only() -> None:
    """Against INT8 with one scale per token, which it costs everything."""
    weight, x = weights(128, 512), inputs(4, 512)
    weight[:, 128:256] = 0.0
    x[:, 130] = 1000.0
    linear, reference = pack([weight], SCHEMES["int8-block-a8"], vnni=False)
    per_token, _ = pack([weight], SCHEMES["int8-a8-vnni"], vnni=True)
    assert relative_error(forward(linear, x), x @ reference.T) < 0.02
    assert relative_error(forward(per_token, x), x @ reference.T) > 0.5


def test_a_token_with_nan_or_infinity_gives_no_finite_products_and_spares_the_others() -> None:
    linear, _ = pack([weights(64, 256)], SCHEMES["int8-block-a8"], vnni=False)
    x = inputs(4, 256)
    clean = forward(linear, x)
    x[1, 200], x[2, 3] = float("nan"), float("inf")
    got = forward(linear, x)
    assert not got[1].isfinite().any()
    assert not got[2].isfinite().any()
    assert torch.equal(got[0], clean[0])
    assert torch.equal(got[3], clean[3])


def test_zero_points_far_from_the_bulk_of_the_codes_cost_less_than_the_format_does() -> None:
    """One weight of 40 sigma per channel sets the range; sums of codes, rounded to BF16, then
    mostly cancel against the zero point. Measured: kernel 2.3e-2 to 3.2e-2, format 4.6e-2."""
    weight, x = weights(64, 7168), inputs(16, 7168)
    weight[:, 3] = 2.0
    linear, reference = pack([weight], SCHEMES["int8-asym"], vnni=False)
    kernel = relative_error(forward(linear, x), x @ reference.T)
    assert kernel < 0.04 < relative_error(x @ reference.T, x @ weight.T)
    weight[:, 3] = 0.0
    weight += 0.2  # all on one side is harmless: the sums are as large as what they differ from
    linear, reference = pack([weight], SCHEMES["int8-asym"], vnni=False)
    assert relative_error(forward(linear, x), x @ reference.T) < 4e-3


def test_fp8_inputs_beyond_the_static_scale_saturate_as_in_the_reference() -> None:
    linear, reference = pack([weights(64, 256)], SCHEMES["int4-g128-afp8"], vnni=False)
    x = 40 * inputs(8, 256)
    rounded = fake_quantize_fp8(x, INPUT_SCALE)
    assert rounded.abs().max() == INPUT_SCALE * 448
    assert (rounded.abs() == rounded.abs().max()).sum() > 1000
    assert relative_error(forward(linear, x), rounded @ reference.T) < 3e-3


def test_members_with_different_input_scales_share_the_largest() -> None:
    scheme = SCHEMES["int4-g128-afp8"]
    members = [weights(64, 256, seed=1), weights(64, 256, seed=2)]
    specs = tuple(spec(str(i), weight) for i, weight in enumerate(members))
    stored = {
        s.module: compress(w, scheme, input_scale=torch.tensor([scale]))
        for s, w, scale in zip(specs, members, (0.5, 0.25), strict=True)
    }
    packed = _pack_linear(PackedLinear("m.f", specs, scheme), _Stored(stored, {}), "torch")
    assert packed["m.f.input_scale"].tolist() == [0.5]


def test_a_token_of_zeros_or_of_one_spike_survives_activation_quantization() -> None:
    linear, reference = pack([weights(64, 128)], SCHEMES["int8-a8"], vnni=False)
    x = torch.zeros(3, 128)
    x[1, 5] = 1000.0
    got = forward(linear, x)
    assert torch.equal(got[0], torch.zeros(64))
    assert torch.equal(got[2], torch.zeros(64))
    torch.testing.assert_close(got[1], 1000 * reference[:, 5], rtol=5e-3, atol=1e-3)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_padding_appends_zeros_up_to_the_next_multiple(dim: int) -> None:
    x = torch.ones(5, 5, 5)
    padded = RowRule(4).pad(x, dim)
    assert padded.shape[dim] == 8
    assert torch.equal(padded.narrow(dim, 0, 5), x)
    assert padded.narrow(dim, 5, 3).abs().sum() == 0
    assert RowRule(5).pad(x, dim) is x


def test_the_probe_finds_a_multiple_on_this_machine_or_says_that_there_is_none() -> None:
    multiple = find_row_multiple(torch.get_num_threads())
    kernels = Kernels.detect(batch_invariant=True)
    assert kernels.is_batch_invariant == (multiple is not None)
    assert kernels.rows.multiple == (multiple or 1)
    assert Kernels.detect(batch_invariant=False).rows.multiple == 1
