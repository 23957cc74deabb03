"""Native linears: the formats' own values, on every instruction set that this CPU has, whatever the
shapes, the batch and the threads; and nothing beside them is read or written."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("deepseek._native", reason="the extension was not built")

from support.native_linears import (
    NativeInput,
    NativeLinear,
    Product,
    multiply,
    poisoned,
    quantize_linear,
    rounded_input,
    run_products,
)

from deepseek import _native
from deepseek.formats import quantize_input_fp8, quantize_token_groups_int8, quantize_tokens_int8
from deepseek.recipe import Scheme

ISAS = _native.available_isas()
SCHEMES = {
    scheme.label: scheme
    for scheme in (
        Scheme(weights="bf16"),
        Scheme(weights="int8"),
        Scheme(weights="int8-asym"),
        Scheme(weights="int8", activations="int8"),
        Scheme(weights="int8-block", activations="int8"),
        *(
            Scheme(weights=weights, group_size=group, activations=activations)
            for group in (32, 64, 128)
            for weights, activations in (
                ("int4", "none"),
                ("int4-asym", "none"),
                ("int4", "int8"),
                ("int4-asym", "int8"),
                ("int4", "fp8"),
            )
        ),
    )
}
#: Relative to the magnitude of the sums: FP32 additions of exact products, in one order or another.
TOLERANCE = 1e-6


def sample(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(scheme: Scheme, num_outputs: int, num_inputs: int) -> tuple[NativeLinear, Tensor]:
    """Weights with a mean, where there are zero points for it, and one output that is far off."""
    weight = sample(7, num_outputs, num_inputs)
    if not scheme.is_symmetric:
        weight += 0.7
    weight[num_outputs // 2] *= 50
    return quantize_linear(scheme, weight)


def expected_output(linear: NativeLinear, values: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The product in FP64, and the magnitude of its sums."""
    rounded = rounded_input(linear, x).double()
    return rounded @ values.double().T, rounded.abs() @ values.double().abs().T


def shapes_of(scheme: Scheme) -> list[tuple[int, int, int]]:
    """(T, N, K): one row to hundreds; whole blocks and ragged ends."""
    group = scheme.group_size
    if group is not None:
        return [(1, 16, group), (7, 100, 3 * group), (130, 33, 8 * group), (19, 272, 2 * group)]
    return [(1, 16, 4), (1, 200, 260), (7, 100, 131), (2, 1, 1), (130, 33, 520), (311, 80, 64)]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("label", SCHEMES)
def test_products_are_those_of_the_formats_values(label: str, isa: str) -> None:
    _native.use_isa(isa)
    for num_rows, num_outputs, num_inputs in shapes_of(SCHEMES[label]):
        linear, values = make(SCHEMES[label], num_outputs, num_inputs)
        x = sample(1, num_rows, num_inputs)
        expected, magnitude = expected_output(linear, values, x)
        out = multiply(linear, x, threads=2)
        assert ((out - expected).abs() <= TOLERANCE * magnitude).all(), (num_rows, num_outputs)


@pytest.mark.parametrize("label", ["int8-a8", "int8-block-a8", "int4-g32-a8", "bf16"])
def test_long_sums_are_cut_into_chunks_that_change_nothing(label: str) -> None:
    """More inputs than a chunk, by one row (no chunks) and by many."""
    linear, values = make(SCHEMES[label], 48, 9 * 1024)
    x = sample(2, 40, 9 * 1024)
    together = multiply(linear, x)
    expected, magnitude = expected_output(linear, values, x)
    assert ((together - expected).abs() <= TOLERANCE * magnitude).all()
    alone = torch.cat([multiply(linear, row) for row in x.split(1)])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("isa", ISAS)
def test_int8_products_have_the_bits_of_torchs(isa: str) -> None:
    """Sums are exact integers, and the scales multiply them in the same order, so W8A8 is the same
    on every CPU."""
    _native.use_isa(isa)
    weight, x = sample(3, 150, 300), sample(4, 9, 300)
    for label in ("int8-a8", "int8-block-a8"):
        linear, _ = quantize_linear(SCHEMES[label], weight)
        assert torch.equal(multiply(linear, x, threads=3), torch_int8(linear, weight, x))


def torch_int8(linear: NativeLinear, weight: Tensor, x: Tensor) -> Tensor:
    """INT8 by INT8 as deepseek/engine/linear.py computes it, sums in FP64, which are exact."""
    from deepseek.formats import TILE, quantize_int8, quantize_int8_block

    if linear.encoding == "int8":
        codes, scale = quantize_int8(weight)
        inputs, input_scale = quantize_tokens_int8(x)
        sums = (inputs.double() @ codes.double().T).float()
        return sums.mul_(scale.flatten()).mul_(input_scale)
    codes, scale = quantize_int8_block(weight)
    inputs, input_scale = quantize_token_groups_int8(x)
    total = torch.zeros(len(x), len(weight))
    for tile in range(scale.shape[1]):
        part = slice(tile * TILE, (tile + 1) * TILE)
        sums = (inputs[:, part].double() @ codes[:, part].double().T).float()
        of_outputs = scale[:, tile].repeat_interleave(TILE)[: len(weight)]
        total += sums.mul_(input_scale[:, tile : tile + 1]).mul_(of_outputs)
    return total


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("label", ["int8", "int8-asym", "int8-a8", "int8-block-a8", "bf16"])
def test_a_rows_bits_do_not_depend_on_its_batch_or_on_threads(label: str, isa: str) -> None:
    _native.use_isa(isa)
    check_rows(SCHEMES[label], 210, 384)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("label", [label for label in SCHEMES if label.startswith("int4")])
def test_an_int4_rows_bits_do_not_depend_on_its_batch_or_on_threads(label: str, isa: str) -> None:
    _native.use_isa(isa)
    check_rows(SCHEMES[label], 100, 256)


def check_rows(scheme: Scheme, num_outputs: int, num_inputs: int) -> None:
    linear, _ = make(scheme, num_outputs, num_inputs)
    x = sample(5, 29, num_inputs)
    whole = multiply(linear, x, threads=2)
    for threads in (1, 3, 9):
        assert torch.equal(multiply(linear, x, threads=threads), whole)
    for first, last in ((0, 1), (3, 5), (7, 11), (4, 10), (9, 22)):
        assert torch.equal(multiply(linear, x[first:last].clone()), whole[first:last])
    rows = torch.tensor([28, 3, 3, 0, 17, 5, 11])
    assert torch.equal(multiply(linear, x[rows]), whole[rows])


@pytest.mark.parametrize("isa", ISAS)
def test_products_of_several_weights_are_one_call(isa: str) -> None:
    """As the experts of a batch: some with many rows, some with one, some with none."""
    _native.use_isa(isa)
    x = sample(6, 50, 256)
    labels = ["int8-a8", "int4-g32-a8", "int4-asym-g64-a8", "int8-a8", "int4-g128-a8"]
    linears = [
        quantize_linear(SCHEMES[label], sample(i, 96, 256))[0] for i, label in enumerate(labels)
    ]
    rows = [slice(0, 50), slice(7, 8), slice(0, 0), slice(3, 33), slice(49, 50)]
    outs = [torch.full((len(x[chosen]), 96), torch.nan) for chosen in rows]
    run_products(
        [
            Product(linear, NativeInput(x[chosen].clone(), "int8"), out)
            for linear, out, chosen in zip(linears, outs, rows, strict=True)
        ],
        threads=3,
    )
    for linear, out, chosen in zip(linears, outs, rows, strict=True):
        assert torch.equal(out, multiply(linear, x)[chosen])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("label", SCHEMES)
def test_memory_beside_the_tensors_is_neither_read_nor_written(label: str, isa: str) -> None:
    """Every tensor lies between bytes of 0xFF, which are NaN as floats: what was read from there
    would be in the products, and what was written there is seen."""
    _native.use_isa(isa)
    scheme = SCHEMES[label]
    num_inputs = 3 * scheme.group_size if scheme.group_size else 131
    linear, values = make(scheme, 83, num_inputs)
    linear, frames = linear.with_tensors(poisoned)
    x, x_frame = poisoned(sample(13, 9, num_inputs))
    out, out_frame = poisoned(torch.full((9, 83), torch.nan))
    encoded = NativeInput(x, linear.encoding, input_scale=linear.input_scale)
    run_products([Product(linear, encoded, out)], threads=2)
    expected, magnitude = expected_output(linear, values, x)
    assert ((out - expected).abs() <= TOLERANCE * magnitude).all()
    for frame in (*frames, x_frame, out_frame):
        assert frame.is_whole()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("num_inputs", [1, 31, 128, 300])
def test_inputs_are_rounded_to_the_bits_of_the_formats(num_inputs: int, isa: str) -> None:
    _native.use_isa(isa)
    x = sample(14, 12, num_inputs) * torch.logspace(-30, 30, 12)[:, None]
    x[3] = 0
    x[5, 0] = 448.0
    x[6] = torch.arange(num_inputs) + 0.5  # ties
    x[7] = 1e-39  # subnormal
    codes, scale = NativeInput(x, "int8").codes()
    expected, expected_scale = quantize_tokens_int8(x)
    assert torch.equal(codes, expected)
    assert torch.equal(scale, expected_scale)
    codes, scale = NativeInput(x, "int8-tiles").codes()
    expected, expected_scale = quantize_token_groups_int8(x)
    assert torch.equal(codes, expected)
    assert torch.equal(scale, expected_scale)
    values, _ = NativeInput(x, "bf16").codes()
    assert torch.equal(values.view(torch.int16), x.bfloat16().view(torch.int16))
    for input_scale in (0.013, 1.0, 3e5):
        values, _ = NativeInput(x, "fp8", input_scale=input_scale).codes()
        fp8 = quantize_input_fp8(x, torch.tensor([input_scale]))
        assert torch.equal(values.float(), fp8.float())


@pytest.mark.parametrize("isa", ISAS)
def test_every_e4m3_value_and_every_tie_between_two_rounds_as_torch_rounds_it(isa: str) -> None:
    _native.use_isa(isa)
    values = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (values[1:] + values[:-1]) / 2
    x = torch.cat([values, ties, ties * (1 + 2**-20), ties * (1 - 2**-20), torch.tensor([1e9])])
    x = torch.cat([x, -x])[None]
    rounded, _ = NativeInput(x, "fp8").codes()
    assert torch.equal(rounded.float(), quantize_input_fp8(x, torch.ones(1)).float())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "label", ["int8-a8", "int8-block-a8", "int4-g32-a8", "bf16", "int4-g32-afp8"]
)
def test_a_row_with_nan_gives_nan_and_leaves_the_others_alone(label: str, isa: str) -> None:
    _native.use_isa(isa)
    linear, _ = make(SCHEMES[label], 32, 256)
    x = sample(15, 8, 256)
    clean = multiply(linear, x)
    x[2, 200] = torch.nan
    damaged = multiply(linear, x)
    assert damaged[2].isnan().all()
    kept = torch.arange(8) != 2
    assert torch.equal(damaged[kept], clean[kept])


def test_random_shapes() -> None:
    random = np.random.default_rng(0)
    for _ in range(40):
        scheme = SCHEMES[str(random.choice(list(SCHEMES)))]
        num_rows, num_outputs = int(random.integers(1, 60)), int(random.integers(1, 150))
        num_inputs = int(random.integers(1, 12)) * (
            scheme.group_size or int(random.integers(1, 90))
        )
        linear, values = make(scheme, num_outputs, num_inputs)
        x = sample(16, num_rows, num_inputs)
        expected, magnitude = expected_output(linear, values, x)
        out = multiply(linear, x, threads=int(random.integers(1, 5)))
        assert ((out - expected).abs() <= TOLERANCE * magnitude).all(), scheme.label
