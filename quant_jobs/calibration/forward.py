"""The forward pass of one decoder layer, in two halves that may run on different workers.

The `Trunk` is transformers' DeepSeek-V3 layer without its routed experts, with every linear
replaced by a `LazyLinear`, whose weight is dequantized when it is used: in memory are the stored
bytes of the layer and one float32 weight. Routed experts are functions of their three weights:
transformers 5 fuses them into 3-D parameters, which modelopt 0.47 silently skips (97.5 % of the
parameters). `combine` adds the halves. The arithmetic equals transformers' bit by bit (a test
compares with its eager experts). Nothing is measured or quantized here.

Everything is float32 on one thread: the result for a block depends on nothing of the machine but
its instruction set, and an expert runs on the rows of one block at a time. Called by `workers/` and
`measuring.py`; the driver does not import it, because transformers' modeling code takes seconds to
load.

T tokens · D hidden size · I intermediate size · k experts per token
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3RotaryEmbedding,
)

from deepseek.config import ModelConfig
from deepseek.formats import RoundInput


@dataclass(frozen=True, slots=True)
class Routed:
    """The MLP input of one calibration block: `z` f32 [T, D], after the norm; and the router's
    choice, `experts` int64 [T, k] and `weights` f32 [T, k], which are None in a dense layer."""

    z: Tensor
    experts: Tensor | None = None
    weights: Tensor | None = None


#: MLP inputs by calibration block, as one worker sends them.
RoutedBlocks = dict[int, Routed]


@dataclass(frozen=True, slots=True)
class ExpertOutputs:
    """Outputs of some routed experts for one calibration block: expert -> (`token` int64 [n],
    `rows` f32 [n, D] multiplied by the router's weights)."""

    by_expert: dict[int, tuple[Tensor, Tensor]]


#: Expert outputs by calibration block, as one worker sends them.
ExpertOutputsByBlock = dict[int, ExpertOutputs]


def to_hf_config(config: ModelConfig, attention: str = "sdpa") -> Any:
    """transformers' configuration of the same model; `attention` is its attention implementation.

    Only this function maps our field names to transformers'.
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


class Rotary:
    """Cosines and sines of positions 0..T-1 by transformers' rotary module, cached per T."""

    def __init__(self, config: ModelConfig) -> None:
        self._module = DeepseekV3RotaryEmbedding(to_hf_config(config))
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}

    def table(self, num_tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if num_tokens not in self._tables:
            positions = torch.arange(num_tokens)[None]
            cos, sin = self._module(torch.zeros(1), positions)
            self._tables[num_tokens] = cos.to(device), sin.to(device)
        return self._tables[num_tokens]


class LazyLinear(nn.Module):
    """y = round_input(x) W^T, where every call gets W f32 [N, K] from `load()` and frees it.

    `observer` is called with every input x, f32 [..., K], before rounding.
    """

    def __init__(self, load: Callable[[], Tensor], round_input: RoundInput | None = None) -> None:
        super().__init__()
        self._load, self._round_input = load, round_input
        self.observer: Callable[[Tensor], None] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.observer is not None:
            self.observer(x)
        return F.linear(x if self._round_input is None else self._round_input(x), self._load())


class Trunk:
    """Attention, norms, router and shared expert (or dense MLP) of one decoder layer.

    `high` has all tensors but the linears' (norms and router), by full name, in any float dtype.
    `load` returns the weight f32 [N, K] of a linear by full module name; `round_input` has the
    activation quantization of those linears that have one.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        high: Mapping[str, Tensor],
        load: Callable[[str], Tensor],
        round_input: Mapping[str, RoundInput] | None = None,
    ) -> None:
        self._prefix = f"model.layers.{layer}."
        self.is_moe = config.is_moe(layer)
        with torch.device("meta"):
            module = DeepseekV3DecoderLayer(to_hf_config(config), layer)
            if self.is_moe:
                module.mlp.experts = nn.Identity()
        self._linears: dict[str, LazyLinear] = {}
        for name, submodule in list(module.named_modules()):
            if isinstance(submodule, nn.Linear):
                full = self._prefix + name
                lazy = LazyLinear(partial(load, full), (round_input or {}).get(full))
                module.set_submodule(name, lazy)
                self._linears[full] = lazy
        local = {name.removeprefix(self._prefix): t.float() for name, t in high.items()}
        module.load_state_dict(local, strict=True, assign=True)
        module.requires_grad_(False)
        self._module: Any = module.eval()

    def watch(self, module: str, observer: Callable[[Tensor], None]) -> None:
        """Call `observer` with every input, f32 [1, T, K], of a linear by full module name."""
        self._linears[module].observer = observer

    @torch.no_grad()
    def attend(self, rotary: Rotary, x_TD: Tensor) -> tuple[Tensor, Routed]:
        """Causal attention over one block x f32 [T, D], alone in its batch. Returns the residual
        stream after attention, f32 [T, D], and the MLP input."""
        module = self._module
        attended, _ = module.self_attn(
            hidden_states=module.input_layernorm(x_TD[None]),
            attention_mask=None,  # without a mask, transformers' SDPA path is causal
            position_embeddings=rotary.table(len(x_TD), x_TD.device),
        )
        h_TD = (x_TD[None] + attended)[0]
        z_TD = module.post_attention_layernorm(h_TD)
        if not self.is_moe:
            return h_TD, Routed(z_TD)
        _, weights, experts = module.mlp.gate(z_TD)
        return h_TD, Routed(z_TD, experts, weights)

    @torch.no_grad()
    def combine(self, h_TD: Tensor, routed: Routed, outputs: Sequence[ExpertOutputs]) -> Tensor:
        """The layer's output f32 [T, D]. Adds routed experts by ascending number, then the shared
        expert, then the residual, in the order of transformers."""
        if not self.is_moe:
            return h_TD + self._module.mlp(routed.z)
        y_TD = torch.zeros_like(h_TD)
        by_expert: dict[int, tuple[Tensor, Tensor]] = {}
        for expert_outputs in outputs:
            by_expert |= expert_outputs.by_expert
        for expert in sorted(by_expert):
            token, rows = by_expert[expert]
            y_TD.index_add_(0, token.to(y_TD.device), rows.to(y_TD.device))
        return h_TD + (y_TD + self._module.mlp.shared_experts(routed.z))


def tokens_of(routed: Routed, expert: int) -> tuple[Tensor, Tensor]:
    """The tokens of a block routed to an expert, int64 [n], and which of their k choices it is,
    int64 [n]; ordered by choice, then by token, as transformers gathers them."""
    assert routed.experts is not None
    token, choice = torch.where((routed.experts == expert).T)[::-1]
    return token, choice


def hidden(x: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """The input of down_proj: silu(x gate^T) * (x up^T), f32 [T, I], of x f32 [T, D]."""
    return F.silu(F.linear(x, gate)) * F.linear(x, up)


def run_expert(
    routed: Routed,
    expert: int,
    weights: Mapping[str, Tensor],
    round_input: Mapping[str, RoundInput],
    observe: Callable[[str, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor] | None:
    """Run one routed expert on its tokens of one block. Returns (tokens int64 [n], rows f32 [n, D]
    multiplied by the router's weights), or None without tokens. `weights` f32 [N, K] and
    `round_input` are by role. `observe(role, x)` is called with every linear's input f32 [n, K],
    before it is rounded."""
    token, choice = tokens_of(routed, expert)
    if not len(token):
        return None
    assert routed.weights is not None

    def linear(role: str, x: Tensor) -> Tensor:
        if observe is not None:
            observe(role, x)
        return F.linear(round_input[role](x) if role in round_input else x, weights[role])

    x = routed.z[token]
    y = linear("down_proj", F.silu(linear("gate_proj", x)) * linear("up_proj", x))
    return token, y * routed.weights[token, choice, None]
