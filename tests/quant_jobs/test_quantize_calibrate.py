"""Statistics: the same whoever held which block."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from deepseek.checkpoint import CheckpointReader
from deepseek.errors import CheckpointError
from deepseek.inventory import layer_tensors
from quant_jobs.calibrate import (
    SAMPLE_TOKENS,
    Collector,
    Share,
    Statistics,
    coverage,
    input_of,
    merge,
    observe,
    rows_per_block,
)
from quant_jobs.layer import Rotary, build_layer, run_block

NUM_BLOCKS = 5


@pytest.fixture(scope="module")
def reader(tiny_model: Path) -> CheckpointReader:
    return CheckpointReader(tiny_model)


def blocks_of(reader: CheckpointReader) -> list[Tensor]:
    generator = torch.Generator().manual_seed(9)
    return [torch.randn(32, reader.config.hidden_size, generator=generator) for _ in range(5)]


def collect(reader: CheckpointReader, held: list[int], layer: int = 1) -> Share:
    """What a worker that holds these blocks sees."""
    source = reader.read_layer(layer)
    weights = {name: tensor.dequantize() for name, tensor in source.items()}
    module, rotary = build_layer(reader.config, layer, weights), Rotary(reader.config)
    collector = Collector(module, layer, rows_per_block(NUM_BLOCKS))
    for block in held:
        collector.start_block(block)
        run_block(module, rotary, blocks_of(reader)[block])
    return collector.finish()


def assert_equal(one: Statistics, other: Statistics) -> None:
    assert list(one) == list(other)
    for name, seen in one.items():
        assert torch.equal(seen.amax, other[name].amax), name
        assert torch.equal(seen.sample, other[name].sample), name
        assert seen.tokens == other[name].tokens, name


@pytest.mark.parametrize("split", [[[0, 2, 4], [1, 3]], [[4], [], [3, 1, 0], [2]]], ids=str)
def test_merging_depends_neither_on_the_split_nor_on_the_order(
    reader: CheckpointReader, split: list[list[int]]
) -> None:
    whole = merge([collect(reader, [0, 1, 2, 3, 4])])
    assert_equal(merge([collect(reader, held) for held in split]), whole)
    assert_equal(merge([collect(reader, held) for held in reversed(split)]), whole)


def test_statistics_are_those_of_all_tokens(reader: CheckpointReader) -> None:
    statistics = merge([collect(reader, [0, 1, 2, 3, 4], layer=0)])
    prefix = "model.layers.0.self_attn"
    seen = statistics[input_of(f"{prefix}.kv_a_proj_with_mqa")]
    assert input_of(f"{prefix}.kv_a_proj_with_mqa") == f"{prefix}.q_a_proj"
    x_TD = torch.cat(blocks_of(reader))
    norm = reader.read_layer(0)["model.layers.0.input_layernorm.weight"].dequantize()
    x_TD = x_TD * torch.rsqrt(x_TD.pow(2).mean(-1, keepdim=True) + 1e-6) * norm
    assert torch.allclose(seen.amax, x_TD.abs().amax(dim=0), rtol=1e-6)
    assert seen.tokens == len(x_TD)
    assert seen.sample.shape == (5 * 32, reader.config.hidden_size)  # fewer than SAMPLE_TOKENS


def test_coverage_counts_every_choice_of_the_router(reader: CheckpointReader) -> None:
    statistics = merge([collect(reader, [0, 1])])
    specs = list(layer_tensors(reader.config, 1))
    counts = coverage(statistics, specs)
    assert sum(counts) == 2 * 32 * reader.config.num_experts_per_tok
    del statistics["model.layers.1.mlp.experts.7.gate_proj"]
    assert coverage(statistics, specs)[7] == 0
    assert coverage(statistics, layer_tensors(reader.config, 0)) == ()


def test_a_sample_is_spread_over_the_block() -> None:
    x_TK = torch.arange(100.0)[:, None].expand(100, 4)
    seen = observe(x_TK, 5)
    assert seen.sample[:, 0].tolist() == [0, 20, 40, 60, 80]
    assert len(observe(x_TK[:3], 5).sample) == 3
    assert rows_per_block(1) == SAMPLE_TOKENS
    assert rows_per_block(10_000) == 1


def test_activations_that_are_no_numbers_are_refused_with_their_block(
    reader: CheckpointReader,
) -> None:
    linear = torch.nn.ModuleDict({"q_b_proj": torch.nn.Linear(4, 4)})
    collector = Collector(linear, 7, 2)
    for block, value in ((3, 1.0), (6, float("inf"))):
        collector.start_block(block)
        linear["q_b_proj"](torch.full((2, 4), value))
    with pytest.raises(CheckpointError, match=r"layers.7.q_b_proj: .* calibration block 6"):
        collector.finish()
