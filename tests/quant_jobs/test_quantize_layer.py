"""The calibration layer is transformers' own, un-fused, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.synthetic import config_dict
from torch import Tensor
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Experts,
    DeepseekV3ForCausalLM,
)

from deepseek.checkpoint import CheckpointReader
from deepseek.config import ModelConfig
from deepseek.formats import dequantize_int8, quantize_tokens_int8
from quant_jobs.calibrate import linear_modules
from quant_jobs.layer import (
    Rotary,
    UnfusedExperts,
    build_layer,
    fake_quantize_inputs,
    run_block,
    to_hf_config,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unfused_experts_equal_transformers_eager_experts_to_the_bit(dtype: torch.dtype) -> None:
    config = ModelConfig.from_dict(config_dict(experts=8))
    hf = to_hf_config(config)
    hf._experts_implementation = "eager"
    torch.manual_seed(1)
    fused = DeepseekV3Experts(hf)
    with torch.no_grad():
        fused.gate_up_proj.normal_(std=0.05)
        fused.down_proj.normal_(std=0.05)
    fused, unfused = fused.to(dtype), UnfusedExperts(hf).to(dtype)
    for index, expert in enumerate(unfused):
        gate, up = fused.gate_up_proj[index].chunk(2)
        expert.gate_proj.weight.data, expert.up_proj.weight.data = gate, up
        expert.down_proj.weight.data = fused.down_proj[index]
    x_TD = torch.randn(40, config.hidden_size, dtype=dtype)
    expert_TK = torch.rand(40, 8).topk(2).indices
    expert_TK[expert_TK == 5] = 0  # expert 5 is never chosen; 0 sometimes twice
    weight_TK = torch.rand(40, 2, dtype=dtype)
    with torch.no_grad():
        wanted = fused(x_TD, expert_TK, weight_TK)
        assert torch.equal(unfused(x_TD, expert_TK, weight_TK), wanted)


@torch.no_grad()
def test_layers_in_a_row_give_the_logits_of_transformers(tiny_model: Path) -> None:
    reader = CheckpointReader(tiny_model)
    config = reader.config
    ids = torch.randint(0, config.vocab_size, (48,), generator=torch.Generator().manual_seed(2))
    weights = {name: tensor.dequantize() for name, tensor in reader.read_globals().items()}
    x_TD = weights["model.embed_tokens.weight"][ids]
    rotary = Rotary(config)
    for layer in range(config.num_hidden_layers):
        mine = {name: tensor.dequantize() for name, tensor in reader.read_layer(layer).items()}
        weights |= mine
        x_TD = run_block(build_layer(config, layer, mine), rotary, x_TD)

    hf = to_hf_config(config, attention="eager")
    hf._experts_implementation = "eager"
    model = DeepseekV3ForCausalLM(hf).eval()
    model.load_state_dict(fused_experts(weights, config), strict=True)
    wanted = model(input_ids=ids[None], use_cache=False).logits[0]
    logits = model.lm_head(model.model.norm(x_TD))
    assert (logits - wanted).abs().max() < 2e-4 * wanted.abs().max()
    assert (logits - wanted).norm() < 1e-5 * wanted.norm()


def fused_experts(weights: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The checkpoint's names as transformers 5 keeps them: experts in two 3-D parameters."""
    state = {name: tensor for name, tensor in weights.items() if ".mlp.experts." not in name}
    for layer in range(config.first_k_dense_replace, config.num_hidden_layers):
        experts = f"model.layers.{layer}.mlp.experts"

        def stack(role: str, experts: str = experts) -> Tensor:
            names = [f"{experts}.{e}.{role}.weight" for e in range(config.n_routed_experts)]
            return torch.stack([weights[name] for name in names])

        state[f"{experts}.gate_up_proj"] = torch.cat([stack("gate_proj"), stack("up_proj")], dim=1)
        state[f"{experts}.down_proj"] = stack("down_proj")
    return state


def test_every_linear_of_the_inventory_is_a_module(tiny_model: Path) -> None:
    reader = CheckpointReader(tiny_model)
    for layer in (0, 1):
        source = reader.read_layer(layer)
        weights = {name: tensor.dequantize() for name, tensor in source.items()}
        module = build_layer(reader.config, layer, weights)
        wanted = {t.spec.module for t in source.values() if t.spec.kind == "linear"}
        assert set(linear_modules(module, layer)) == wanted


def test_a_layer_with_a_tensor_too_few_does_not_load(tiny_model: Path) -> None:
    reader = CheckpointReader(tiny_model)
    weights = {name: tensor.dequantize() for name, tensor in reader.read_layer(0).items()}
    weights.pop("model.layers.0.self_attn.o_proj.weight")
    with pytest.raises(RuntimeError, match="o_proj"):
        build_layer(reader.config, 0, weights)


@torch.no_grad()
def test_fake_quantized_inputs_are_those_of_the_engines_w8a8() -> None:
    torch.manual_seed(3)
    linear = torch.nn.Linear(64, 32, bias=False)
    x = torch.randn(5, 64) * torch.logspace(-3, 3, 5)[:, None]
    fake_quantize_inputs(linear)
    codes, scale = quantize_tokens_int8(x)
    assert torch.equal(linear(x), dequantize_int8(codes, scale) @ linear.weight.T)
    assert not torch.equal(linear(x), x @ linear.weight.T)


def test_rotary_tables_are_transformers_yarn(tiny_model: Path) -> None:
    config = ModelConfig.from_directory(tiny_model)
    assert config.yarn is not None
    cos, sin = Rotary(config).table(7)
    assert cos.shape == sin.shape == (1, 7, config.qk_rope_head_dim)
    assert cos[0, 0].tolist() == [pytest.approx(float(cos[0, 0, 0]))] * config.qk_rope_head_dim
    assert torch.equal(sin[0, 0], torch.zeros(config.qk_rope_head_dim))
