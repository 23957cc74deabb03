"""The tensors of an SGLang engine directory: names, types and shapes, from shapes alone.

The directory is a Hugging Face checkpoint, one file per decoder layer, in one of SGLang's own
layouts (`--dialect`), which are one quantization method for the whole model each:

    w4afp8              routed experts INT4 in groups of 128 with static FP8 inputs, every other
                        linear FP8 tiles as released
    w8a8_int8           every linear INT8 per output channel, inputs INT8 per token
    blockwise_int8      every linear INT8 in tiles, inputs INT8 per token and 128 channels
    compressed-tensors  the quantized checkpoint's own groups; kv_b_proj in BF16 where it is INT8 or
                        INT4, because SGLang takes its `weight` apart and finds none that is packed
    released            an unquantized source as it is

    format              stored tensors of one linear, [N, K]
    INT4, w4afp8        weight I8 [N, K/2], two codes per byte along K, the low nibble first, two's
                        complement; weight_scale_inv BF16 [N, K/128]; input_scale F32 [1]
    INT8, w8a8_int8     weight I8 [N, K]; weight_scale F32 [N, 1]
    INT8 tiles          weight I8 [N, K]; weight_scale_inv F32 [N/128, K/128]
    FP8 tiles           weight F8_E4M3 [N, K]; weight_scale_inv F32 [N/128, K/128]; in groups of
                        compressed-tensors weight_scale
    INT4, INT8 packed   weight_packed I32 [N, K/8 or K/4]; weight_scale BF16 [N, K/group or 1];
                        weight_shape I64 [2], but not of q_a_proj and kv_a_proj_with_mqa, which
                        SGLang fuses; with zero points weight_zero_point I32
    BF16                weight BF16 [N, K]

Scales are multipliers in spite of the name `_inv`. Those of packed weights are BF16, the type in
which SGLang holds them. Read in 0.5.23's `quantization/w4afp8.py`, `w8a8_int8.py`,
`blockwise_int8.py`, `compressed_tensors/` and `deepseek_weight_loader.py`. This file imports no
torch: the planner and the byte table use it too.

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
from deepseek.untrusted import show_name

Dialect = Literal["w4afp8", "w8a8_int8", "blockwise_int8", "compressed-tensors", "released"]
DIALECTS: tuple[Dialect, ...] = get_args(Dialect)

#: Edge of a tile, and the only group size of `w4afp8`.
TILE = 128
#: `DEFAULT_VOCAB_PADDING_SIZE`: embedding and head are padded to a multiple of it, then divided.
VOCAB_PADDING = 64
#: Linears that every rank holds whole.
WHOLE_ROLES = frozenset({"q_a_proj", "kv_a_proj_with_mqa"})
#: Linears whose inputs are divided over the ranks; every other but the whole ones by outputs.
ROW_ROLES = frozenset({"o_proj", "down_proj"})
_BF16 = Scheme(weights="bf16")


def require_dialect(name: str) -> Dialect:
    """The dialect by name, of those that a quantized checkpoint can be built in.

    Raises:
        DeployError: no such dialect.
    """
    for dialect in DIALECTS:
        if dialect == name != "released":
            return dialect
    known = ", ".join(dialect for dialect in DIALECTS if dialect != "released")
    raise DeployError(
        f"dialect {show_name(name)} is unknown to target sglang; use one of {known}, or leave it "
        "out for the one that fits"
    )


def fitting_dialect(schemes: Mapping[str, Scheme]) -> Dialect:
    """The dialect in which a quantized checkpoint runs as it was judged, by its routed experts.

    INT4 without quantized inputs runs so under compressed-tensors; w4afp8 would quantize them.
    """
    experts = {
        (scheme.weights, scheme.activations)
        for module, scheme in schemes.items()
        if expert_of(module) is not None
    }
    if ("int4", "fp8") in experts:
        return "w4afp8"
    if ("int8", "int8") in experts:
        return "w8a8_int8"
    if any(weights == "int8-block" for weights, _ in experts):
        return "blockwise_int8"
    return "compressed-tensors"


def stored_schemes(
    config: ModelConfig, schemes: Mapping[str, Scheme], dialect: Dialect, *, mtp: bool = False
) -> dict[str, Scheme]:
    """The scheme of every linear as the directory stores it, without layers that it leaves out."""
    layers = config.num_layers_with_mtp if mtp else config.num_hidden_layers
    kept = {module: scheme for module, scheme in schemes.items() if is_within(module, layers)}
    if dialect != "compressed-tensors":
        return kept
    return {
        module: _BF16 if module.endswith(".kv_b_proj") and scheme.is_quantized else scheme
        for module, scheme in kept.items()
    }


def stored_tensors(
    config: ModelConfig, stored: Mapping[str, Scheme], layer: LayerKey, dialect: Dialect
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
        for suffix, dtype, shape in _parts(spec, stored, dialect)
    }


def _parts(
    spec: TensorSpec, stored: Mapping[str, Scheme], dialect: Dialect
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(suffix, type, shape) of each tensor that a tensor of the model is stored as."""
    if spec.module not in stored:
        yield spec.role, "F32" if spec.kind == "float32" else "BF16", spec.shape
        return
    outputs, inputs = spec.shape
    tiles = math.ceil(outputs / TILE), math.ceil(inputs / TILE)
    scheme = stored[spec.module]
    match scheme.weights:
        case "bf16":
            yield "weight", "BF16", spec.shape
        case "fp8-block":
            is_group = dialect == "compressed-tensors"
            yield "weight", "F8_E4M3", spec.shape
            yield "weight_scale" if is_group else "weight_scale_inv", "F32", tiles
        case "int8-block":
            yield "weight", "I8", spec.shape
            yield "weight_scale_inv", "F32", tiles
        case "int4" if dialect == "w4afp8":
            yield "weight", "I8", (outputs, inputs // 2)
            yield "weight_scale_inv", "BF16", (outputs, inputs // TILE)
            yield "input_scale", "F32", (1,)
        case "int8" if scheme.activations == "int8":
            yield "weight", "I8", spec.shape
            yield "weight_scale", "F32", (outputs, 1)
        case "int4" | "int4-asym" | "int8" | "int8-asym":
            per_word = 32 // scheme.bits
            groups = 1 if scheme.group_size is None else math.ceil(inputs / scheme.group_size)
            yield "weight_packed", "I32", (outputs, math.ceil(inputs / per_word))
            yield "weight_scale", "BF16", (outputs, groups)
            if not _is_fused_whole(spec, stored):
                yield "weight_shape", "I64", (2,)
            if not scheme.is_symmetric:
                yield "weight_zero_point", "I32", (math.ceil(outputs / per_word), groups)
        case weights:
            raise AssertionError(f"{spec.module}: {weights} has no form in SGLang")


def _is_fused_whole(spec: TensorSpec, stored: Mapping[str, Scheme]) -> bool:
    """Whether SGLang puts the tensors of a linear and its neighbor one after the other, as those of
    `fused_qkv_a_proj_with_mqa`: two shapes would be four numbers where it has room for two, and
    nothing reads them, so that they are left out."""
    return spec.role in WHOLE_ROLES and f"{spec.parent}.q_a_proj" in stored


def rank_weight_bytes(
    config: ModelConfig,
    stored: Mapping[str, Scheme],
    ranks: RankLayout,
    dialect: Dialect,
    *,
    mtp: bool = False,
) -> tuple[int, ...]:
    """Bytes of weights that each rank holds of what the directory stores.

    Attention, MLPs, embedding and head are divided over all ranks, `q_a_proj` and
    `kv_a_proj_with_mqa` held whole by each; routed experts by expert over `ep` and inside each
    expert over the rest. Padding of the vocabulary and the BF16 copy of kv_b_proj by head are the
    runtime's, as the planner's workspace counts the latter.
    """
    divided: Counter[int] = Counter()  # number of ranks -> bytes that are divided among as many
    for layer, count in _kinds_of_layers(config, stored, mtp):
        for tensor in stored_tensors(config, stored, layer, dialect).values():
            divided[_ways(tensor, ranks)] += count * tensor.num_bytes
    return (sum(-(-size // share) for share, size in divided.items()),) * ranks.tp


def _ways(tensor: StoredTensor, ranks: RankLayout) -> int:
    """Over how many ranks a stored tensor is divided; the others hold copies."""
    spec = tensor.spec
    if spec.name.endswith(("embed_tokens.weight", "lm_head.weight", "shared_head.head.weight")):
        return ranks.tp
    is_expert = spec.split == "expert"
    if tensor.suffix in ("weight_shape", "input_scale"):
        return ranks.ep if is_expert else 1
    if spec.role in WHOLE_ROLES or spec.split == "replicated":
        return 1
    by_channel = tensor.suffix == "weight_scale" and tensor.shape[1:] == (1,)
    if by_channel and spec.role in ROW_ROLES:  # cut along inputs, which it has not
        return ranks.ep if is_expert else 1
    return ranks.tp


def total_bytes(
    config: ModelConfig, stored: Mapping[str, Scheme], dialect: Dialect, *, mtp: bool = False
) -> int:
    """Bytes of all tensors of the directory, headers of files apart."""
    return sum(
        count * tensor.num_bytes
        for layer, count in _kinds_of_layers(config, stored, mtp)
        for tensor in stored_tensors(config, stored, layer, dialect).values()
    )


def _kinds_of_layers(
    config: ModelConfig, stored: Mapping[str, Scheme], mtp: bool
) -> list[tuple[LayerKey, int]]:
    """(a layer, how many hold tensors of the same types and shapes): DeepSeek-V3 has three kinds,
    so that its 46,000 tensors need not be listed."""
    formats: dict[int, list[str]] = {}
    for module, scheme in stored.items():
        if module != HEAD:
            formats.setdefault(layer_of(module), []).append(scheme.label)
    kinds: dict[tuple[object, ...], list[LayerKey]] = {}
    for layer in stored_layers(config, mtp=mtp):
        kind: tuple[object, ...] = (layer,)
        if layer != "globals":
            is_mtp = layer >= config.num_hidden_layers
            kind = config.is_moe(layer), is_mtp, *formats.get(layer, ())
        kinds.setdefault(kind, []).append(layer)
    return [(alike[0], len(alike)) for alike in kinds.values()]
