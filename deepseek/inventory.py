"""Every tensor that a checkpoint of the family must hold, by name, from its config alone.

One list serves all callers: the checkpoint reader (which tensors must be there, and no others), the
recipe (which linears exist), the memory planner (the size of each tensor, and how tensor
parallelism splits it), and the quantize job (which linears read the same input, and which tensor
makes its channels). The functions that read layer, group, expert and input from a module's name are
also here. No tensor values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from deepseek.config import ModelConfig

#: Group of a tensor in the planner's table and in the report.
Group = Literal[
    "routed_experts",
    "shared_experts",
    "attention",
    "indexer",
    "dense_mlp",
    "embeddings",
    "router",
    "norms",
    "mtp",
]

#: How tensor parallelism places a tensor. `expert` means split evenly over the GPUs, by expert (EP)
#: or inside each expert (MoE-TP); the bytes per GPU are the same.
Split = Literal["column", "row", "expert", "replicated"]

#: The linears of one attention module. `q_proj` takes the place of q_a and q_b where the model has
#: no query latent.
ATTENTION_ROLES = ("q_a_proj", "q_b_proj", "q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
#: The attention linear that reads the latent of MLA's cache; engines absorb it.
LATENT_READER = "kv_b_proj"
#: Module of the language model's head. It is stored as the source has it unless a recipe names it.
HEAD = "lm_head"
#: The norm whose output the head reads.
NORM = "model.norm.weight"
#: The linears of one MLP: dense, shared expert or routed expert.
MLP_ROLES = ("gate_proj", "up_proj", "down_proj")
#: The same by the input that they read: the MLP's own, then what gate and up make of it.
MLP_READERS = (("gate_proj", "up_proj"), ("down_proj",))

#: Linears of one parent module that engines fuse, in checkpoint order, by the name of the result.
#: They read the same input.
FUSED = {
    "qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "gate_up_proj": MLP_READERS[0],
}
#: Role -> the role that stands for all readers of the same input, fused or not. `q_proj` takes the
#: place of q_a_proj, so both read what kv_a_proj_with_mqa reads.
_SAME_INPUT = {role: roles[0] for roles in FUSED.values() for role in roles} | {
    "q_proj": "q_a_proj"
}

#: `linear` may be quantized; `high` stays in BF16 (router weight, embeddings, eh_proj, norms, and
#: the head unless a recipe names it); `float32` is FP32 in the release: the router's correction
#: bias, the indexer's norm.
Kind = Literal["linear", "high", "float32"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the source checkpoint.

    `shape` is [out, in] for linears. `layer` is None outside the decoder layers. `module` is the
    name without `.weight`. `expert` is set for routed experts only. `input_maker`, for linears and
    the router, is the full name of the tensor whose elements (of a norm) or rows (of a linear) make
    the channels of the input. It is None where no single tensor makes them (`o_proj` reads a mix of
    values).
    """

    name: str
    shape: tuple[int, ...]
    group: Group
    kind: Kind
    split: Split
    layer: int | None
    expert: int | None = None
    input_maker: str | None = None

    @property
    def module(self) -> str:
        return self.name.removesuffix(".weight")

    @property
    def parent(self) -> str:
        """Module that holds this one: `model.layers.3.self_attn`, `model.layers.3.mlp.experts.7`"""
        return self.module.rpartition(".")[0]

    @property
    def role(self) -> str:
        """Last part of the module's name: `q_a_proj`, `gate_proj`, ..."""
        return self.module.rpartition(".")[2]

    @property
    def is_indexer(self) -> bool:
        """Whether this belongs to DeepSeek-V3.2's indexer, in a main layer or in an MTP layer."""
        return ".self_attn.indexer." in self.name

    @property
    def is_carried(self) -> bool:
        """Whether an artifact holds this tensor as the source stores it, whatever the recipe says,
        because no evaluation runs it: MTP layers and the indexer."""
        return self.group in ("mtp", "indexer")

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, slots=True)
class LinearInput:
    """One input within a layer: `readers` are the linears that multiply it, in checkpoint order.

    All readers see the same rows. The MLPs of a MoE layer read different inputs (each expert sees
    its own tokens), although one norm makes the channels of all of them.
    """

    readers: tuple[TensorSpec, ...]

    @property
    def name(self) -> str:
        """Module name under which statistics of this input are kept: the first reader's."""
        return self.readers[0].module

    @property
    def modules(self) -> tuple[str, ...]:
        """Module names of the readers."""
        return tuple(spec.module for spec in self.readers)

    @property
    def parent(self) -> str:
        """Module that holds the readers: the attention module or one MLP."""
        return self.readers[0].parent

    @property
    def is_attention(self) -> bool:
        """Whether the readers belong to the attention module; otherwise they belong to an MLP."""
        return group_of(self.parent) == "attention"

    @property
    def expert(self) -> int | None:
        """Number of the routed expert that the readers belong to."""
        return self.readers[0].expert

    @property
    def maker(self) -> str | None:
        """Tensor that makes the channels (`TensorSpec.input_maker`)."""
        return self.readers[0].input_maker

    @property
    def width(self) -> int:
        """Number of channels, K."""
        return self.readers[0].shape[1]

    @property
    def fused(self) -> str | None:
        """Module name of the linear that engines fuse the readers into; None where they do not."""
        roles = tuple(spec.role for spec in self.readers)
        names = (name for name, fused in FUSED.items() if fused == roles)
        return next((f"{self.parent}.{name}" for name in names), None)


def tensors(config: ModelConfig) -> Iterator[TensorSpec]:
    """All tensors of the model in checkpoint order: embeddings, layers, MTP, final norm, head."""
    embedding, *rest = global_tensors(config)
    yield embedding
    for layer in range(config.num_layers_with_mtp):
        yield from layer_tensors(config, layer)
    yield from rest


def layer_tensors(config: ModelConfig, layer: int) -> Iterator[TensorSpec]:
    """The tensors of one decoder layer. All tensors of an MTP layer have the group `mtp`."""
    is_mtp = layer >= config.num_hidden_layers
    prefix = f"model.layers.{layer}"
    hidden = config.hidden_size
    mlp_norm = f"{prefix}.post_attention_layernorm.weight"

    def spec(
        name: str,
        shape: tuple[int, ...],
        group: Group,
        kind: Kind = "high",
        split: Split = "replicated",
        input_maker: str | None = None,
    ) -> TensorSpec:
        group = "mtp" if is_mtp else group
        return TensorSpec(
            f"{prefix}.{name}", shape, group, kind, split, layer, input_maker=input_maker
        )

    def linear(
        name: str,
        shape: tuple[int, int],
        split: Split,
        input_maker: str | None,
        expert: int | None = None,
    ) -> TensorSpec:
        module = f"{prefix}.{name}"
        group = "mtp" if is_mtp else group_of(module)
        return TensorSpec(
            f"{module}.weight", shape, group, "linear", split, layer, expert, input_maker
        )

    def mlp(name: str, width: int, expert: int | None = None) -> Iterator[TensorSpec]:
        column: Split = "column" if expert is None else "expert"
        row: Split = "row" if expert is None else "expert"
        # silu(gate) * up is linear in up, so the rows of up make the channels that down reads.
        up = f"{prefix}.{name}.up_proj.weight"
        yield linear(f"{name}.gate_proj", (width, hidden), column, mlp_norm, expert)
        yield linear(f"{name}.up_proj", (width, hidden), column, mlp_norm, expert)
        yield linear(f"{name}.down_proj", (hidden, width), row, up, expert)

    def indexer() -> Iterator[TensorSpec]:
        """DeepSeek-V3.2's choice of tokens, in every layer.

        In the release wq_b and wk are FP8 tiles with FP32 scales, k_norm (a LayerNorm, so it has a
        bias) is FP32, and weights_proj is BF16. Shapes and what is computed: the Indexer of
        DeepSeek's own inference code for V3.2-Exp; the one for V3.2 says that weights_proj is
        stored in BF16, vLLM's loader reads wk with its scale. None is split over GPUs (vLLM: "no
        tensor parallel, just replicated").
        """
        assert config.index_n_heads is not None
        assert config.index_head_dim is not None
        assert config.q_lora_rank is not None
        heads, width = config.index_n_heads, config.index_head_dim
        wq_b = heads * width, config.q_lora_rank
        yield linear("self_attn.indexer.wq_b", wq_b, "replicated", None)
        yield linear("self_attn.indexer.wk", (width, hidden), "replicated", None)
        yield spec("self_attn.indexer.k_norm.weight", (width,), "indexer", "float32")
        yield spec("self_attn.indexer.k_norm.bias", (width,), "indexer", "float32")
        yield spec("self_attn.indexer.weights_proj.weight", (heads, hidden), "indexer")

    if is_mtp:
        vocab = config.vocab_size
        yield spec("embed_tokens.weight", (vocab, hidden), "mtp", split="column")
        yield spec("enorm.weight", (hidden,), "mtp")
        yield spec("hnorm.weight", (hidden,), "mtp")
        yield spec("eh_proj.weight", (hidden, 2 * hidden), "mtp")
        yield spec("shared_head.norm.weight", (hidden,), "mtp")
        yield spec("shared_head.head.weight", (vocab, hidden), "mtp", split="column")

    heads, q_rank, kv_rank = config.num_attention_heads, config.q_lora_rank, config.kv_lora_rank
    attention_norm: str | None = f"{prefix}.input_layernorm.weight"
    kv_norm = f"{prefix}.self_attn.kv_a_layernorm.weight"
    q_norm: str | None = f"{prefix}.self_attn.q_a_layernorm.weight"
    if config.has_indexer:  # which reads both too, and cannot take the factor of a smoothing scale
        attention_norm = q_norm = None
    q_width = heads * config.qk_head_dim
    kv_b = heads * (config.qk_nope_head_dim + config.v_head_dim), kv_rank
    o = hidden, heads * config.v_head_dim
    kv_a = config.latent_dim, hidden
    yield spec("input_layernorm.weight", (hidden,), "norms")
    if q_rank is None:
        yield linear("self_attn.q_proj", (q_width, hidden), "column", attention_norm)
    else:
        yield linear("self_attn.q_a_proj", (q_rank, hidden), "replicated", attention_norm)
        yield spec("self_attn.q_a_layernorm.weight", (q_rank,), "norms")
        yield linear("self_attn.q_b_proj", (q_width, q_rank), "column", q_norm)
    yield linear("self_attn.kv_a_proj_with_mqa", kv_a, "replicated", attention_norm)
    yield spec("self_attn.kv_a_layernorm.weight", (kv_rank,), "norms")
    yield linear("self_attn.kv_b_proj", kv_b, "column", kv_norm)
    yield linear("self_attn.o_proj", o, "row", None)
    if config.has_indexer:
        yield from indexer()
    yield spec("post_attention_layernorm.weight", (hidden,), "norms")

    if not config.is_moe(layer):
        yield from mlp("mlp", config.intermediate_size)
        return
    num_experts = config.n_routed_experts
    yield spec("mlp.gate.weight", (num_experts, hidden), "router", input_maker=mlp_norm)
    yield spec("mlp.gate.e_score_correction_bias", (num_experts,), "router", "float32")
    for expert in range(num_experts):
        yield from mlp(f"mlp.experts.{expert}", config.moe_intermediate_size, expert)
    yield from mlp("mlp.shared_experts", config.moe_intermediate_size * config.n_shared_experts)


def global_tensors(config: ModelConfig) -> list[TensorSpec]:
    """The tensors outside the decoder layers: embeddings, final norm, head."""
    hidden = config.hidden_size
    embedding = "model.embed_tokens.weight", (config.vocab_size, hidden)
    return [
        TensorSpec(*embedding, "embeddings", "high", "column", None),
        TensorSpec(NORM, (hidden,), "norms", "high", "replicated", None),
        head_spec(config),
    ]


def head_spec(config: ModelConfig) -> TensorSpec:
    """The language model's head, [vocabulary, hidden]."""
    shape = config.vocab_size, config.hidden_size
    return TensorSpec(f"{HEAD}.weight", shape, "embeddings", "high", "column", None)


def linears(config: ModelConfig, layer: int) -> list[TensorSpec]:
    """The linears of one layer: those that a recipe may quantize, and those that stay as released
    (`TensorSpec.is_carried`)."""
    return [spec for spec in layer_tensors(config, layer) if spec.kind == "linear"]


def layer_inputs(config: ModelConfig, layer: int) -> list[LinearInput]:
    """The inputs of one layer's linears, in the order of their first readers: attention first, then
    one MLP after the other. Every linear reads one input. The indexer's linears are left out,
    because nothing here computes them."""
    readers: dict[str, list[TensorSpec]] = {}
    for spec in linears(config, layer):
        if spec.is_indexer:
            continue
        readers.setdefault(input_key(spec.module), []).append(spec)
    return [LinearInput(tuple(specs)) for specs in readers.values()]


def count_parameters(config: ModelConfig, *, with_mtp: bool = False) -> int:
    """Parameters of the model; the released DeepSeek-V3 has 671.0 B without its MTP layer."""
    return sum(spec.numel for spec in tensors(config) if with_mtp or spec.group != "mtp")


# --- reading a module's name ---


def layer_of(module: str) -> int:
    """Decoder layer of a module: `model.layers.3.mlp.experts.7` -> 3."""
    return int(module.split(".", 3)[2])


def is_within(module: str, layers: int) -> bool:
    """Whether a quantized module belongs to a model of so many decoder layers: it lies in one of
    them, or is the head."""
    return module == HEAD or layer_of(module) < layers


def group_of(module: str) -> Group:
    """Group of a linear (or of the module that holds it) of a main layer, from its name:
    `model.layers.3.mlp.experts.7.up_proj` -> `routed_experts`. The linears of an MTP layer have the
    same names; only the config tells that their group is `mtp` (`layer_tensors`)."""
    rest = module.split(".", 3)[3]
    if rest.startswith("self_attn.indexer"):
        return "indexer"
    if rest.startswith("self_attn"):
        return "attention"
    if rest.startswith("mlp.experts."):
        return "routed_experts"
    if rest.startswith("mlp.shared_experts"):
        return "shared_experts"
    assert rest.startswith("mlp"), f"{module} is no linear of a decoder layer"
    return "dense_mlp"


def expert_of(module: str) -> int | None:
    """Number of the routed expert that a module is or belongs to, from its name:
    `model.layers.3.mlp.experts.7.up_proj` -> 7. None for other modules."""
    _, _, rest = module.partition(".mlp.experts.")
    return int(rest.partition(".")[0]) if rest else None


def input_key(module: str) -> str:
    """Key of the input of a linear, from its name: linears of one layer with equal keys read the
    same input. `...kv_a_proj_with_mqa` -> `...q_a_proj`; in DeepSeek-V3 that is the name of the
    input too (`LinearInput.name`)."""
    parent, _, role = module.rpartition(".")
    return f"{parent}.{_SAME_INPUT.get(role, role)}"
