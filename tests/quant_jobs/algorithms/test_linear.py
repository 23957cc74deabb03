"""Quantizing one linear: modelopt's amax, our codes, the recorded output error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.allocations import peak_bytes
from torch import Tensor

from deepseek.errors import CheckpointError
from deepseek.formats import compress, decompress, quantize_fp8_block, quantize_int4
from deepseek.inventory import TensorSpec
from deepseek.recipe import Scheme
from deepseek.source.checkpoint import SourceTensor
from quant_jobs.algorithms import ranges
from quant_jobs.algorithms.awq import search_clip
from quant_jobs.algorithms.folding import Smoothing
from quant_jobs.algorithms.gptq import Rounded, gptq, inverse_factor
from quant_jobs.algorithms.ledger import Ledger
from quant_jobs.algorithms.linear import SolvedLinear, _amax, modelopt_quantizer, solve_linear
from quant_jobs.algorithms.ranges import group_ranges
from quant_jobs.calibration.statistics import Accumulator, InputStatistics, observe

INT8 = Scheme(weights="int8")
W8A8 = Scheme(weights="int8", activations="int8")
INT4 = Scheme(weights="int4", group_size=128)
INT4_ASYM = Scheme(weights="int4-asym", group_size=64)
INT8_ASYM = Scheme(weights="int8-asym")
EVERY = [INT8, W8A8, INT8_ASYM, INT4, INT4_ASYM, Scheme(weights="int4", group_size=32)]
NAME = "model.layers.1.mlp.experts.3.up_proj"


def a_source(rows: int = 96, columns: int = 256) -> SourceTensor:
    generator = torch.Generator().manual_seed(6)
    weight = torch.randn(rows, columns, generator=generator) * columns**-0.5
    spec = TensorSpec(f"{NAME}.weight", (rows, columns), "routed_experts", "linear", "expert", 1, 3)
    return SourceTensor(spec, *quantize_fp8_block(weight))


def a_statistic(columns: int = 256) -> InputStatistics:
    x = torch.randn(64, columns, generator=torch.Generator().manual_seed(7))
    x[:, ::31] *= 20
    accumulator = Accumulator(NAME, gram=True)
    accumulator.add(0, observe(x, 64, keep_rows=True))
    statistics = accumulator.finish()
    assert statistics is not None
    return statistics


def solve(
    scheme: Scheme,
    source: SourceTensor | None = None,
    statistics: InputStatistics | None = None,
    smoothing: Smoothing | None = None,
    ledger: Ledger | None = None,
    rounded: Rounded | None = None,
) -> SolvedLinear:
    source = source or a_source()
    return solve_linear(
        source,
        source.dequantize,
        scheme,
        None if statistics is None else statistics.sample,
        smoothing or Smoothing(),
        ledger or Ledger(),
        rounded,
    )


def restore(solved: SolvedLinear, scheme: Scheme, rows: int = 96, columns: int = 256) -> Tensor:
    stored = {name.removeprefix(f"{NAME}."): value for name, value in solved.tensors.items()}
    return decompress(stored, scheme, (rows, columns))


def assert_same_but_for_ties(
    actual: Tensor, expected: Tensor, weight: Tensor, step: Tensor
) -> None:
    """modelopt computes w * (127 / amax), we compute w / scale: a value halfway between two codes
    may round either way (FP8 weights have many of them); all others must be equal."""
    steps = weight / step
    tie = (steps - steps.floor() - 0.5).abs() < 1e-4
    assert torch.allclose(actual[~tie], expected[~tie], rtol=1e-6, atol=0)
    assert ((actual - expected).abs() <= 1.001 * step).all()
    assert tie.float().mean() < 0.1


@pytest.mark.heavy
def test_the_amax_of_rows_and_groups_is_modelopts() -> None:
    weight = a_source().dequantize()
    by_group = _amax(weight, INT4)
    by_row = _amax(weight, INT8)
    assert by_row is not None
    assert by_group is not None
    assert torch.equal(by_row, weight.abs().amax(dim=1, keepdim=True))
    assert torch.equal(by_group, weight.view(96, 2, 128).abs().amax(dim=2))
    assert _amax(weight, INT4_ASYM) is None


@pytest.mark.heavy
def test_published_int8_weights_are_modelopts_fake_quantization() -> None:
    weight = a_source().dequantize()
    theirs = modelopt_quantizer(num_bits=8, axis=0)
    theirs.amax = weight.abs().amax(dim=1, keepdim=True)
    expected, restored = theirs(weight), restore(solve(INT8), INT8)
    assert_same_but_for_ties(restored, expected, weight, theirs.amax / 127)


@pytest.mark.heavy
def test_published_int4_weights_are_modelopts_with_the_stored_bf16_scale() -> None:
    weight = a_source().dequantize()
    restored = restore(solve(INT4), INT4)
    _, scale, _ = quantize_int4(weight, 128)
    theirs = modelopt_quantizer(num_bits=4, block_sizes={-1: 128})
    theirs.amax = scale.float().view(-1, 1) * 7
    step = scale.float().repeat_interleave(128, dim=1)
    assert_same_but_for_ties(restored, theirs(weight), weight, step)
    theirs.amax = weight.view(-1, 128).abs().amax(dim=1, keepdim=True)
    assert (restored - weight).norm() < 1.01 * (theirs(weight) - weight).norm()


@pytest.mark.parametrize("scheme", EVERY, ids=lambda s: s.label)
def test_the_recorded_error_is_that_of_the_restored_weight(scheme: Scheme) -> None:
    statistics, source = a_statistic(), a_source()
    solved = solve(scheme, source, statistics)
    restored, x = restore(solved, scheme), statistics.sample
    if scheme.activations == "int8":
        step = x.abs().amax(dim=1, keepdim=True) / 127
        x = (x / step).round() * step
    y = statistics.sample @ source.dequantize().T
    error = float((x @ restored.T - y).norm() / y.norm())
    assert solved.error == pytest.approx(error, rel=1e-4)
    low, high = (0.002, 0.03) if scheme.bits == 8 else (0.03, 0.2)
    assert low < error < high, (scheme.label, error)


@pytest.mark.parametrize("scheme", EVERY, ids=lambda s: s.label)
def test_plain_rounding_stores_what_the_format_would_choose(scheme: Scheme) -> None:
    weight = a_source().dequantize()
    expected = compress(weight, scheme)
    tensors = solve(scheme).tensors
    assert tensors.keys() == {f"{NAME}.{suffix}" for suffix in expected}
    for suffix, tensor in expected.items():
        assert torch.equal(tensors[f"{NAME}.{suffix}"], tensor), suffix


@pytest.mark.parametrize(
    "clip", [{"clip": "mse"}, {"clip": "percentile", "percentile": 99.0}], ids=lambda c: c["clip"]
)
@pytest.mark.parametrize("scheme", EVERY, ids=lambda s: s.label)
def test_a_clipped_range_is_the_one_that_is_stored(scheme: Scheme, clip: dict[str, Any]) -> None:
    clipped = scheme.model_copy(update=clip)
    chosen = group_ranges(a_source().dequantize(), clipped)
    scale = solve(clipped, None, a_statistic()).tensors[f"{NAME}.weight_scale"]
    assert torch.equal(scale.float(), chosen.scale)
    if scheme.bits == 4:  # 256 levels on 256 weights gain nothing from clipping
        assert not torch.equal(scale, solve(scheme).tensors[f"{NAME}.weight_scale"])


@pytest.mark.parametrize("scheme", EVERY[2:], ids=lambda s: s.label)
def test_what_gptq_rounded_is_stored_as_it_is_and_errs_less(scheme: Scheme) -> None:
    scheme = scheme.model_copy(update={"algorithm": "gptq"})
    statistics, source = a_statistic(), a_source()
    assert statistics.gram is not None
    factor = inverse_factor(statistics.gram, scheme.damping)
    (rounded,) = gptq(source.dequantize()[None], [factor], scheme)
    solved = solve(scheme, source, statistics, rounded=rounded)
    plain = solve(scheme, source, statistics)
    assert torch.equal(restore(solved, scheme), rounded.weight)
    assert solved.error is not None
    assert plain.error is not None
    assert solved.error < 0.6 * plain.error


@pytest.mark.parametrize("scheme", EVERY[2:], ids=lambda s: s.label)
def test_awqs_clip_search_sees_the_inputs_as_they_will_arrive(scheme: Scheme) -> None:
    scheme = scheme.model_copy(update={"algorithm": "awq"})
    statistics, source = a_statistic(), a_source()
    scale = torch.where(torch.arange(256) % 31 == 0, 4.0, 1.0)
    smoothing = Smoothing({f"{NAME}.weight": scale})
    chosen = search_clip(source.dequantize() * scale, statistics.sample / scale, scheme)
    solved = solve(scheme, source, statistics, smoothing)
    assert torch.equal(solved.tensors[f"{NAME}.weight_scale"].float(), chosen.scale)
    unscaled = solve(scheme, source, statistics)
    plain = solve(scheme.model_copy(update={"algorithm": "max"}), source, statistics)
    assert solved.error is not None
    assert unscaled.error is not None
    assert plain.error is not None
    assert unscaled.error < plain.error
    assert solved.error < plain.error
    # A linear that no token reached is rounded to nearest.
    unseen, expected = solve(scheme, source), solve(scheme.model_copy(update={"algorithm": "max"}))
    assert all(
        torch.equal(unseen.tensors[name], expected.tensors[name]) for name in expected.tensors
    )


def test_an_unseen_expert_gets_the_error_of_its_weight() -> None:
    source = a_source()
    solved, weight = solve(INT4, source), source.dequantize()
    expected = float((restore(solved, INT4) - weight).norm() / weight.norm())
    assert solved.error == pytest.approx(expected, rel=1e-5)


def test_the_error_of_a_smoothed_linear_is_measured_in_the_original_units() -> None:
    statistics, source = a_statistic(), a_source()
    plain = solve(W8A8, source, statistics)
    name = f"{NAME}.weight"
    columns = torch.where(torch.arange(256) % 31 == 0, 16.0, 1.0)
    rows = torch.where(torch.arange(96) % 2 == 0, 8.0, 0.5)
    smoothed = solve(W8A8, source, statistics, Smoothing({name: columns}, {name: rows}))
    restored = restore(smoothed, W8A8) * rows[:, None] / columns
    weight = source.dequantize()
    assert (restored - weight).norm() < 0.1 * weight.norm()
    assert plain.error is not None
    assert smoothed.error is not None
    assert smoothed.error < 0.9 * plain.error  # outlier channels no longer set the tokens' scales
    unseen = solve(W8A8, source, None, Smoothing({name: columns}, {name: rows}))
    of_the_weight = float((restored - weight).norm() / weight.norm())
    assert unseen.error == pytest.approx(of_the_weight, rel=1e-5)


def test_fp8_blocks_are_carried_bit_for_bit_without_an_error() -> None:
    source = a_source()
    solved = solve(Scheme(weights="fp8-block"), source, a_statistic())
    assert solved.error is None
    assert solved.tensors[f"{NAME}.weight"] is source.data
    assert solved.tensors[f"{NAME}.weight_scale"] is source.scale_inv


@pytest.mark.parametrize("scheme", EVERY, ids=lambda scheme: scheme.label)
@pytest.mark.parametrize(
    "update", [{}, {"clip": "mse"}, {"clip": "percentile"}, {"algorithm": "awq"}]
)
def test_rows_and_groups_of_zeros_stay_zeros_and_are_no_fallback(
    scheme: Scheme, update: dict[str, Any]
) -> None:
    source, ledger = a_source(), Ledger()
    source.data.view(torch.uint8)[4] = 0
    source.data.view(torch.uint8)[9, :128] = 0x80  # -0
    scheme = scheme.model_copy(update=update)
    solved = solve(scheme, source, a_statistic(), ledger=ledger)
    stored = {name.rpartition(".")[2]: tensor for name, tensor in solved.tensors.items()}
    restored = decompress(stored, scheme, (96, 256))
    assert not restored[4].any()
    assert not restored[9, :128].any()
    assert restored[9, 128:].any()
    assert ledger.entries() == ()


@pytest.mark.parametrize("algorithm", ["max", "awq", "gptq"])
def test_a_weight_with_nan_is_refused_by_name(algorithm: str) -> None:
    source = a_source()
    source.data.view(torch.uint8)[0, 0] = 0x7F  # e4m3's NaN
    for scheme in (INT4_ASYM, INT4, INT8, INT8_ASYM):
        with pytest.raises(CheckpointError, match=f"tensor {NAME}.weight holds NaN"):
            solve(scheme.model_copy(update={"algorithm": algorithm}), source, a_statistic())


@pytest.mark.parametrize("update", [{}, {"clip": "mse"}, {"algorithm": "awq"}], ids=str)
def test_a_weight_beyond_the_formats_is_refused_by_name(update: dict[str, Any]) -> None:
    spec = a_source().spec
    source = SourceTensor(spec, torch.full((96, 256), 1e38, dtype=torch.bfloat16))
    for scheme in (INT4_ASYM, INT4, INT8):
        with pytest.raises(CheckpointError, match=rf"tensor {NAME}.weight .*above 2\^126"):
            solve(scheme.model_copy(update=update), source, a_statistic())


def test_a_weight_of_zeros_errs_by_nothing() -> None:
    source = SourceTensor(a_source().spec, torch.zeros(96, 256, dtype=torch.bfloat16))
    ledger = Ledger()
    assert solve(INT4, source, a_statistic(), ledger=ledger).error == 0.0
    assert solve(INT8, source, None, ledger=ledger).error == 0.0
    assert ledger.entries() == ()


@pytest.mark.heavy
@pytest.mark.parametrize("smoothed", [False, True], ids=["plain", "smoothed"])
@pytest.mark.parametrize(
    "scheme",
    [
        *(INT8, W8A8, INT8_ASYM, INT4, INT4_ASYM),
        INT4.model_copy(update={"clip": "mse"}),
        INT8.model_copy(update={"clip": "percentile", "percentile": 99.0}),
        INT4.model_copy(update={"algorithm": "awq"}),
    ],
    ids=lambda s: f"{s.label}-{s.clip}-{s.algorithm}",
)
def test_one_float32_copy_of_a_weight_is_held_at_a_time(
    scheme: Scheme, smoothed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plus codes and packed tensors, up to half its size, and a few rows in use."""
    monkeypatch.setattr("deepseek.formats.scales._CHUNK_ELEMENTS", 1 << 14)
    monkeypatch.setitem(ranges._CHUNK_ELEMENTS, "cpu", 1 << 14)
    modelopt_quantizer(num_bits=8, axis=0)  # its import must not count
    rows = columns = 1024
    source, statistics = a_source(rows, columns), a_statistic(columns)
    name, twos = f"{NAME}.weight", torch.full((1024,), 2.0)
    smoothing = Smoothing({name: twos}, {name: twos}) if smoothed else Smoothing()
    peak = peak_bytes(lambda: solve(scheme, source, statistics, smoothing))
    assert peak < 1.75 * rows * columns * 4, peak / (rows * columns * 4)


def test_a_source_in_float32_is_not_folded_where_it_lies() -> None:
    weight = a_source().dequantize()
    source = SourceTensor(a_source().spec, weight.clone())
    columns, rows = torch.full((256,), 2.0), torch.full((96,), 4.0)
    smoothing = Smoothing({f"{NAME}.weight": columns}, {f"{NAME}.weight": rows})
    solved = solve(INT8, source, a_statistic(), smoothing)
    assert torch.equal(source.data, weight)
    expected = solve(INT8, a_source(), a_statistic(), smoothing)
    assert solved.error == expected.error
    assert all(
        torch.equal(solved.tensors[name], tensor) for name, tensor in expected.tensors.items()
    )
