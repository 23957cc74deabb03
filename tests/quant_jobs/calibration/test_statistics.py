"""Statistics added in block order equal brute force over all tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepseek.errors import CheckpointError
from deepseek.inventory import input_key
from quant_jobs.calibration.statistics import (
    SAMPLE_TOKENS,
    Accumulator,
    InputStatistics,
    observe,
    rows_per_block,
    spread,
)

NAME = "model.layers.1.mlp.experts.3.gate_proj"


def blocks(sizes: list[int], num_channels: int = 24) -> list[Tensor]:
    """f32 [T, K] each, with channels of very different magnitude, one of them all zero."""
    generator = torch.Generator().manual_seed(9)
    scale = torch.logspace(-3, 3, num_channels)
    scale[5] = 0.0
    return [torch.randn(size, num_channels, generator=generator) * scale for size in sizes]


def add_up(inputs: list[Tensor], num_rows: int, *, gram: bool = True) -> InputStatistics:
    accumulator = Accumulator(NAME, gram=gram)
    for block, x_TK in enumerate(inputs):
        accumulator.add(block, observe(x_TK, num_rows, keep_rows=gram))
    statistics = accumulator.finish()
    assert statistics is not None
    return statistics


def test_sums_are_those_of_all_tokens_at_once() -> None:
    inputs = blocks([40, 1, 17, 64])
    statistics, whole = add_up(inputs, 8), torch.cat(inputs).double()
    assert statistics.tokens == len(whole) == 122
    assert torch.equal(statistics.amax, whole.abs().amax(dim=0).float())
    torch.testing.assert_close(
        statistics.mean_abs.double(), whole.abs().mean(dim=0), rtol=1e-7, atol=0
    )
    assert statistics.gram is not None
    size = whole.square().sum(dim=0).sqrt()
    error = (statistics.gram.double() - whole.T @ whole).abs()
    assert (error <= 1e-6 * size[:, None] * size).all()
    assert torch.equal(statistics.gram, statistics.gram.T)
    assert not statistics.gram[5].any()
    assert {statistics.amax.dtype, statistics.mean_abs.dtype, statistics.gram.dtype} == {
        torch.float32
    }


@pytest.mark.parametrize("band", [1 << 8, 1 << 14, 1 << 20])
@pytest.mark.parametrize(("tokens", "channels"), [(1, 640), (100, 192), (257, 1088), (900, 64)])
def test_bands_of_channels_add_up_to_the_whole_to_the_bit(
    tokens: int, channels: int, band: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quant_jobs.calibration.statistics._BAND_ELEMENTS", band)
    (x_TK,) = blocks([tokens], channels)
    share = observe(x_TK, 8)
    assert torch.equal(share.amax, x_TK.abs().amax(dim=0))
    assert torch.equal(share.abs_sum, x_TK.abs().sum(dim=0, dtype=torch.float64))


def test_many_small_magnitudes_are_not_lost_in_a_large_sum() -> None:
    """A float32 sum would stop growing at 2^24 times its addend."""
    inputs = [torch.full((2, 1), 2.0**25), *[torch.full((4096, 1), 1.0)] * 64]
    statistics = add_up(inputs, 1, gram=False)
    exact = (2 * 2.0**25 + 64 * 4096) / (2 + 64 * 4096)
    assert float(statistics.mean_abs) == pytest.approx(exact, rel=1e-7)


def test_the_sample_is_spread_over_blocks_and_ends_when_it_is_full() -> None:
    inputs = blocks([100, 3, 100, 100, 100, 100])
    statistics = add_up(inputs, 60)
    expected = torch.cat(
        [x[[i * len(x) // min(60, len(x)) for i in range(min(60, len(x)))]] for x in inputs]
    )[:SAMPLE_TOKENS]
    assert statistics.sample.shape == (SAMPLE_TOKENS, 24)
    assert torch.equal(statistics.sample, expected)
    few = add_up(inputs[:2], 5)
    assert len(few.sample) == 5 + 3


def test_the_sample_does_not_hold_the_blocks_memory() -> None:
    x_TK = blocks([300])[0]
    statistics = add_up([x_TK], SAMPLE_TOKENS, gram=False)
    before = statistics.sample.clone()
    x_TK.zero_()
    assert torch.equal(statistics.sample, before)


def test_a_gram_matrix_is_only_made_where_it_is_asked_for() -> None:
    inputs = blocks([8])
    assert add_up(inputs, 4, gram=False).gram is None
    assert observe(inputs[0], 4).rows is None
    with pytest.raises(AssertionError, match="a Gram matrix needs the rows"):
        Accumulator(NAME, gram=True).add(0, observe(inputs[0], 4))


def test_what_came_in_is_not_written_to() -> None:
    """Shares are read-only memory of the object store."""
    inputs = blocks([8, 9])
    shares = [observe(x, 4, keep_rows=True) for x in inputs]
    before = [(s.amax.clone(), s.abs_sum.clone(), s.sample.clone()) for s in shares]
    accumulator = Accumulator(NAME, gram=True)
    for block, share in enumerate(shares):
        accumulator.add(block, share)
    first = accumulator.finish()
    assert first is not None
    for share, copies in zip(shares, before, strict=True):
        for now, then in zip((share.amax, share.abs_sum, share.sample), copies, strict=True):
            assert torch.equal(now, then)


def test_blocks_must_come_in_their_order() -> None:
    share = observe(blocks([8])[0], 4)
    accumulator = Accumulator(NAME, gram=False)
    accumulator.add(0, share)
    accumulator.add(4, share)  # a gap is an expert without tokens in some block
    for block in (4, 3):
        with pytest.raises(AssertionError, match=f"block {block} after 4"):
            accumulator.add(block, share)


def test_without_tokens_there_are_no_statistics() -> None:
    assert Accumulator(NAME, gram=True).finish() is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_activations_that_are_no_numbers_are_refused_with_their_block(bad: float) -> None:
    good, broken = blocks([8, 8])
    broken[3, 7] = bad
    accumulator = Accumulator(NAME, gram=False)
    accumulator.add(3, observe(good, 4))
    with pytest.raises(CheckpointError, match=rf"{NAME}: .* not finite on calibration block 6"):
        accumulator.add(6, observe(broken, 4))


@pytest.mark.parametrize(("num_tokens", "num_rows"), [(100, 5), (7, 7), (3, 5), (512, 9), (10, 0)])
def test_positions_are_spread_evenly(num_tokens: int, num_rows: int) -> None:
    positions = spread(num_tokens, num_rows).tolist()
    assert len(positions) == min(num_tokens, num_rows)
    assert positions == sorted(set(positions))
    ends = [*positions[1:], num_tokens]
    gaps = [after - before for before, after in zip(positions, ends, strict=False)]
    if positions:
        assert positions[0] == 0
        assert positions[-1] < num_tokens
        assert max(gaps) - min(gaps) <= 1


def test_an_empty_block_has_no_positions() -> None:
    assert spread(0, 5).tolist() == []


def test_all_blocks_together_fill_the_sample() -> None:
    assert rows_per_block(SAMPLE_TOKENS, 1) == SAMPLE_TOKENS
    assert rows_per_block(SAMPLE_TOKENS, 3) == 86
    assert rows_per_block(SAMPLE_TOKENS, 10_000) == 1
    for num_blocks in (1, 3, 100, 255, 256, 257, 5000):
        assert rows_per_block(SAMPLE_TOKENS, num_blocks) * num_blocks >= SAMPLE_TOKENS


def test_linears_that_share_an_input_share_its_name() -> None:
    assert input_key("model.layers.3.mlp.experts.7.up_proj").endswith("experts.7.gate_proj")
    assert input_key("model.layers.3.self_attn.kv_a_proj_with_mqa").endswith("q_a_proj")
    for role in ("self_attn.q_b_proj", "self_attn.kv_b_proj", "mlp.down_proj", "self_attn.o_proj"):
        assert input_key(f"model.layers.0.{role}") == f"model.layers.0.{role}"
