"""GPTQ: the paper's loop over columns, batched; and what it does where the paper's would fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.allocations import peak_bytes
from torch import Tensor

from deepseek.errors import CheckpointError
from deepseek.formats import compress, decompress
from deepseek.recipe import Scheme
from quant_jobs.algorithms.gptq import MAX_DAMPING, Factor, Rounded, gptq, inverse_factor
from quant_jobs.algorithms.ranges import group_ranges, grouped, nearest

pytestmark = pytest.mark.heavy

SCHEMES: dict[str, dict[str, Any]] = {
    "int4-g32": {"weights": "int4", "group_size": 32},
    "int4-g64": {"weights": "int4", "group_size": 64},
    "int4-g128": {"weights": "int4", "group_size": 128},
    "int4-g64-mse": {"weights": "int4", "group_size": 64, "clip": "mse"},
    "int4-g32-order": {"weights": "int4", "group_size": 32, "act_order": True},
    "int4-asym-g32": {"weights": "int4-asym", "group_size": 32},
    "int4-asym-g128": {"weights": "int4-asym", "group_size": 128},
    "int4-asym-g64-order": {"weights": "int4-asym", "group_size": 64, "act_order": True},
    "int8": {"weights": "int8"},
    "int8-order": {"weights": "int8", "act_order": True},
    "int8-asym": {"weights": "int8-asym"},
}

every_scheme = pytest.mark.parametrize("name", SCHEMES)


def scheme_of(name: str) -> Scheme:
    return Scheme(algorithm="gptq", **SCHEMES[name])


def correlated(tokens: int, columns: int, seed: int) -> Tensor:
    """f32 [T, K]: inputs as a linear sees them, few directions carrying much and some outliers."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, columns // 4, generator=generator) @ torch.randn(
        columns // 4, columns, generator=generator
    )
    x = mixed * (columns // 4) ** -0.5 + 0.3 * torch.randn(tokens, columns, generator=generator)
    x[:, ::29] *= 6
    return x


def case(
    num: int = 1, rows: int = 24, columns: int = 256, tokens: int = 600, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Weights f32 [n, N, K] and inputs f32 [n, T, K]."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num, rows, columns, generator=generator) * columns**-0.5 + 0.01
    return weight, torch.stack([correlated(tokens, columns, seed + i) for i in range(num)])


def gram_of(x: Tensor) -> Tensor:
    return x.mT @ x


def factors_of(gram: Tensor, scheme: Scheme) -> list[Factor]:
    """Of matrices [n, K, K], which are left as they are."""
    return [inverse_factor(one.clone(), scheme.damping, act_order=scheme.act_order) for one in gram]


def rounded(weight: Tensor, factors: list[Factor], scheme: Scheme) -> list[Rounded]:
    """`gptq` on a copy."""
    return gptq(weight.clone(), factors, scheme)


def solve(weight: Tensor, x: Tensor, scheme: Scheme) -> list[Rounded]:
    factors = factors_of(gram_of(x), scheme)
    assert not any(factor.failed for factor in factors)
    return rounded(weight, factors, scheme)


def loss(weight: Tensor, restored: Tensor, x: Tensor) -> float:
    """||X (W' - W)^T||^2 in float64."""
    return float((x.double() @ (restored.double() - weight.double()).T).square().sum())


def plain(weight: Tensor, scheme: Scheme) -> Tensor:
    """Rounding to nearest."""
    return nearest(grouped(weight, scheme), group_ranges(weight, scheme), scheme).flatten(1)


def textbook(weight: Tensor, x: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """One weight [N, K], the paper's algorithm column by column in float64, no blocks, no batch.

    Returns codes [N, K] and the restored weight [N, K]. The inverse Hessian is made explicitly and
    eliminated column by column (OBQ's update, the paper's equation 3); its Cholesky form is what is
    under test.
    """
    columns = weight.shape[1]
    x = x.double()
    hessian = x.T @ x
    hessian += scheme.damping * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    order = list(range(columns))
    if scheme.act_order:
        order = (x.T @ x).diagonal().argsort(descending=True).tolist()
    inverse = torch.linalg.inv(hessian)
    work, size = weight.double().clone(), scheme.group_size or columns
    up_front = group_ranges(weight, scheme)
    scales: dict[int, tuple[Tensor, Tensor]] = {}
    restored, codes = torch.zeros_like(work), torch.zeros_like(work)
    low, high = -(1 << (scheme.bits - 1)), (1 << (scheme.bits - 1)) - 1
    for column in order:
        group = column // size
        if group not in scales:
            chosen = up_front
            if scheme.group_size and not scheme.act_order:
                chosen = group_ranges(work.float(), scheme)
            zero = (
                torch.zeros(len(weight))
                if chosen.zero_point is None
                else chosen.zero_point[:, group]
            )
            scales[group] = chosen.scale[:, group].double(), zero.double()
        scale, zero = scales[group]
        code = (work[:, column] / scale + zero).round().clamp(low, high)
        codes[:, column] = code
        restored[:, column] = (code - zero) * scale
        error = (work[:, column] - restored[:, column]) / inverse[column, column]
        work -= error[:, None] * inverse[None, column]
        inverse = (
            inverse - inverse[:, column, None] * inverse[None, column] / inverse[column, column]
        )
    return codes, restored


def codes_of(solved: Rounded, scheme: Scheme) -> Tensor:
    scale = solved.scale[..., None]
    codes = (grouped(solved.weight, scheme) / scale).round()
    if solved.zero_point is not None:
        codes += solved.zero_point[..., None]
    return codes.flatten(1)


@every_scheme
def test_it_is_the_papers_algorithm(name: str) -> None:
    """Float32 and float64 part ways where a value lies within float32's rounding of the middle of
    two codes: none here, up to 0.2 % of the codes on another machine, of equal loss."""
    scheme = scheme_of(name)
    # 192 columns are one whole block of columns and half of one.
    weight, x = case(columns=256 if scheme.group_size == 128 else 192)
    (found,) = solve(weight, x, scheme)
    codes, restored = textbook(weight[0], x[0], scheme)
    differ = float((codes_of(found, scheme) != codes).float().mean())
    assert differ < 0.002, f"{name}: {differ:.4f} of the codes"
    wanted = loss(weight[0], restored, x[0])
    assert loss(weight[0], found.weight, x[0]) == pytest.approx(wanted, rel=1e-3)


@every_scheme
def test_it_errs_less_than_rounding_to_nearest(name: str) -> None:
    """On inputs that it has not seen, too."""
    scheme = scheme_of(name)
    weight, x = case(tokens=1600)
    (found,) = solve(weight, x[:, :1200], scheme)
    for tokens in (x[0, :1200], x[0, 1200:]):
        theirs = loss(weight[0], plain(weight[0], scheme), tokens)
        assert loss(weight[0], found.weight, tokens) < 0.5 * theirs


@every_scheme
def test_a_batch_is_its_entries_one_by_one_to_the_bit(name: str) -> None:
    scheme = scheme_of(name)
    weight, x = case(num=3, rows=9, tokens=300)
    together = solve(weight, x, scheme)
    assert len(together) == 3
    for entry, one in enumerate(together):
        (alone,) = solve(weight[entry, None], x[entry, None], scheme)
        assert_equal(one, alone)


def test_one_factor_serves_many_weights() -> None:
    scheme = scheme_of("int4-g64")
    weight, x = case(num=3)
    factor = factors_of(gram_of(x[:1]), scheme)
    together = rounded(weight, factor, scheme)
    stacked = rounded(weight.flatten(0, 1)[None], factor, scheme)[0].split(3)
    for entry, one in enumerate(together):
        assert_equal(one, rounded(weight[entry, None], factor, scheme)[0])
        # Stacked along their outputs, products have another shape and may round differently.
        share = (one.weight != stacked[entry].weight).float().mean()
        assert share < 0.01
        assert stacked[entry].weight.is_contiguous()


def test_a_stack_of_outputs_is_cut_where_it_was_joined() -> None:
    scheme = scheme_of("int4-asym-g32")
    weight, x = case(rows=30)
    (whole,) = solve(weight, x, scheme)
    parts = whole.split(3)
    assert [tuple(part.weight.shape) for part in parts] == [(10, 256)] * 3
    assert torch.equal(torch.cat([part.weight for part in parts]), whole.weight)
    assert torch.equal(torch.cat([part.scale for part in parts]), whole.scale)
    zero_points = [part.zero_point for part in parts if part.zero_point is not None]
    assert whole.zero_point is not None
    assert torch.equal(torch.cat(zero_points), whole.zero_point)


@every_scheme
def test_what_is_stored_reads_back_to_the_bit(name: str) -> None:
    scheme = scheme_of(name)
    weight, x = case(rows=40)
    weight[0, 3] = 0.0
    (found,) = solve(weight, x, scheme)
    stored = compress(found.weight, scheme, scale=found.scale, zero_point=found.zero_point)
    restored = decompress(stored, scheme, (40, 256))
    assert torch.equal(restored, found.weight)
    assert found.scale.shape == (40, 256 // (scheme.group_size or 256))
    assert (found.zero_point is None) == scheme.is_symmetric
    assert (found.scale[3] == 1.0).all()
    assert not found.weight[3].any()


@every_scheme
def test_weights_are_rounded_where_they_lie_and_factors_only_read(name: str) -> None:
    weight, x = case(num=2)
    scheme = scheme_of(name)
    factors = factors_of(gram_of(x), scheme)
    uppers = [factor.upper.clone() for factor in factors]
    for entry, one in enumerate(gptq(weight, factors, scheme)):
        assert one.weight.data_ptr() == weight[entry].data_ptr()
    assert all(torch.equal(f.upper, upper) for f, upper in zip(factors, uppers, strict=True))


# --- the factor ---


@pytest.mark.parametrize("act_order", [False, True])
def test_the_factor_is_that_of_the_inverse_in_float64(act_order: bool) -> None:
    _, x = case(num=3, columns=96)
    gram = gram_of(x)
    for entry in range(3):
        matrix = gram[entry].double()
        factor = inverse_factor(gram[entry], 0.01, act_order=act_order)
        assert factor.upper.data_ptr() == gram[entry].data_ptr()
        assert (factor.order is not None) == act_order
        assert (factor.damping, factor.failed) == (0.01, False)
        if factor.order is not None:
            order = factor.order
            assert sorted(order.tolist()) == list(range(96))
            activity = matrix.diagonal()[order]
            assert (activity[1:] <= activity[:-1]).all()
            matrix = matrix[order][:, order]
        damped = matrix + 0.01 * matrix.diagonal().mean() * torch.eye(96, dtype=torch.float64)
        wanted = torch.linalg.inv(damped)
        upper = factor.upper.double()
        assert torch.equal(upper, upper.triu())
        assert (upper.T @ upper - wanted).norm() < 1e-4 * wanted.norm()


def out_of_place(gram: Tensor, damping: float) -> Tensor:
    """The same steps with a matrix of its own for each."""
    damped = gram + damping * float(gram.diagonal().double().mean()) * torch.eye(len(gram))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


@pytest.mark.parametrize("columns", [96, 512, 700])
def test_the_factor_made_in_place_is_that_of_copies_to_the_bit(columns: int) -> None:
    _, x = case(columns=columns)
    gram = gram_of(x)[0]
    wanted = out_of_place(gram, 0.01)
    assert torch.equal(inverse_factor(gram, 0.01).upper, wanted)


@pytest.mark.parametrize("act_order", [False, True])
def test_a_factor_takes_one_matrix_beside_its_own(act_order: bool) -> None:
    gram = gram_of(case(columns=512)[1])[0]
    taken = peak_bytes(lambda: inverse_factor(gram, 0.01, act_order=act_order))
    assert gram.nbytes <= taken < 1.02 * gram.nbytes


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["int4-g128", "int4-g32-order"])
def test_rounding_takes_a_few_columns_beside_the_weight(name: str) -> None:
    scheme = scheme_of(name)
    weight, x = case(rows=256, columns=1024, tokens=100)
    factors = factors_of(gram_of(x), scheme)
    taken = peak_bytes(lambda: gptq(weight, factors, scheme))
    # In another order the columns, and an index of them, are moved.
    assert taken < (1.65 if scheme.act_order else 0.65) * weight.nbytes, taken / weight.nbytes


def test_dead_inputs_are_rounded_to_nearest_and_the_rest_as_without_them() -> None:
    scheme = scheme_of("int8")
    weight, x = case(columns=128)
    dead = [7, 8, 100]
    x[:, :, dead] = 0.0
    # The channel's range is made by an input that is alive.
    weight[:, :, 50] = 0.5
    (found,) = solve(weight, x, scheme)
    assert torch.equal(found.weight[:, dead], plain(weight[0], scheme)[:, dead])
    alive = [column for column in range(128) if column not in dead]
    # The mean of the diagonal, and so the damping, counts the dead.
    damping = scheme.damping * len(alive) / 128
    less = scheme.model_copy(update={"damping": damping})
    (without,) = solve(weight[:, :, alive], x[:, :, alive], less)
    differ = (found.weight[:, alive] != without.weight).float().mean()
    assert differ < 0.05
    assert loss(weight[0], found.weight, x[0]) == pytest.approx(
        loss(weight[0, :, alive], without.weight, x[0, :, alive]), rel=0.02
    )


def test_without_any_active_input_all_is_rounded_to_nearest() -> None:
    scheme = scheme_of("int4-g32")
    weight, _ = case()
    factors = factors_of(torch.zeros(1, 256, 256), scheme)
    assert not factors[0].failed
    (found,) = rounded(weight, factors, scheme)
    assert torch.equal(found.weight, plain(weight[0], scheme))


def test_damping_grows_until_the_matrix_is_positive_definite() -> None:
    """By tenfold steps."""
    _, x = case(columns=64)
    gram = gram_of(x)[0]
    mean = float(gram.diagonal().mean())
    # One eigenvalue at -0.05 of the mean diagonal: 0.001 and 0.01 do not lift it, 0.1 does.
    values, vectors = torch.linalg.eigh(gram.double())
    values[0] = -0.05 * mean
    broken = (vectors @ values.diag() @ vectors.T).float()
    factor = inverse_factor(broken.clone(), 0.001)
    assert not factor.failed
    assert factor.damping == pytest.approx(0.1)
    damped = broken.double() + 0.1 * broken.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    wanted, upper = torch.linalg.inv(damped), factor.upper.double()
    assert (upper.T @ upper - wanted).norm() < 1e-4 * wanted.norm()


def test_fewer_tokens_than_inputs_need_no_more_damping_than_asked() -> None:
    scheme = scheme_of("int4-g64")
    weight, x = case(tokens=20)
    (factor,) = factors_of(gram_of(x), scheme)
    assert (factor.failed, factor.damping) == (False, scheme.damping)
    (found,) = rounded(weight, [factor], scheme)
    assert loss(weight[0], found.weight, x[0]) < loss(weight[0], plain(weight[0], scheme), x[0])


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("what", ["nan", "inf", "negative"])
def test_a_matrix_beyond_damping_is_given_up_and_rounded_to_nearest(
    what: str, act_order: bool
) -> None:
    name = "int4-g32-order" if act_order else "int4-g32"
    scheme = scheme_of(name)
    weight, x = case(num=3)
    gram = gram_of(x)
    if what == "negative":
        gram[1] = -torch.eye(256) * gram[1].diagonal().mean() * 2
        gram[1, 0, 0] = 1e-3
    else:
        gram[1, 5, 9] = float(what)
    factors = factors_of(gram, scheme)
    assert [factor.failed for factor in factors] == [False, True, False]
    assert max(factor.damping for factor in factors) <= MAX_DAMPING * 10
    assert torch.equal(factors[1].upper, torch.eye(256))
    solved = rounded(weight, factors, scheme)
    assert torch.equal(solved[1].weight, plain(weight[1], scheme))
    for entry in (0, 2):  # the others do not notice
        (alone,) = solve(weight[entry, None], x[entry, None], scheme)
        assert_equal(solved[entry], alone)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1e38])
@pytest.mark.parametrize("name", ["int4-g32", "int4-asym-g64-order", "int8"])
def test_weights_that_no_format_can_hold_are_refused(name: str, bad: float) -> None:
    weight, x = case()
    weight[0, 4, 4] = bad
    with pytest.raises(CheckpointError, match="NaN, infinity"):
        solve(weight, x, scheme_of(name))


def test_activation_order_helps_where_few_inputs_carry_most() -> None:
    weight, x = case(seed=3)
    x[..., 200:204] *= 20  # the last to be rounded otherwise
    errors = [
        loss(weight[0], solve(weight, x, scheme_of(name))[0].weight, x[0])
        for name in ("int8", "int8-order")
    ]
    assert errors[1] < errors[0]


def assert_equal(one: Rounded, other: Rounded) -> None:
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(one.scale, other.scale)
    assert (one.zero_point is None) == (other.zero_point is None)
    if one.zero_point is not None and other.zero_point is not None:
        assert torch.equal(one.zero_point, other.zero_point)
