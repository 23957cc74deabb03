"""SmoothQuant folded into norms and up_proj rows: the same function, gentler activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek.checkpoint import CheckpointReader
from deepseek.config import ModelConfig
from deepseek.errors import RecipeError
from deepseek.inventory import layer_tensors
from deepseek.recipe import Scheme, load_recipe, parse_recipe
from quant_jobs.calibrate import Collector, Statistics, merge
from quant_jobs.layer import Rotary, build_layer, run_block
from quant_jobs.ledger import Ledger
from quant_jobs.smoothquant import (
    Smoothing,
    smoothing_scale,
    smoothing_sets,
    solve_smoothing,
    wanted_sets,
)


def source_weights(reader: CheckpointReader, layer: int) -> dict[str, Tensor]:
    return {name: tensor.dequantize() for name, tensor in reader.read_layer(layer).items()}


def outlier_block(config: ModelConfig) -> Tensor:
    """f32 [T, D]: activations with a few channels 50 times the others, as LLMs have them."""
    x_TD = torch.randn(96, config.hidden_size, generator=torch.Generator().manual_seed(4))
    x_TD[:, ::37] *= 50
    return x_TD


def measure(
    config: ModelConfig, layer: int, weights: dict[str, Tensor], x_TD: Tensor
) -> tuple[Tensor, Statistics]:
    """The layer's output on one block, and what its linears saw."""
    module = build_layer(config, layer, weights)
    collector = Collector(module, layer, 8)
    collector.start_block(0)
    y_TD = run_block(module, Rotary(config), x_TD)
    return y_TD, merge([collector.finish()])


def smooth(
    config: ModelConfig, layer: int, weights: dict[str, Tensor], statistics: Statistics
) -> tuple[Smoothing, Ledger]:
    schemes = load_recipe("int8-smoothquant").resolve(config)
    ledger = Ledger()
    smoothing = solve_smoothing(
        wanted_sets(config, schemes, layer),
        lambda module: weights[f"{module}.weight"],
        statistics,
        layer,
        ledger,
    )
    return smoothing, ledger


@pytest.mark.parametrize("layer", [0, 1])
def test_a_smoothed_layer_computes_the_same_function(tiny_model: Path, layer: int) -> None:
    reader = CheckpointReader(tiny_model)
    weights, x_TD = source_weights(reader, layer), outlier_block(reader.config)
    wanted, statistics = measure(reader.config, layer, weights, x_TD)
    smoothing, _ = smooth(reader.config, layer, weights, statistics)
    folded = {name: smoothing.fold(name, tensor) for name, tensor in weights.items()}
    changed = {name for name in weights if not torch.equal(folded[name], weights[name])}
    prefix = f"model.layers.{layer}"
    assert f"{prefix}.self_attn.kv_b_proj.weight" in changed
    assert f"{prefix}.self_attn.o_proj.weight" not in changed
    found, _ = measure(reader.config, layer, folded, x_TD)
    assert (found - wanted).norm() < 1e-5 * wanted.norm()


def test_routing_is_the_same_to_the_bit_even_with_bf16_norms_and_router(tiny_model: Path) -> None:
    reader = CheckpointReader(tiny_model)
    weights, x_TD = source_weights(reader, 1), outlier_block(reader.config)
    _, statistics = measure(reader.config, 1, weights, x_TD)
    smoothing, _ = smooth(reader.config, 1, weights, statistics)
    stored = {name: tensor.data for name, tensor in reader.read_layer(1).items()}
    for name in ("mlp.gate.weight", "post_attention_layernorm.weight"):
        before = stored[f"model.layers.1.{name}"]
        assert before.dtype == torch.bfloat16
        after = smoothing.fold(f"model.layers.1.{name}", before)
        assert after.dtype == torch.bfloat16
        assert not torch.equal(after, before)
    norm, gate = (f"model.layers.1.{n}.weight" for n in ("post_attention_layernorm", "mlp.gate"))
    folded_norm, folded_gate = (smoothing.fold(n, stored[n]).float() for n in (norm, gate))
    terms = x_TD[:4, None] * stored[norm].float() * stored[gate].float()
    assert torch.equal(x_TD[:4, None] * folded_norm * folded_gate, terms)


def test_smoothing_makes_int8_activations_and_the_layer_more_exact(tiny_model: Path) -> None:
    reader = CheckpointReader(tiny_model)
    weights, x_TD = source_weights(reader, 0), outlier_block(reader.config)
    # The norms hide outliers of the residual stream; put them where real models have them.
    weights["model.layers.0.input_layernorm.weight"][::37] *= 50
    _, statistics = measure(reader.config, 0, weights, x_TD)
    smoothing, _ = smooth(reader.config, 0, weights, statistics)
    seen = statistics["model.layers.0.self_attn.q_a_proj"]
    name = "model.layers.0.self_attn.q_a_proj.weight"
    smoothed = seen.amax / smoothing.columns[name]
    assert smoothed.max() / smoothed.median() < 0.3 * seen.amax.max() / seen.amax.median()


def test_the_scale_is_the_papers_formula_at_the_nearest_power_of_two() -> None:
    amax_x = torch.tensor([8.0, 0.5, 3.0, 100.0])
    amax_w = torch.tensor([0.5, 0.5, 0.3, 0.01])
    ledger = Ledger()
    scale = smoothing_scale(amax_x, amax_w, 0.5, "m", 0, ledger)
    paper = amax_x**0.5 / amax_w**0.5
    assert torch.equal(scale, torch.tensor([4.0, 1.0, 4.0, 128.0]))
    assert ((scale / paper).log2().abs() <= 0.5).all()
    assert torch.equal(
        smoothing_scale(amax_x, amax_w, 0.75, "m", 0, ledger),
        (amax_x**0.75 / amax_w**0.25).log2().round().exp2(),
    )
    assert ledger.entries() == ()


def test_dead_channels_and_clipped_scales_are_counted() -> None:
    ledger = Ledger()
    amax_x = torch.tensor([0.0, 1e20, 1e-20, 1.0, 0.0])
    amax_w = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0])
    scale = smoothing_scale(amax_x, amax_w, 0.5, "m", 3, ledger)
    assert scale.tolist() == [1.0, 2.0**10, 2.0**-10, 1.0, 1.0]
    counted = {(e.kind, e.layer, e.module, e.count) for e in ledger.entries()}
    assert counted == {("dead_channel", 3, "m", 2), ("clipped_smoothing", 3, "m", 2)}


def test_an_unseen_experts_down_proj_stays_unsmoothed_and_is_counted(tiny_model: Path) -> None:
    reader = CheckpointReader(tiny_model)
    weights = source_weights(reader, 1)
    weights["model.layers.1.mlp.gate.e_score_correction_bias"][6] = -9.0
    _, statistics = measure(reader.config, 1, weights, outlier_block(reader.config))
    assert "model.layers.1.mlp.experts.6.gate_proj" not in statistics
    smoothing, ledger = smooth(reader.config, 1, weights, statistics)
    expert = "model.layers.1.mlp.experts.6"
    assert f"{expert}.down_proj.weight" not in smoothing.columns
    assert f"{expert}.up_proj.weight" not in smoothing.rows
    assert f"{expert}.up_proj.weight" in smoothing.columns  # the vector that all experts share
    unseen = [(e.module, e.count) for e in ledger.entries() if e.kind == "unseen_expert"]
    assert (f"{expert}.down_proj", 1) in unseen


@pytest.mark.parametrize("layer", [0, 1])
def test_the_sets_cover_every_linear_but_o_proj_once(tiny_model: Path, layer: int) -> None:
    config = ModelConfig.from_directory(tiny_model)
    sets = smoothing_sets(config, layer)
    consumers = [name for one in sets for name in one.consumers]
    specs = list(layer_tensors(config, layer))
    linears = {spec.module for spec in specs if spec.kind == "linear"}
    assert sorted(consumers) == sorted(linears - {f"model.layers.{layer}.self_attn.o_proj"})
    assert {one.divided for one in sets} <= {spec.name for spec in specs}
    assert len({one.divided for one in sets}) == len(sets)


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        (
            [{"match": "*q_a_proj", "weights": "int8"}],
            ["q_a_proj", "kv_a_proj_with_mqa", "no smoothing", "smoothing 0.5"],
        ),
        (
            [{"match": "*.3.mlp.experts.9.up_proj", "weights": "int8", "activations": "int8"}],
            ["layers.3.mlp.experts.0.gate_proj", "layers.3.mlp.experts.9.up_proj"],
        ),
        (
            [
                {
                    "match": "*shared_experts.gate_proj",
                    "weights": "int8",
                    "activations": "int8",
                    "algorithm": "smoothquant",
                    "smoothing": 0.7,
                }
            ],
            ["shared_experts.gate_proj", "smoothing 0.7"],
        ),
        (
            [
                {"match": "*", "weights": "source"},
                {
                    "match": "*.0.mlp.down_proj",
                    "weights": "int8",
                    "activations": "int8",
                    "algorithm": "smoothquant",
                },
            ],
            ["model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj", "FP8"],
        ),
    ],
)
def test_a_recipe_that_smooths_part_of_a_set_is_refused(
    tiny_model: Path, rules: list[dict[str, Any]], named: list[str]
) -> None:
    config = ModelConfig.from_directory(tiny_model)
    content = load_recipe("int8-smoothquant").model_dump(mode="json")
    content["rules"] = [*content["rules"], *rules]
    schemes = parse_recipe(content, where="test").resolve(config)
    with pytest.raises(RecipeError) as refused:
        [wanted_sets(config, schemes, layer) for layer in range(config.num_hidden_layers)]
    for words in named:
        assert words in str(refused.value)


def test_nothing_is_wanted_of_a_recipe_without_smoothing(tiny_model: Path) -> None:
    config = ModelConfig.from_directory(tiny_model)
    schemes: dict[str, Scheme] = load_recipe("int8").resolve(config)
    assert wanted_sets(config, schemes, 1) == []
