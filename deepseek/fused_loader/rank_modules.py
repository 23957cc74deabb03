"""Which modules one rank of an engine that fuses linears has, layer by layer, before they are
filled."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

import torch

from deepseek.artifact.engine_manifest import RankLayout
from deepseek.artifact.loader_files import LoaderRefusal
from deepseek.config import ModelConfig
from deepseek.fused_loader.modules import BF16, Experts, Linear, Method, Module, Part, Plain
from deepseek.inventory import HEAD

_VOCAB_PADDING = 64


class QuantConfig(Protocol):
    """What an engine makes of `quantization_config`."""

    @property
    def source(self) -> Path: ...

    def linear(self, name: str, parts: tuple[str, ...], module_class: str) -> Method: ...

    def experts(self, name: str) -> Method: ...

    def head(self) -> Method: ...


@dataclass(frozen=True, slots=True)
class RankModules(ABC):
    """The modules of one rank by layer, of an engine that says what is its own."""

    #: The role of the linear that q_a_proj and kv_a_proj_with_mqa are fused into.
    fused_queries: ClassVar[str]
    #: What routed experts are, by the parameters that they have.
    experts_class: ClassVar[type[Experts]] = Experts

    config: ModelConfig
    quant: QuantConfig
    ranks: RankLayout
    rank: int
    methods: dict[str, Method] = field(default_factory=dict)

    @abstractmethod
    def place(self, count: int, ways: int) -> tuple[int, int]:
        """The first of the `count` experts of this rank, and which of their `ways` parts it has."""

    @abstractmethod
    def check_linear(self, linear: Linear) -> None:
        """Check what is more than whole groups.

        Raises:
            LoaderRefusal: the engine would stop.
        """

    @abstractmethod
    def check_experts(self, experts: Experts) -> None:
        """The same of routed experts."""

    def globals(self) -> Iterator[Module]:
        """Outside the layers."""
        yield self._vocabulary("model.embed_tokens")
        yield Plain("model.norm", (self.config.hidden_size,))
        yield self._head()

    def layer(self, layer: int) -> Iterator[Module]:
        """Of one decoder layer, or of an MTP layer.

        Raises:
            LoaderRefusal: the engine has no method for one.
        """
        config, name = self.config, f"model.layers.{layer}"
        hidden = config.hidden_size
        for part in ("input_layernorm", "post_attention_layernorm"):
            yield Plain(f"{name}.{part}", (hidden,))
        yield from self._attention(f"{name}.self_attn")
        if config.is_moe(layer):
            experts = config.n_routed_experts
            yield Plain(f"{name}.mlp.gate", (experts, hidden))
            bias = "e_score_correction_bias"
            yield Plain(f"{name}.mlp.gate", (experts,), torch.float32, bias)
            yield self._experts(f"{name}.mlp.experts")
            width = config.moe_intermediate_size * config.n_shared_experts
            yield from self._mlp(f"{name}.mlp.shared_experts", width)
        else:
            yield from self._mlp(f"{name}.mlp", config.intermediate_size)
        if layer >= config.num_hidden_layers:
            for part in ("enorm", "hnorm", "shared_head.norm"):
                yield Plain(f"{name}.{part}", (hidden,))
            yield Plain(f"{name}.eh_proj", (hidden, 2 * hidden))
            yield self._vocabulary(f"{name}.shared_head.head")
            if layer == config.num_hidden_layers:  # later ones share it
                yield self._vocabulary(f"{name}.embed_tokens")

    def _attention(self, name: str) -> Iterator[Module]:
        config, tp = self.config, self.ranks.tp
        hidden, heads = config.hidden_size, config.num_attention_heads
        latent = config.kv_lora_rank + config.qk_rope_head_dim
        value = config.qk_nope_head_dim + config.v_head_dim
        if config.q_lora_rank is None:
            yield self._linear(f"{name}.kv_a_proj_with_mqa", {"": latent}, hidden, None)
            yield self._linear(f"{name}.q_proj", {"": heads * config.qk_head_dim}, hidden, 0)
        else:
            parts = {"q_a_proj": config.q_lora_rank, "kv_a_proj_with_mqa": latent}
            yield self._linear(f"{name}.{self.fused_queries}", parts, hidden, None)
            yield Plain(f"{name}.q_a_layernorm", (config.q_lora_rank,))
            outputs = heads * config.qk_head_dim
            yield self._linear(f"{name}.q_b_proj", {"": outputs}, config.q_lora_rank, 0)
        yield Plain(f"{name}.kv_a_layernorm", (config.kv_lora_rank,))
        yield self._linear(f"{name}.kv_b_proj", {"": heads * value}, config.kv_lora_rank, 0)
        yield self._linear(f"{name}.o_proj", {"": hidden}, heads * config.v_head_dim, 1)
        assert heads % tp == 0, tp

    def _mlp(self, name: str, width: int) -> Iterator[Module]:
        hidden = self.config.hidden_size
        parts = {"gate_proj": width, "up_proj": width}
        yield self._linear(f"{name}.gate_up_proj", parts, hidden, 0)
        yield self._linear(f"{name}.down_proj", {"": hidden}, width, 1)

    def _linear(self, name: str, parts: dict[str, int], inputs: int, cut: int | None) -> Linear:
        ways = 1 if cut is None else self.ranks.tp
        roles = {role or name.rpartition(".")[2]: size for role, size in parts.items()}
        placed: list[Part] = []
        for role, size in roles.items():
            local = size // ways if cut == 0 else size
            placed.append(Part(role, local, sum(part.outputs for part in placed)))
        if name not in self.methods:
            kind = "Replicated" if cut is None else "Column" if cut == 0 else "Row"
            self.methods[name] = self.quant.linear(name, tuple(roles), f"{kind}ParallelLinear")
        local = inputs // ways if cut == 1 else inputs
        method = self.methods[name]
        linear = Linear(name, tuple(placed), local, method, cut, ways, self.rank)
        self.check_linear(linear)
        if method.kind == "wna16" and method.group:
            self.whole(name, [local], method.group, "groups")
        return linear

    def _experts(self, name: str) -> Experts:
        config, ranks = self.config, self.ranks
        count = config.n_routed_experts // ranks.ep
        ways = ranks.tp // ranks.ep
        if name not in self.methods:
            self.methods[name] = self.quant.experts(name)
        method, width = self.methods[name], config.moe_intermediate_size // ways
        first, rank = self.place(count, ways)
        hidden = config.hidden_size
        experts = self.experts_class(name, first, count, hidden, width, method, ways, rank)
        self.check_experts(experts)
        if method.kind == "wna16":
            self.whole(name, [hidden, width], method.group or 1, "groups")
            if not method.symmetric:
                self.whole(name, [2 * width, hidden], 32 // method.bits, "words")
        return experts

    def whole(self, name: str, sizes: list[int], whole: int, what: str) -> None:
        """Check that what a rank has of `name` is whole groups, tiles or words.

        Raises:
            LoaderRefusal: one of the sizes is not.
        """
        for size in sizes:
            if size % whole:
                raise LoaderRefusal(
                    f"{self.quant.source}: {size} channels of {name} on each of {self.ranks.tp} "
                    f"ranks are no whole {what} of {whole}"
                )

    def _head(self) -> Module:
        """The language model's head: a linear by outputs where it is quantized.

        Raises:
            LoaderRefusal: it is, and its tokens would be padded, which is not modeled.
        """
        if HEAD not in self.methods:
            self.methods[HEAD] = self.quant.head()
        method, ways = self.methods[HEAD], self.ranks.tp
        if method == BF16:
            return self._vocabulary(HEAD)
        vocab = self.config.vocab_size
        self.whole(HEAD, [vocab], _VOCAB_PADDING * ways, "tokens for all ranks")
        part = Part(HEAD, vocab // ways, 0)
        return Linear(HEAD, (part,), self.config.hidden_size, method, 0, ways, self.rank)

    def _vocabulary(self, name: str) -> Plain:
        """Embedding or head, padded to whole 64 rows and divided over all ranks."""
        vocab, tp = self.config.vocab_size, self.ranks.tp
        each = math.ceil(vocab / _VOCAB_PADDING) * _VOCAB_PADDING // tp
        shape = (each, self.config.hidden_size)
        return Plain(name, shape, whole=vocab, first=self.rank * each)
