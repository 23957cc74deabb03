"""What no data can bring to light is not counted: zeros of the weights."""

from __future__ import annotations

import pytest
import torch
from support.synthetic import config_dict, random_tensors
from torch import Tensor

from deepseek.config import ModelConfig
from deepseek.inventory import layer_tensors
from deepseek.recipe import Scheme
from deepseek.source.checkpoint import SourceTensor, scale_name
from quant_jobs.algorithms.exact import computes_zero, is_zero, silent_channels
from quant_jobs.algorithms.folding import FoldingGroup, ScaleMethod, folding_groups
from quant_jobs.algorithms.ledger import Ledger
from quant_jobs.algorithms.scaling import choose_scale, weight_statistics

LAYER = "model.layers.1."
EXPERT = f"{LAYER}mlp.experts.3"


def a_source(*zeroed: str, fp8: bool = True) -> dict[str, SourceTensor]:
    """The MoE layer of a random model with these tensors zero (FP8: half of them -0)."""
    config = ModelConfig.from_dict(config_dict(fp8=fp8))
    stored = random_tensors(config)
    for name in zeroed:
        stored[name].zero_()
        if stored[name].dtype == torch.float8_e4m3fn:
            stored[name].view(torch.uint8)[::2] = 0x80
    return {
        spec.name: SourceTensor(spec, stored[spec.name], stored.get(scale_name(spec.name)))
        for spec in layer_tensors(config, 1)
    }


def zero(source: dict[str, SourceTensor], name: str, *index: int) -> None:
    """Set part of a tensor to zero: float8 cannot be written to element by element."""
    source[name].data[index] = 0.0


def group_of(divided: str) -> FoldingGroup:
    config = ModelConfig.from_dict(config_dict())
    return next(group for group in folding_groups(config, 1) if group.divided == divided)


@pytest.mark.parametrize("fp8", [True, False])
def test_one_value_makes_a_weight_not_zero_wherever_it_is(fp8: bool) -> None:
    name = f"{EXPERT}.down_proj.weight"
    source = a_source(name, fp8=fp8)
    assert is_zero(source[name])
    for row in (0, 15, 16, 255):
        source[name].data[row, -1] = 1.0
        assert not is_zero(source[name])
        source[name].data[row, -1] = -0.0
        assert is_zero(source[name])


@pytest.mark.parametrize("role", ["gate_proj", "up_proj", "down_proj"])
def test_an_mlp_with_an_all_zero_weight_computes_zero(role: str) -> None:
    source = a_source(f"{EXPERT}.{role}.weight")
    for other in ("gate_proj", "up_proj", "down_proj"):
        assert computes_zero(f"{EXPERT}.{other}", source)
        assert not computes_zero(f"{LAYER}mlp.experts.2.{other}", source)


def test_a_linear_of_the_attention_computes_zero_only_with_its_own_weight() -> None:
    source = a_source(f"{LAYER}self_attn.q_a_proj.weight")
    assert computes_zero(f"{LAYER}self_attn.q_a_proj", source)
    assert not computes_zero(f"{LAYER}self_attn.kv_a_proj_with_mqa", source)


@pytest.mark.parametrize(
    ("divided", "zeros"),
    [
        (f"{LAYER}input_layernorm.weight", [f"{LAYER}input_layernorm.weight"]),
        (f"{LAYER}post_attention_layernorm.weight", [f"{LAYER}post_attention_layernorm.weight"]),
        (f"{LAYER}self_attn.q_a_layernorm.weight", [f"{LAYER}self_attn.q_a_proj.weight"]),
        (
            f"{LAYER}self_attn.kv_a_layernorm.weight",
            [
                f"{LAYER}self_attn.kv_a_layernorm.weight",
                f"{LAYER}self_attn.kv_a_proj_with_mqa.weight",
            ],
        ),
        (f"{EXPERT}.up_proj.weight", [f"{EXPERT}.up_proj.weight", f"{EXPERT}.gate_proj.weight"]),
    ],
)
def test_channels_are_silent_whose_maker_is_zero(divided: str, zeros: list[str]) -> None:
    source, group = a_source(), group_of(divided)
    assert not silent_channels(group, source).any()
    for channel, name in enumerate(zeros, start=7):
        zero(source, name, channel)
    silent = silent_channels(group, source)
    assert silent.dtype == torch.bool
    assert silent.shape == (source[divided].spec.shape[0],)
    assert silent.nonzero().flatten().tolist() == [7 + index for index in range(len(zeros))]


def dead_channels(method: ScaleMethod, x: Tensor, weight: Tensor, silent: Tensor) -> int:
    """How many dead channels `choose_scale` counts for one linear."""
    ledger = Ledger()
    scheme = Scheme(weights="int8", activations="int8")
    choose_scale(
        group_of(f"{EXPERT}.up_proj.weight"),
        method,
        [weight_statistics(weight, method, scheme)],
        amax=x.abs().amax(dim=0),
        mean_abs=x.abs().mean(dim=0),
        divided=None,
        silent=lambda: silent,
        losses_of=lambda candidates: [torch.zeros(len(candidates), dtype=torch.float64)],
        layer=1,
        ledger=ledger,
    )
    return sum(entry.count for entry in ledger.entries() if entry.kind == "dead_channel")


@pytest.mark.parametrize("method", [ScaleMethod("smoothquant", 0.5), ScaleMethod("awq")], ids=str)
def test_a_channel_is_dead_if_only_the_calibration_data_left_it_at_zero(
    method: ScaleMethod,
) -> None:
    generator = torch.Generator().manual_seed(2)
    x, weight = (torch.randn(16, 8, generator=generator) for _ in range(2))
    silent = torch.zeros(8, dtype=torch.bool)
    assert dead_channels(method, x, weight, silent) == 0
    x[:, [1, 4, 6]] = 0.0
    assert dead_channels(method, x, weight, silent) == 3
    silent[4] = True  # no data brings it to life
    assert dead_channels(method, x, weight, silent) == 2
    weight[:, 6] = 0.0  # nothing reads it
    assert dead_channels(method, x, weight, silent) == 1
