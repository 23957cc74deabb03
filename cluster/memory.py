"""Bytes of a served model by group, per GPU and in total; arithmetic on shapes, no tensors.

On GPUs a weight takes the bytes that the quantized checkpoint stores
(`deepseek.formats.stored_shapes`); tensor parallelism splits or replicates it as the inventory
says. The embedded engine has its own layout (`deepseek.engine.packed_layout`), so that planned and
allocated bytes are the same number there. MLA's latent cache has one head, and tensor parallelism
*replicates* it: more GPUs hold more KV tokens only because each holds fewer weights.

N outputs · K inputs · T tokens of one step · tp GPUs of one replica
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import get_args

from cluster.hardware import GPUS_PER_NODE
from deepseek.config import ModelConfig
from deepseek.engine.packed_layout import packed_tensors
from deepseek.errors import DeployError
from deepseek.formats import stored_shapes
from deepseek.inventory import Group, Split, TensorSpec, tensors
from deepseek.kv_layout import KVLayout, kv_layout, layer_token_bytes
from deepseek.recipe import KVFormat, Scheme
from deepseek.trtllm.layout import EMBEDDING

#: Lines of the table, in order. Scales and zero points of all groups have their own line. Those of
#: the MTP layer count in its line, because both are loaded or left out together.
GROUPS: tuple[str, ...] = get_args(Group)

#: Groups whose linears every token goes through.
DENSE_GROUPS = ("attention", "shared_experts", "dense_mlp", "indexer")
#: Edge of an FP8 or INT8 tile, and the group of the indexer's cached keys.
_BLOCK = 128
#: Tokens per KV page: FlashMLA's on GPUs, the engine's default on the CPU.
GPU_PAGE_TOKENS = 64
CPU_PAGE_TOKENS = 16
#: Prefill budget of one step and most sequences per step that the workspace is sized for.
GPU_STEP_TOKENS, GPU_MAX_BATCH = 8192, 256
CPU_STEP_TOKENS, CPU_MAX_BATCH = 512, 16
#: Routed tokens on the busiest GPU against the mean (expert parallelism is never even).
_EXPERT_IMBALANCE = 2
#: Bytes of index scores that vLLM has at a time (VLLM_SPARSE_INDEXER_MAX_LOGITS_MB's default).
_INDEX_SCORES = 512 << 20
#: What the embedded engine's kernels take beside a weight's codes.
_PACKED_SCALES = frozenset({"scale", "scale_zero", "zero_point", "input_scale"})


@dataclass(frozen=True, slots=True)
class GroupBytes:
    """Weight bytes of one group, in the whole model and on the fullest GPU. `values` are codes and
    high-precision values, `scales` are scales and zero points."""

    values: int = 0
    values_per_gpu: int = 0
    scales: int = 0
    scales_per_gpu: int = 0

    def __add__(self, other: GroupBytes) -> GroupBytes:
        return GroupBytes(
            self.values + other.values,
            self.values_per_gpu + other.values_per_gpu,
            self.scales + other.scales,
            self.scales_per_gpu + other.scales_per_gpu,
        )

    def times(self, count: int) -> GroupBytes:
        return GroupBytes(
            self.values * count,
            self.values_per_gpu * count,
            self.scales * count,
            self.scales_per_gpu * count,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """Memory of one replica, in bytes. `weights` and `weights_per_gpu` count the group `mtp` only
    if `mtp_loaded`."""

    groups: Mapping[str, GroupBytes]
    mtp_loaded: bool
    workspace_per_gpu: int
    kv_bytes_per_token: int
    page_tokens: int
    #: Pages beyond those for tokens (the embedded engine's zero page).
    spare_pages: int = 0

    def _loaded(self) -> Iterable[GroupBytes]:
        return (g for name, g in self.groups.items() if name != "mtp" or self.mtp_loaded)

    @property
    def weights(self) -> int:
        """Loaded weight bytes of the whole model, replicas of split tensors counted once."""
        return sum(group.values + group.scales for group in self._loaded())

    @property
    def dense(self) -> GroupBytes:
        """The linears outside the routed experts of the main layers. Decoding reads all of them in
        every step, whatever the batch."""
        return sum((self.groups[name] for name in DENSE_GROUPS), GroupBytes())

    @property
    def weights_per_gpu(self) -> int:
        """Loaded weight bytes on the fullest GPU, replicated tensors included."""
        return sum(group.values_per_gpu + group.scales_per_gpu for group in self._loaded())

    def kv_tokens(self, usable_bytes: int) -> int:
        """Tokens whose latents fit beside weights and workspace, in whole KV pages."""
        free = usable_bytes - self.weights_per_gpu - self.workspace_per_gpu
        pages = free // (self.kv_bytes_per_token * self.page_tokens) - self.spare_pages
        return max(0, pages) * self.page_tokens

    def kv_bytes(self, num_tokens: int) -> int:
        """Bytes per GPU of a cache for this many tokens, rounded up to pages."""
        pages = -(-num_tokens // self.page_tokens) + self.spare_pages
        return pages * self.page_tokens * self.kv_bytes_per_token


@dataclass(frozen=True, slots=True)
class _Kind:
    """What decides the bytes of a tensor; tensors of one kind take the same."""

    group: str
    split: Split
    shape: tuple[int, ...]
    scheme: Scheme | None
    itemsize: int
    is_embedding: bool


class Tally:
    """The tensors of one model under one recipe, counted by kind. DeepSeek-V3's 46,000 tensors are
    a dozen kinds, so that a footprint for another number of GPUs costs nothing. `schemes` may lack
    the MTP layer's."""

    def __init__(self, config: ModelConfig, schemes: Mapping[str, Scheme]) -> None:
        self.config = config
        self.schemes = schemes
        # Schemes are shared objects, so their ids are counted: hashing 46,000 takes half a second.
        counts: Counter[tuple[object, ...]] = Counter()
        examples: dict[tuple[object, ...], TensorSpec] = {}
        for spec in tensors(config):
            if _is_shared_with_main(spec):
                continue
            scheme = schemes.get(spec.module)
            if scheme is None and spec.kind == "linear":  # of an MTP layer that is left out
                continue
            key = (spec.group, spec.split, spec.shape, spec.kind, id(scheme), _is_embedding(spec))
            counts[key] += 1
            examples.setdefault(key, spec)
        self._kinds = [(_kind(examples[key], schemes), count) for key, count in counts.items()]

    def linears(self) -> Iterator[tuple[str, Split, tuple[int, ...], Scheme]]:
        """Group, split, shape [N, K] and scheme of the linears, each combination once."""
        for kind, _ in self._kinds:
            if kind.scheme is not None:
                yield kind.group, kind.split, kind.shape, kind.scheme

    def weights(self) -> Iterator[tuple[str, Scheme, int]]:
        """Group, scheme and number of weights of the linears, by kind; the MTP layer's are of group
        `mtp`."""
        for kind, count in self._kinds:
            if kind.scheme is not None:
                yield kind.group, kind.scheme, math.prod(kind.shape) * count

    def gpu_footprint(
        self, tp: int, kv_format: KVFormat, *, target: str, mtp: bool = False
    ) -> Footprint:
        """Bytes on `tp` GPUs under tensor parallelism (attention, dense MLP, shared expert,
        vocabulary) and expert parallelism (whole routed experts per GPU).

        `target` decides the layout of the KV cache; trtllm has the whole embedding on every GPU
        and divides a dense MLP within a node only.
        """
        groups = dict.fromkeys(GROUPS, GroupBytes())
        is_trtllm = target == "trtllm"
        for kind, count in self._kinds:
            bytes_of_one = _bytes_of(kind, tp, self.config.n_routed_experts, is_trtllm)
            groups[kind.group] += bytes_of_one.times(count)
        layers = self.config.num_hidden_layers
        layers += self.config.num_nextn_predict_layers if mtp else 0
        return Footprint(
            groups=groups,
            mtp_loaded=mtp,
            workspace_per_gpu=_workspace(self.config, tp, 2, GPU_STEP_TOKENS, GPU_MAX_BATCH)
            + _indexer_workspace(self.config, GPU_STEP_TOKENS)
            + _absorbed_copies(self.config, tp),
            kv_bytes_per_token=layers
            * (
                kv_bytes_per_token_and_layer(self.config, target, kv_format)
                + indexer_bytes_per_token_and_layer(self.config)
            ),
            page_tokens=GPU_PAGE_TOKENS,
        )

    def embedded_footprint(self, kv_format: KVFormat) -> Footprint:
        """Bytes of the embedded engine on the CPU with native kernels, whose layouts these are."""
        return Footprint(
            groups=self._packed_groups,
            mtp_loaded=False,
            workspace_per_gpu=_workspace(self.config, 1, 4, CPU_STEP_TOKENS, CPU_MAX_BATCH),
            kv_bytes_per_token=kv_bytes_per_token_and_layer(self.config, "embedded", kv_format)
            * self.config.num_hidden_layers,
            page_tokens=CPU_PAGE_TOKENS,
            spare_pages=1,
        )

    def dequantized_footprint(self, count: int) -> Footprint:
        """Bytes under transformers, which dequantizes every weight to BF16 while it loads, on
        `count` devices: whole layers on each, the embeddings on the fullest. It has no KV pages,
        and caches BF16 latents of the layers that a device has."""
        layers = self.config.num_hidden_layers
        share = math.ceil(layers / count)
        groups = dict.fromkeys(GROUPS, GroupBytes())
        for kind, number in self._kinds:
            size = math.prod(kind.shape) * kind.itemsize
            held = size if kind.group == "embeddings" else math.ceil(size * share / layers)
            groups[kind.group] += GroupBytes(size, held).times(number)
        return Footprint(
            groups=groups,
            mtp_loaded=False,
            workspace_per_gpu=_workspace(self.config, 1, 2, CPU_STEP_TOKENS, 1),
            kv_bytes_per_token=share
            * kv_bytes_per_token_and_layer(self.config, "transformers", "bf16"),
            page_tokens=1,
        )

    @cached_property
    def _packed_groups(self) -> dict[str, GroupBytes]:
        groups = dict.fromkeys(GROUPS, GroupBytes())
        for name, tensor in packed_tensors(self.config, self.schemes).items():
            size = tensor.num_bytes
            is_scale = name.rpartition(".")[2] in _PACKED_SCALES
            added = GroupBytes(0, 0, size, size) if is_scale else GroupBytes(size, size)
            groups[tensor.group] += added
        return groups


def planned_kv_layout(config: ModelConfig, target: str, kv_format: KVFormat) -> KVLayout:
    """How the target lays the format out; one that it refuses is counted as BF16, which the
    refusal asks for."""
    try:
        return kv_layout(target, kv_format, sparse=config.has_indexer)
    except DeployError:
        return "bf16"


def kv_bytes_per_token_and_layer(config: ModelConfig, target: str, kv_format: KVFormat) -> int:
    """Bytes of one cached token in one layer on a target: latent and rotary key, and their scales
    (`deepseek/kv_layout.py`)."""
    layout = planned_kv_layout(config, target, kv_format)
    return layer_token_bytes(layout, config.kv_lora_rank, config.qk_rope_head_dim)


def indexer_bytes_per_token_and_layer(config: ModelConfig) -> int:
    """Bytes of one token's key of DeepSeek-V3.2's indexer in one layer, whatever the KV format: an
    FP8 value per dimension and one f32 scale per 128. DeepSeek-V3.2: 132; others: 0.

    Read in vLLM (`Indexer.k_cache`), SGLang (`head_dim_with_sf` of its indexer) and TensorRT-LLM
    (`_compute_slot_mappings`), which agree. Tensor parallelism replicates it like the latents. The
    embedded engine has no indexer.
    """
    if config.index_head_dim is None:
        return 0
    return config.index_head_dim + 4 * math.ceil(config.index_head_dim / _BLOCK)


def _kind(spec: TensorSpec, schemes: Mapping[str, Scheme]) -> _Kind:
    scheme = schemes.get(spec.module)
    itemsize = 4 if spec.kind == "float32" else 2
    return _Kind(spec.group, spec.split, spec.shape, scheme, itemsize, _is_embedding(spec))


def _is_embedding(spec: TensorSpec) -> bool:
    return spec.name == EMBEDDING


def _is_shared_with_main(spec: TensorSpec) -> bool:
    """Whether the tensor is the MTP layer's copy of embedding or head: engines load the main
    model's only."""
    return spec.group == "mtp" and spec.name.endswith(
        (".embed_tokens.weight", ".shared_head.head.weight")
    )


@lru_cache(maxsize=4096)
def _bytes_of(kind: _Kind, tp: int, num_experts: int, is_trtllm: bool) -> GroupBytes:
    """Bytes of one tensor, in total and on the fullest of `tp` GPUs."""
    if is_trtllm and kind.is_embedding:
        kind = replace(kind, split="replicated")
    if is_trtllm and kind.group in ("dense_mlp", "shared_experts"):
        width = kind.shape[0 if kind.split == "column" else 1]
        tp = _ways(width, _BLOCK, tp)
        if kind.group == "dense_mlp" and tp > GPUS_PER_NODE:
            tp = math.gcd(tp, GPUS_PER_NODE)
    if kind.scheme is None:
        values, scales = math.prod(kind.shape) * kind.itemsize, 0
    else:
        values, scales = _stored(kind.scheme, kind.shape)
    match kind.split:
        case "replicated":
            return GroupBytes(values, values, scales, scales)
        case "expert":
            # Whole experts; summed over a layer's experts this is the fullest GPU's share.
            fullest = math.ceil(num_experts / tp)
            share = [math.ceil(size * fullest / num_experts) for size in (values, scales)]
            return GroupBytes(values, share[0], scales, share[1])
        case "column":
            ways = _ways(kind.shape[0], granule(kind.scheme, "column"), tp)
            return GroupBytes(values, -(-values // ways), scales, -(-scales // ways))
        case "row":
            ways = _ways(kind.shape[1], granule(kind.scheme, "row"), tp)
            # A scale per output channel does not split by inputs: every GPU needs all of them.
            per_channel = ("int8", "int8-asym")
            split_scales = kind.scheme is not None and kind.scheme.weights not in per_channel
            scales_per_gpu = -(-scales // ways) if split_scales else scales
            return GroupBytes(values, -(-values // ways), scales, scales_per_gpu)


def _stored(scheme: Scheme, shape: tuple[int, ...]) -> tuple[int, int]:
    """(bytes of the codes, bytes of scales, zero points and the stored shape)."""
    values = scales = 0
    for suffix, (size, dtype) in stored_shapes(scheme, shape[0], shape[1]).items():
        num_bytes = math.prod(size) * dtype.itemsize
        if suffix in ("weight", "weight_packed"):
            values += num_bytes
        else:
            scales += num_bytes
    return values, scales


def granule(scheme: Scheme | None, split: Split) -> int:
    """The smallest number of outputs (column) or inputs (row) that a weight is split by."""
    if scheme is None:
        return 1
    if scheme.weights in ("fp8-block", "int8-block"):
        return _BLOCK
    return (scheme.group_size or 1) if split == "row" else 1


def _ways(size: int, granule: int, tp: int) -> int:
    """Over how many of `tp` GPUs a dimension is split without cutting a tile or a group. The
    others hold copies, as in TensorRT-LLM's shared expert: gcd(intermediate size / group, tp)."""
    return math.gcd(size // granule, tp) if size % granule == 0 else 1


def _workspace(config: ModelConfig, tp: int, itemsize: int, tokens: int, max_batch: int) -> int:
    """Peak bytes of activations in one step, on one GPU.

    3 T D for the residual stream, its norm and a layer's output, plus the largest of
      attention   T (q_rank + latent + H/tp (2 qk + 2 v)), q_rank 0 without a query latent
      routed      2 T k/tp (2 D + 3 I), twice the mean for imbalance
      dense       T 3 F/tp
    each times the item size, plus FP32 logits of `max_batch` sequences over the whole vocabulary.
    """
    heads = math.ceil(config.num_attention_heads / tp)
    attention = (
        (config.q_lora_rank or 0)
        + config.latent_dim
        + heads * (2 * config.qk_head_dim + 2 * config.v_head_dim)
    )
    routed_share = min(1.0, _EXPERT_IMBALANCE / tp) * config.num_experts_per_tok
    routed = routed_share * (2 * config.hidden_size + 3 * config.moe_intermediate_size)
    dense = 3 * math.ceil(config.intermediate_size / tp)
    per_token = 3 * config.hidden_size + max(attention, math.ceil(routed), dense)
    return tokens * per_token * itemsize + max_batch * config.vocab_size * 4


def _indexer_workspace(config: ModelConfig, tokens: int) -> int:
    """Peak bytes of an indexer's activations in one step, on every GPU: BF16 queries and keys
    before and after their rotation, 4 T (h + 1) d, and the scores, FP32 [T, context], as many rows
    at a time as the engine allows."""
    if config.index_n_heads is None or config.index_head_dim is None:
        return 0
    return 4 * tokens * (config.index_n_heads + 1) * config.index_head_dim + _INDEX_SCORES


def _absorbed_copies(config: ModelConfig, tp: int) -> int:
    """Bytes of a second, BF16 copy of kv_b_proj, on one GPU: TensorRT-LLM, vLLM and SGLang keep
    W_UK and W_UV by head beside the projection, to decode on the latents."""
    heads = math.ceil(config.num_attention_heads / tp)
    width = config.qk_nope_head_dim + config.v_head_dim
    return 2 * config.num_hidden_layers * heads * width * config.kv_lora_rank
