"""What one pass over the layers does on each GPU: bytes read, operations, bytes sent.

Arithmetic on shapes; how fast a GPU does it is `cluster/roofline.py`. A pass is a decoding step
(one token of each sequence) or a chunk of a prompt. Only weights that a pass touches are read: all
linears that every token goes through, and of the routed experts the distinct ones that its tokens
are routed to. The GPU that has most to do is counted, because all others wait for it.

Attention is split in one of two ways. `tp` gives every GPU some heads of all sequences, so that
every GPU reads the latents of every sequence (MLA's cache has one head, and is replicated); `dp`
gives every GPU all heads of some sequences, and whole copies of what is not a routed expert.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from cluster.hardware import GPUS_PER_NODE
from cluster.memory import (
    DENSE_GROUPS,
    Footprint,
    Tally,
    indexer_bytes_per_token_and_layer,
)
from deepseek.config import ModelConfig
from deepseek.formats import stored_bytes
from deepseek.inventory import HEAD
from deepseek.recipe import Scheme

Attention = Literal["tp", "dp"]
#: Bytes of one activation that crosses GPUs: BF16 in an all-reduce and on the way back from the
#: experts, FP8 on the way to them.
_SENT, _DISPATCHED = 2, 1
#: Collectives of a layer: after attention, and after its MLP (or to and from its experts).
COLLECTIVES_PER_LAYER = 2


@dataclass(frozen=True, slots=True)
class Layout:
    """How a replica is spread: over `gpus`, routed experts in `ep` groups of GPUs (every expert cut
    over gpus / ep of them), attention split by heads or by sequences."""

    gpus: int
    ep: int
    attention: Attention = "tp"

    @property
    def nodes(self) -> int:
        return -(-self.gpus // GPUS_PER_NODE)

    @property
    def gathers(self) -> bool:
        """Whether every GPU gets all tokens for its pieces of the experts, each of which is cut
        over all GPUs, while attention is split by sequences."""
        return self.attention == "dp" and self.ep == 1 < self.gpus

    @property
    def label(self) -> str:
        """`TP8 EP8`, or `DP8 EP8` with attention split by sequences."""
        return f"{self.attention.upper()}{self.gpus} EP{self.ep}"


@dataclass(frozen=True, slots=True)
class Part:
    """One kind of work of a pass, on the busiest GPU: bytes of HBM read, and operations by the
    number format that multiplies them (a multiplication and an addition count as two)."""

    bytes: float
    operations: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass on the busiest GPU. `rows` are the tokens whose activations it has in every layer;
    `nvlink_bytes` and `network_bytes` leave it inside its node and out of it; `layers` and
    `collectives` have a fixed cost each."""

    dense: Part
    experts: Part
    attention: Part
    rows: float
    nvlink_bytes: float
    network_bytes: float
    layers: int
    collectives: int


@dataclass(frozen=True, slots=True)
class Head:
    """The head: its stored bytes, and the number format that multiplies it."""

    bytes: int
    format: str


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """The weights of a served model as a pass needs them: stored bytes, and numbers of weights by
    the format that multiplies them. The MTP layer is left out. Passes are cached."""

    config: ModelConfig
    footprint: Footprint
    dense: Mapping[str, Mapping[str, int]]
    experts: Mapping[str, int]
    has_fp8: bool
    head: Head

    @classmethod
    def of(cls, tally: Tally, footprint: Footprint, *, has_fp8: bool) -> Model:
        """`footprint` is of the layout's number of GPUs; `has_fp8` is the hardware's."""
        config, head_scheme = tally.config, tally.schemes.get(HEAD)
        head = Head(2 * config.vocab_size * config.hidden_size, "fp16")
        if head_scheme is not None:
            size = stored_bytes(head_scheme, config.vocab_size, config.hidden_size)
            head = Head(size, number_format(head_scheme, has_fp8=has_fp8))
        dense: dict[str, Counter[str]] = {}
        experts: Counter[str] = Counter()
        for group, scheme, number in tally.weights():
            form = number_format(scheme, has_fp8=has_fp8)
            if group == "routed_experts":
                experts[form] += number
            elif group in DENSE_GROUPS:
                dense.setdefault(group, Counter())[form] += number
        return cls(config, footprint, dense, experts, has_fp8, head)

    def decode(self, layout: Layout, batch: float, context: float) -> Pass:
        """One step of `batch` sequences that have `context` tokens each on average. Attention works
        on the latents: a query head meets a cached token with latent_dim multiplications for the
        score and kv_lora_rank for the value."""
        return _decode(self, layout, batch, context)

    def prefill(self, layout: Layout, tokens: float, context: float) -> Pass:
        """One chunk of `tokens` prompt tokens over all sequences, each of which sees `context`
        tokens on average. Attention works on expanded keys and values."""
        return _prefill(self, layout, tokens, context)

    def one_pass(
        self, layout: Layout, tokens: float, here: float, attention: Part, sampled: float
    ) -> Pass:
        """The work besides attention. `here` are the tokens that a GPU's dense linears see,
        `sampled` those that it has logits of (none in a chunk: a prompt has one, which is nothing
        beside it)."""
        config = self.config
        moe_layers = config.num_hidden_layers - config.first_k_dense_replace
        nvlink, network = _sent(config, layout, tokens, moe_layers)
        return Pass(
            dense=self._dense(layout, here, sampled),
            experts=self._experts(layout, tokens),
            attention=attention,
            rows=tokens if layout.gathers else here,
            nvlink_bytes=nvlink,
            network_bytes=network,
            layers=config.num_hidden_layers,
            collectives=COLLECTIVES_PER_LAYER * config.num_hidden_layers if layout.gpus > 1 else 0,
        )

    def _dense(self, layout: Layout, here: float, sampled: float) -> Part:
        size = 0.0
        operations: dict[str, float] = defaultdict(float)
        for group, weights in self.dense.items():
            held, split = self.footprint.groups[group], 1.0
            if layout.attention == "dp":
                size += held.values + held.scales
            else:
                size += held.values_per_gpu + held.scales_per_gpu
                split = held.values_per_gpu / held.values
            for form, number in weights.items():
                operations[form] += 2 * here * number * split
        head = self.config.vocab_size * self.config.hidden_size
        head_share = head / layout.gpus
        if sampled:
            size += self.head.bytes / layout.gpus
            rows = sampled if layout.attention == "tp" else sampled * layout.gpus
            operations[self.head.format] += 2 * rows * head_share
        return Part(size, dict(operations))

    def _experts(self, layout: Layout, tokens: float) -> Part:
        config = self.config
        routed = self.footprint.groups["routed_experts"]
        experts = config.n_routed_experts
        pieces = layout.gpus / layout.ep
        read = busiest_experts(experts, config.num_experts_per_tok, layout.ep, tokens)
        size = (routed.values + routed.scales) / experts * read / pieces
        pairs = busiest_share(tokens * config.num_experts_per_tok, layout.ep) / pieces
        operations = {form: 2 * pairs * number / experts for form, number in self.experts.items()}
        return Part(size, operations)


@lru_cache(maxsize=8192)
def _decode(model: Model, layout: Layout, batch: float, context: float) -> Pass:
    config, layers = model.config, model.config.num_hidden_layers
    here = batch if layout.attention == "tp" else _share(batch, layout)
    heads = config.num_attention_heads / (layout.gpus if layout.attention == "tp" else 1)
    seen = min(context, config.index_topk or context)
    per_token = config.latent_dim + config.kv_lora_rank
    operations: dict[str, float] = defaultdict(float)
    operations["fp16"] = 2 * here * seen * heads * per_token * layers
    index = layers * indexer_bytes_per_token_and_layer(config)
    latents = model.footprint.kv_bytes_per_token - index
    _add_indexer(operations, model, here, context)
    attention = Part(here * (seen * latents + context * index), operations)
    return model.one_pass(layout, batch, here, attention, here)


@lru_cache(maxsize=8192)
def _prefill(model: Model, layout: Layout, tokens: float, context: float) -> Pass:
    config, layers = model.config, model.config.num_hidden_layers
    here = _share(tokens, layout)
    seen = min(context, config.index_topk or context)
    width = config.qk_head_dim + config.v_head_dim
    # By heads or by sequences, a GPU does its share of all of it; the indexer is replicated.
    operations: dict[str, float] = defaultdict(float)
    operations["fp16"] = 2 * here * seen * config.num_attention_heads * width * layers
    rows = tokens if layout.attention == "tp" else here
    _add_indexer(operations, model, rows, context)
    return model.one_pass(layout, tokens, rows, Part(0.0, operations), 0.0)


def _add_indexer(operations: dict[str, float], model: Model, rows: float, context: float) -> None:
    """Scores of DeepSeek-V3.2's indexer, whose heads meet every token before the best are seen."""
    config = model.config
    if config.index_n_heads is not None and config.index_head_dim is not None:
        per_token = config.index_n_heads * config.index_head_dim * config.num_hidden_layers
        operations["fp8" if model.has_fp8 else "fp16"] += 2 * rows * context * per_token


def number_format(scheme: Scheme, *, has_fp8: bool) -> str:
    """The format in which tensor cores multiply a linear. Weight-only formats are expanded to BF16
    first, and so are FP8 tiles where there are no FP8 tensor cores."""
    if scheme.activations == "int8":
        return "int8"
    if has_fp8 and (scheme.activations == "fp8" or scheme.weights == "fp8-block"):
        return "fp8"
    return "fp16"


def distinct_experts(experts: int, per_token: int, tokens: float) -> float:
    """Experts of one layer that `tokens` tokens are routed to, expected, if every token takes
    `per_token` of them evenly: E (1 - (1 - k/E)^T). One token of DeepSeek-V3 touches 8, sixteen
    touch 102, a hundred 245 of its 256."""
    return experts * (1.0 - (1.0 - per_token / experts) ** tokens)


def busiest_experts(experts: int, per_token: int, groups: int, tokens: float) -> float:
    """Distinct experts that the busiest of `groups` equal groups of GPUs reads in one layer.

    The mean of a group is distinct / groups. Which experts are touched varies like draws, so the
    largest of `groups` such numbers is taken to be sqrt(2 ln groups) standard deviations above the
    mean (the leading term of the largest of as many normal variables), and a group never has more
    than its own. One token of DeepSeek-V3 over 8 groups: 3.0 of the 32, where 1 is the mean.
    """
    touched = distinct_experts(experts, per_token, tokens)
    mean = touched / groups
    spread = math.sqrt(2.0 * math.log(groups) * mean * (1.0 - touched / experts))
    return min(mean + spread, experts / groups, touched)


def busiest_share(pairs: float, groups: int) -> float:
    """Token-expert pairs of the busiest of `groups` groups, the same way: counts of `pairs` draws
    have the variance of their mean (1 - 1/groups)."""
    mean = pairs / groups
    return mean + math.sqrt(2.0 * math.log(groups) * mean * (1.0 - 1.0 / groups))


def _share(tokens: float, layout: Layout) -> float:
    """Tokens of one GPU of those that are spread over all; at least one of it works on one."""
    return max(min(tokens, 1.0), tokens / layout.gpus)


def _sent(
    config: ModelConfig, layout: Layout, tokens: float, moe_layers: int
) -> tuple[float, float]:
    """Bytes that one GPU sends in a pass: inside its node, and out of it.

    `tp`: two all-reduces a layer of the tokens' hidden states, 2 (n-1)/n of them each inside a
    node, and between nodes a GPU's eighth. `dp`: in MoE layers a token goes to its experts' GPUs
    and back; out of the node it goes once to each node that has an expert of it, of which routing
    by groups leaves at most `topk_group`. Where all tokens are gathered, that and scattering the
    sums is half an all-reduce each.
    """
    if layout.gpus == 1:
        return 0.0, 0.0
    in_node = min(layout.gpus, GPUS_PER_NODE)
    nodes = layout.nodes
    width = config.hidden_size
    if layout.attention == "tp" or layout.gathers:
        per_layer = 1 if layout.gathers else COLLECTIVES_PER_LAYER
        reduced = per_layer * config.num_hidden_layers * tokens * width * _SENT
        inside = 2 * (in_node - 1) / in_node * reduced
        return inside, 2 * (nodes - 1) / nodes * reduced / in_node
    here = _share(tokens, layout)
    there_and_back = here * width * (_SENT + _DISPATCHED) * moe_layers
    inside = config.num_experts_per_tok * there_and_back * (layout.gpus - 1) / layout.gpus
    reached = min(config.topk_group, nodes) if config.n_group > 1 else nodes
    return inside, reached * there_and_back * (nodes - 1) / nodes
