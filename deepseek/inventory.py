"""Every tensor that a DeepSeek-V3 checkpoint must hold, by name, from its config alone.

One list serves all: the checkpoint reader (what must be there, and nothing else), the recipe (which
linears exist to quantize), and the memory planner (what each of them weighs, and how tensor
parallelism splits it). No tensor values here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from deepseek.config import ModelConfig

#: What a tensor belongs to, in the planner's table and in the report.
Group = Literal[
    "routed_experts",
    "shared_experts",
    "attention",
    "dense_mlp",
    "embeddings",
    "router",
    "norms",
    "mtp",
]

#: How tensor parallelism places a tensor. `expert` is split evenly over the GPUs, by expert (EP)
#: or inside each expert (MoE-TP); the bytes per GPU are the same.
Split = Literal["column", "row", "expert", "replicated"]

#: `linear` may be quantized; `high` stays in BF16 (router weight, embeddings, head, eh_proj,
#: norms); `float32` is the router's correction bias, FP32 in the release.
Kind = Literal["linear", "high", "float32"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the source checkpoint.

    `shape` is [out, in] for linears. `layer` is None outside the decoder layers. `module` is the
    name without `.weight`. `expert` is set for routed experts only.
    """

    name: str
    shape: tuple[int, ...]
    group: Group
    kind: Kind
    split: Split
    layer: int | None
    expert: int | None = None

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def role(self) -> str:
        """Last part of the module's name: `q_a_proj`, `gate_proj`, ..."""
        return self.module.rpartition(".")[2]

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


def tensors(config: ModelConfig) -> Iterator[TensorSpec]:
    """All tensors of the model in checkpoint order: embeddings, layers, MTP, final norm, head."""
    vocab, hidden = config.vocab_size, config.hidden_size
    yield TensorSpec(
        "model.embed_tokens.weight", (vocab, hidden), "embeddings", "high", "column", None
    )
    for layer in range(config.num_layers_with_mtp):
        yield from layer_tensors(config, layer)
    yield TensorSpec("model.norm.weight", (hidden,), "norms", "high", "replicated", None)
    yield TensorSpec("lm_head.weight", (vocab, hidden), "embeddings", "high", "column", None)


def layer_tensors(config: ModelConfig, layer: int) -> Iterator[TensorSpec]:
    """The tensors of one decoder layer. Those of an MTP layer all carry the group `mtp`."""
    is_mtp = layer >= config.num_hidden_layers
    prefix = f"model.layers.{layer}"
    hidden = config.hidden_size

    def spec(
        name: str,
        shape: tuple[int, ...],
        group: Group,
        kind: Kind = "linear",
        split: Split = "replicated",
        expert: int | None = None,
    ) -> TensorSpec:
        return TensorSpec(
            f"{prefix}.{name}", shape, "mtp" if is_mtp else group, kind, split, layer, expert
        )

    def mlp(name: str, width: int, group: Group, expert: int | None = None) -> Iterator[TensorSpec]:
        column: Split = "column" if expert is None else "expert"
        row: Split = "row" if expert is None else "expert"
        yield spec(f"{name}.gate_proj.weight", (width, hidden), group, "linear", column, expert)
        yield spec(f"{name}.up_proj.weight", (width, hidden), group, "linear", column, expert)
        yield spec(f"{name}.down_proj.weight", (hidden, width), group, "linear", row, expert)

    if is_mtp:
        vocab = config.vocab_size
        yield spec("embed_tokens.weight", (vocab, hidden), "mtp", "high", "column")
        yield spec("enorm.weight", (hidden,), "mtp", "high")
        yield spec("hnorm.weight", (hidden,), "mtp", "high")
        yield spec("eh_proj.weight", (hidden, 2 * hidden), "mtp", "high")
        yield spec("shared_head.norm.weight", (hidden,), "mtp", "high")
        yield spec("shared_head.head.weight", (vocab, hidden), "mtp", "high", "column")

    heads, q_rank, kv_rank = config.num_attention_heads, config.q_lora_rank, config.kv_lora_rank
    yield spec("input_layernorm.weight", (hidden,), "norms", "high")
    yield spec("self_attn.q_a_proj.weight", (q_rank, hidden), "attention")
    yield spec("self_attn.q_a_layernorm.weight", (q_rank,), "norms", "high")
    yield spec(
        "self_attn.q_b_proj.weight",
        (heads * config.qk_head_dim, q_rank),
        "attention",
        split="column",
    )
    yield spec("self_attn.kv_a_proj_with_mqa.weight", (config.latent_dim, hidden), "attention")
    yield spec("self_attn.kv_a_layernorm.weight", (kv_rank,), "norms", "high")
    yield spec(
        "self_attn.kv_b_proj.weight",
        (heads * (config.qk_nope_head_dim + config.v_head_dim), kv_rank),
        "attention",
        split="column",
    )
    yield spec(
        "self_attn.o_proj.weight", (hidden, heads * config.v_head_dim), "attention", split="row"
    )
    yield spec("post_attention_layernorm.weight", (hidden,), "norms", "high")

    if not config.is_moe(layer):
        yield from mlp("mlp", config.intermediate_size, "dense_mlp")
        return
    yield spec("mlp.gate.weight", (config.n_routed_experts, hidden), "router", "high")
    yield spec("mlp.gate.e_score_correction_bias", (config.n_routed_experts,), "router", "float32")
    for expert in range(config.n_routed_experts):
        yield from mlp(
            f"mlp.experts.{expert}", config.moe_intermediate_size, "routed_experts", expert
        )
    yield from mlp(
        "mlp.shared_experts",
        config.moe_intermediate_size * config.n_shared_experts,
        "shared_experts",
    )


def global_tensors(config: ModelConfig) -> list[TensorSpec]:
    """The tensors outside the decoder layers: embeddings, final norm, head."""
    return [spec for spec in tensors(config) if spec.layer is None]


def linears(config: ModelConfig, layer: int) -> list[TensorSpec]:
    """The linears of one layer that a recipe may quantize."""
    return [spec for spec in layer_tensors(config, layer) if spec.kind == "linear"]


def count_parameters(config: ModelConfig, *, with_mtp: bool = False) -> int:
    """Parameters of the model; the released DeepSeek-V3 has 671.0 B without its MTP layer."""
    return sum(spec.numel for spec in tensors(config) if with_mtp or spec.group != "mtp")
