"""One decoder layer to calibrate on: transformers' DeepSeek-V3 layer, its experts un-fused.

transformers 5 keeps the routed experts of a layer in two 3-D parameters, which no quantization
algorithm of modelopt 0.47 reaches (97.5 % of the parameters, skipped in silence). Here every expert
is three `nn.Linear` again, so that hooks and solvers see them all, and the names under the layer
are the checkpoint's own. The arithmetic is transformers' to the bit (a test compares with its eager
experts).

Everything is float32 on one thread: the forward pass of a block must not depend on the machine that
runs it beyond its instruction set. Only workers import this module: transformers' modeling code
takes seconds to load, and the driver does not need it.

T tokens · D hidden size · K experts per token
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3MLP,
    DeepseekV3RotaryEmbedding,
)

from deepseek.config import ModelConfig
from deepseek.formats import dequantize_int8, quantize_tokens_int8


def to_hf_config(config: ModelConfig, attention: str = "sdpa") -> Any:
    """transformers' configuration of the same model; `attention` is its attention implementation.

    The one place where our names become transformers'.
    """
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.yarn is not None:
        rope = {
            "rope_type": "yarn",
            "rope_theta": config.rope_theta,
            "factor": config.yarn.factor,
            "original_max_position_embeddings": config.yarn.original_max_position_embeddings,
            "beta_fast": config.yarn.beta_fast,
            "beta_slow": config.yarn.beta_slow,
            "mscale": config.yarn.mscale,
            "mscale_all_dim": config.yarn.mscale_all_dim,
        }
    same = (
        *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size"),
        *("num_hidden_layers", "num_attention_heads", "n_shared_experts", "n_routed_experts"),
        *("num_experts_per_tok", "n_group", "topk_group", "norm_topk_prob"),
        *("routed_scaling_factor", "first_k_dense_replace", "q_lora_rank", "kv_lora_rank"),
        *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "max_position_embeddings"),
        *("rms_norm_eps", "bos_token_id", "eos_token_id"),
    )
    hf = DeepseekV3Config(
        **{name: getattr(config, name) for name in same},
        num_key_value_heads=config.num_attention_heads,
        num_mtp_layers=config.num_nextn_predict_layers,
        rope_parameters=rope,
        rope_interleave=True,
        attention_bias=False,
        hidden_act="silu",
        tie_word_embeddings=False,
    )
    hf._attn_implementation = attention
    return hf


class UnfusedExperts(nn.ModuleList):
    """A layer's routed experts as separate MLPs, called as transformers calls its fused ones."""

    def __init__(self, hf: Any) -> None:
        super().__init__(
            DeepseekV3MLP(hf, intermediate_size=hf.moe_intermediate_size)
            for _ in range(hf.n_routed_experts)
        )

    def forward(self, x_TD: Tensor, expert_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Each token through its K experts, weighted and summed in the order of the experts."""
        y_TD = torch.zeros_like(x_TD)
        for index, expert in enumerate(self):
            token, choice = torch.where((expert_TK == index).T)[::-1]
            if not len(token):
                continue
            part = expert(x_TD[token]) * weight_TK[token, choice, None]
            y_TD.index_add_(0, token, part.to(y_TD.dtype))
        return y_TD


def build_layer(config: ModelConfig, layer: int, weights: Mapping[str, Tensor]) -> nn.Module:
    """The decoder layer `layer` with `weights`, by the checkpoint's full names, as its parameters.

    The tensors become the parameters themselves (no copy). A name too many or too few is our bug.
    """
    hf = to_hf_config(config)
    with torch.device("meta"):
        module = DeepseekV3DecoderLayer(hf, layer)
        if config.is_moe(layer):
            module.mlp.experts = UnfusedExperts(hf)
    prefix = f"model.layers.{layer}."
    local = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    module.load_state_dict(local, strict=True, assign=True)
    module.requires_grad_(False)
    return cast(nn.Module, module.eval())


class Rotary:
    """Cosines and sines of positions 0..T-1 by transformers' own rotary module, kept per T."""

    def __init__(self, config: ModelConfig) -> None:
        self._module = DeepseekV3RotaryEmbedding(to_hf_config(config))
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}

    def table(self, num_tokens: int) -> tuple[Tensor, Tensor]:
        if num_tokens not in self._tables:
            positions = torch.arange(num_tokens)[None]
            self._tables[num_tokens] = self._module(torch.zeros(1), positions)
        return self._tables[num_tokens]


@torch.no_grad()
def run_block(module: nn.Module, rotary: Rotary, x_TD: Tensor) -> Tensor:
    """One block of T tokens through the layer, causal, alone in its batch: float32 [T, D]."""
    y = module(
        x_TD[None],
        attention_mask=None,  # without a mask, transformers' SDPA path is causal
        position_embeddings=rotary.table(len(x_TD)),
    )
    return cast(Tensor, y[0])


def fake_quantize_inputs(linear: nn.Linear) -> None:
    """From now on the linear sees its input as INT8 with one dynamic scale per token, as the
    engine's W8A8 kernels do."""

    def quantize(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (dequantize_int8(*quantize_tokens_int8(args[0])),)

    linear.register_forward_pre_hook(quantize)
