"""The tensors of a TensorRT-LLM engine directory: names, types and shapes, from shapes alone.

The directory is a Hugging Face checkpoint in the form that the PyTorch backend reads for DeepSeek
on Hopper. Two dialects say the same model in different ways, and a release is a third:

    mixed     routed experts in INT4 or INT8 layer by layer, every other linear as the source stores
              it, FP8 tiles bit for bit (quant_algo MIXED_PRECISION)
    single    all routed experts in one format, every other linear in BF16 (quant_algo W4A8_AWQ or
              W8A16): never meets the faults of MIXED_PRECISION, for about 16 GB of DeepSeek-V3
    released  an unquantized source as it is: the baseline

    format     stored tensors of one linear, [N, K]
    INT4       weight I8 [N, K/2], two codes per byte along K, the low nibble first, two's
               complement; weight_scale_inv BF16 [N, K/128], a multiplier in spite of its name;
               input_scale F32 [1]
    INT8       weight I8 [N, K]; weight_scale BF16 [N]
    FP8 tiles  weight F8_E4M3 [N, K]; weight_scale_inv F32 [N/128, K/128], a multiplier
    BF16       weight BF16 [N, K]

Names and shapes were read in TensorRT-LLM's `modules/linear.py`, `fused_moe/quantization.py`
(`WInt4AFP8FusedMoEMethod`, `INT8WoqPerChannelFusedMoEMethod`) and `modeling_deepseekv3.py`. This
file imports no torch: the planner and the byte table use it too.

N outputs · K inputs
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Literal, get_args

from deepseek.artifact.engine_manifest import RankLayout
from deepseek.artifact.layout import StoredTensor, stored_layers
from deepseek.artifact.manifest import LayerKey
from deepseek.config import ModelConfig
from deepseek.errors import DeployError
from deepseek.inventory import (
    HEAD,
    TensorSpec,
    expert_of,
    global_tensors,
    is_within,
    layer_of,
    layer_tensors,
)
from deepseek.recipe import Scheme

Dialect = Literal["mixed", "single", "released"]
DIALECTS: tuple[Dialect, ...] = get_args(Dialect)

#: Edge of an FP8 tile, and the only group size of its INT4 experts.
TILE = 128

#: Held whole by every rank.
EMBEDDING = "model.embed_tokens.weight"
#: `gpus_per_node` of every node that is planned for; a dense MLP is not divided beyond one.
RANKS_PER_NODE = 8
#: What an MTP layer holds of the main model's own.
_MTP_COPIES = (".embed_tokens.weight", ".shared_head.head.weight")

_BF16 = Scheme(weights="bf16")


def require_dialect(name: str) -> Dialect:
    """The dialect by name, of those that a quantized checkpoint can be built in.

    Raises:
        DeployError: no such dialect.
    """
    for dialect in DIALECTS:
        if dialect == name != "released":
            return dialect
    raise DeployError(f"dialect {name!r} is unknown; use mixed or single")


def stored_schemes(
    config: ModelConfig, schemes: Mapping[str, Scheme], dialect: Dialect, *, mtp: bool = False
) -> dict[str, Scheme]:
    """The scheme of every linear as the directory stores it, without layers that it leaves out.
    In the dialect `single` every linear but the routed experts is BF16."""
    layers = config.num_layers_with_mtp if mtp else config.num_hidden_layers
    kept = {module: scheme for module, scheme in schemes.items() if is_within(module, layers)}
    if dialect == "single":
        return {m: s if expert_of(m) is not None else _BF16 for m, s in kept.items()}
    return kept


def stored_tensors(
    config: ModelConfig, stored: Mapping[str, Scheme], layer: LayerKey
) -> dict[str, StoredTensor]:
    """Every tensor of one file by full name; `stored` is what `stored_schemes` returned.

    What is not a linear has the type of the release, BF16 or F32; a source may store another.
    """
    specs = global_tensors(config) if layer == "globals" else layer_tensors(config, layer)
    return {
        f"{spec.module}.{suffix}" if spec.module in stored else spec.name: StoredTensor(
            dtype, shape, spec, suffix
        )
        for spec in specs
        for suffix, dtype, shape in _parts(spec, stored)
    }


def _parts(
    spec: TensorSpec, stored: Mapping[str, Scheme]
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(suffix, type, shape) of each tensor that a tensor of the model is stored as."""
    if spec.module not in stored:
        yield spec.role, "F32" if spec.kind == "float32" else "BF16", spec.shape
        return
    outputs, inputs = spec.shape
    match stored[spec.module].weights:
        case "int4":
            yield "weight", "I8", (outputs, inputs // 2)
            yield "weight_scale_inv", "BF16", (outputs, inputs // TILE)
            yield "input_scale", "F32", (1,)
        case "int8":
            yield "weight", "I8", (outputs, inputs)
            yield "weight_scale", "BF16", (outputs,)
        case "fp8-block":
            yield "weight", "F8_E4M3", (outputs, inputs)
            yield "weight_scale_inv", "F32", (math.ceil(outputs / TILE), math.ceil(inputs / TILE))
        case "bf16":
            yield "weight", "BF16", (outputs, inputs)
        case weights:
            raise AssertionError(f"{spec.module}: {weights} has no form in TensorRT-LLM")


def ways(spec: TensorSpec, ranks: RankLayout) -> int:
    """Over how many ranks a tensor of the model is divided; the others hold copies.

    Attention and head are divided over all ranks, routed experts by expert and inside each expert.
    Every rank holds the whole embedding. A dense MLP and the shared expert are divided over as many
    as whole tiles of their width allow: gcd(width / 128, tp); a dense MLP moreover not beyond one
    node (`_compute_mlp_tp_size` and `_compute_shared_expert_tp_size` of its DeepSeek model).
    """
    if spec.name == EMBEDDING:
        return 1
    match spec.split:
        case "replicated":
            return 1
        case "expert":
            return ranks.tp
        case split if spec.group in ("dense_mlp", "shared_experts"):
            width = spec.shape[0] if split == "column" else spec.shape[1]
            whole = math.gcd(width // TILE, ranks.tp) if width % TILE == 0 else 1
            beyond_node = spec.group == "dense_mlp" and whole > RANKS_PER_NODE
            return math.gcd(whole, RANKS_PER_NODE) if beyond_node else whole
        case _:
            return ranks.tp


def rank_weight_bytes(
    config: ModelConfig, stored: Mapping[str, Scheme], ranks: RankLayout, *, mtp: bool = False
) -> int:
    """Bytes of weights that each rank holds of what the directory stores; all ranks hold the same.

    The second copy of kv_b_proj that MLA's absorbed form keeps is the runtime's, as the planner's
    workspace counts it. A static input scale is held once per expert and linear, whoever reads it.
    An MTP layer's copies of embedding and head are not read.
    """
    divided: Counter[int] = Counter()  # number of ranks -> bytes that are divided among as many
    for layer, count in _kinds_of_layers(config, stored, mtp):
        for tensor in stored_tensors(config, stored, layer).values():
            if tensor.spec.group != "mtp" or not tensor.spec.name.endswith(_MTP_COPIES):
                divided[_rank_share(tensor, ranks)] += count * tensor.num_bytes
    return sum(-(-size // share) for share, size in divided.items())


def _rank_share(tensor: StoredTensor, ranks: RankLayout) -> int:
    """Over how many ranks a stored tensor is divided. A scale per output channel of down_proj does
    not divide by the inputs that ranks of one expert share."""
    if tensor.suffix == "weight_scale" and tensor.spec.role == "down_proj":
        return ranks.ep
    return ways(tensor.spec, ranks)


def total_bytes(config: ModelConfig, stored: Mapping[str, Scheme], *, mtp: bool = False) -> int:
    """Bytes of all tensors of the directory, headers of files apart."""
    return sum(
        count * tensor.num_bytes
        for layer, count in _kinds_of_layers(config, stored, mtp)
        for tensor in stored_tensors(config, stored, layer).values()
    )


def _kinds_of_layers(
    config: ModelConfig, stored: Mapping[str, Scheme], mtp: bool
) -> list[tuple[LayerKey, int]]:
    """(a layer, how many hold tensors of the same types and shapes): DeepSeek-V3 has three kinds,
    so that its 46,000 tensors need not be listed."""
    formats: dict[int, list[str]] = {}
    for module, scheme in stored.items():
        if module != HEAD:
            formats.setdefault(layer_of(module), []).append(scheme.weights)
    kinds: dict[tuple[object, ...], list[LayerKey]] = {}
    for layer in stored_layers(config, mtp=mtp):
        kind: tuple[object, ...] = (layer,)
        if layer != "globals":
            is_mtp = layer >= config.num_hidden_layers
            kind = config.is_moe(layer), is_mtp, *formats.get(layer, ())
        kinds.setdefault(kind, []).append(layer)
    return [(alike[0], len(alike)) for alike in kinds.values()]
