"""SmoothQuant's vectors: the paper's formula in powers of two, and gentler activations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from deepseek.formats import compress, decompress, dequantize_int8, quantize_tokens_int8
from deepseek.recipe import Scheme, load_recipe
from deepseek.source.checkpoint import CheckpointReader
from quant_jobs.algorithms.folding import Smoothing, folding_groups, scaled_groups
from quant_jobs.algorithms.ledger import Ledger
from quant_jobs.algorithms.smoothquant import smoothing_scale

W8A8 = Scheme(weights="int8", activations="int8")


def outlier_inputs(num_channels: int) -> Tensor:
    """f32 [T, K]: activations with a few channels 50 times the others, as LLMs have them."""
    x_TK = torch.randn(96, num_channels, generator=torch.Generator().manual_seed(4))
    x_TK[:, ::37] *= 50
    return x_TK


def smooth(tiny_model: Path, layer: int) -> tuple[Smoothing, dict[str, Tensor], dict[str, Tensor]]:
    """One layer of the example model, outliers in every input: its vectors, its weights, and the
    inputs by the module that measures them."""
    reader = CheckpointReader(tiny_model)
    weights = {name: tensor.dequantize() for name, tensor in reader.read_layer(layer).items()}
    schemes = load_recipe("int8-smoothquant").resolve(reader.config)
    smoothing, inputs = Smoothing(), {}
    for one, how in scaled_groups(reader.config, schemes, layer):
        assert how.strength is not None
        peaks = [weights[f"{name}.weight"].abs().amax(dim=0) for name in one.consumers]
        amax_w = torch.stack(peaks).amax(dim=0)
        x = inputs[one.measured] = outlier_inputs(len(amax_w))
        amax_x = x.abs().amax(dim=0)
        args = (how.strength, one.measured, layer, Ledger())
        smoothing.add(one, smoothing_scale(amax_x, amax_w, *args))
    return smoothing, weights, inputs


@pytest.mark.parametrize("layer", [0, 1])
def test_smoothing_is_in_powers_of_two_everywhere(tiny_model: Path, layer: int) -> None:
    """With a router or without: any of norm, router and rows then folds to the bit."""
    smoothing, weights, _ = smooth(tiny_model, layer)
    vectors = [*smoothing.columns.values(), *smoothing.rows.values()]
    assert len(smoothing.rows) == len(folding_groups(CheckpointReader(tiny_model).config, layer))
    for vector in vectors:
        assert (torch.frexp(vector).mantissa == 0.5).all()
        assert (vector > 1.0).any()
    for name, vector in smoothing.rows.items():
        folded = smoothing.fold(name, weights[name])
        divisor = vector if folded.ndim == 1 else vector[:, None]
        columns = smoothing.columns.get(name, torch.ones(()))
        assert torch.equal(folded * divisor / columns, weights[name])


def test_smoothing_makes_w8a8_more_exact_on_outliers(tiny_model: Path) -> None:
    smoothing, weights, inputs = smooth(tiny_model, 0)
    name = "model.layers.0.self_attn.q_a_proj"
    weight, x = weights[f"{name}.weight"], inputs[name]
    scale = smoothing.columns[f"{name}.weight"]

    def error(weight: Tensor, x: Tensor) -> float:
        stored = compress(weight, W8A8)
        restored = decompress(stored, W8A8, (weight.shape[0], weight.shape[1]))
        found = dequantize_int8(*quantize_tokens_int8(x)) @ restored.T
        return float((found - x @ weight.T).norm() / (x @ weight.T).norm())

    assert error(weight * scale, x / scale) < 0.7 * error(weight, x)


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


def test_dead_channels_stay_and_clipped_scales_are_counted() -> None:
    ledger = Ledger()
    amax_x = torch.tensor([0.0, 1e20, 1e-20, 1.0, 0.0])
    amax_w = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0])
    scale = smoothing_scale(amax_x, amax_w, 0.5, "m", 3, ledger)
    assert scale.tolist() == [1.0, 2.0**10, 2.0**-10, 1.0, 1.0]
    counted = {(e.kind, e.layer, e.module, e.count) for e in ledger.entries()}
    assert counted == {("clipped_smoothing", 3, "m", 2)}
