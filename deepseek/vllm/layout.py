"""The tensors of a vLLM engine directory: names, types and shapes, from shapes alone.

The directory is a Hugging Face checkpoint, one file per decoder layer. Names and codes are those of
compressed-tensors, as the quantized checkpoint has them, but for one thing: vLLM holds the scales
of packed weights in its model dtype (`params_dtype` in `compressed_tensors_wNa16.py` and
`compressed_tensors_moe_wna16.py`), so that they are BF16 here and nothing is left for it to round.

    format             stored tensors of one linear, [N, K]
    INT4, INT4 asym    weight_packed I32 [N, K/8]; weight_scale BF16 [N, K/group]; weight_shape I64
                       [2]; with zero points weight_zero_point I32 [N/8, K/group]
    INT8, INT8 asym    weight_packed I32 [N, K/4]; weight_scale BF16 [N, 1]; weight_shape I64 [2];
                       with zero points weight_zero_point I32 [N/4, 1]
    INT8 with INT8     weight I8 [N, K]; weight_scale F32 [N, 1]
      inputs
    FP8 tiles          weight F8_E4M3 [N, K]; weight_scale F32 [N/128, K/128], in a release
                       weight_scale_inv
    BF16               weight BF16 [N, K]

The head is BF16, or stored as a linear where the recipe quantizes it.

This file imports no torch: the planner and the byte table use it too.

N outputs · K inputs
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping

from deepseek.artifact.engine_manifest import RankLayout
from deepseek.artifact.layout import StoredTensor, stored_layers
from deepseek.artifact.manifest import LayerKey
from deepseek.config import ModelConfig
from deepseek.inventory import (
    HEAD,
    TensorSpec,
    global_tensors,
    is_within,
    layer_of,
    layer_tensors,
)
from deepseek.recipe import Scheme

#: Edge of an FP8 tile.
TILE = 128
#: `DEFAULT_VOCAB_PADDING_SIZE`: embedding and head are padded to a multiple of it, then divided.
VOCAB_PADDING = 64
#: What an MTP layer holds of the main model's own; its loader reads them once more.
MTP_COPIES = (".embed_tokens.weight", ".shared_head.head.weight")
#: Linears that are fused into one that every rank holds whole.
_WHOLE_ROLES = frozenset({"q_a_proj", "kv_a_proj_with_mqa"})


def stored_schemes(
    config: ModelConfig, schemes: Mapping[str, Scheme], *, mtp: bool = False
) -> dict[str, Scheme]:
    """The scheme of every linear as the directory stores it, without layers that it leaves out."""
    layers = config.num_layers_with_mtp if mtp else config.num_hidden_layers
    return {module: scheme for module, scheme in schemes.items() if is_within(module, layers)}


def stored_tensors(
    config: ModelConfig,
    stored: Mapping[str, Scheme],
    layer: LayerKey,
    *,
    released: bool = False,
) -> dict[str, StoredTensor]:
    """Every tensor of one file by full name; `stored` is what `stored_schemes` returned. A source
    as it is (`released`) calls the scales of its FP8 tiles `weight_scale_inv`.

    What is not a linear has the type of the release, BF16 or F32; a source may store another.
    """
    specs = global_tensors(config) if layer == "globals" else layer_tensors(config, layer)
    return {
        f"{spec.module}.{suffix}" if spec.module in stored else spec.name: StoredTensor(
            dtype, shape, spec, suffix
        )
        for spec in specs
        for suffix, dtype, shape in _parts(spec, stored, released)
    }


def _parts(
    spec: TensorSpec, stored: Mapping[str, Scheme], released: bool
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(suffix, type, shape) of each tensor that a tensor of the model is stored as."""
    if spec.module not in stored:
        yield spec.role, "F32" if spec.kind == "float32" else "BF16", spec.shape
        return
    outputs, inputs = spec.shape
    scheme = stored[spec.module]
    match scheme.weights:
        case "int4" | "int4-asym":
            assert scheme.group_size is not None, spec.module
            groups = math.ceil(inputs / scheme.group_size)
            yield "weight_packed", "I32", (outputs, math.ceil(inputs / 8))
            yield "weight_scale", "BF16", (outputs, groups)
            yield "weight_shape", "I64", (2,)
            if not scheme.is_symmetric:
                yield "weight_zero_point", "I32", (math.ceil(outputs / 8), groups)
        case "int8" if scheme.activations == "int8":
            yield "weight", "I8", (outputs, inputs)
            yield "weight_scale", "F32", (outputs, 1)
        case "int8" | "int8-asym":
            yield "weight_packed", "I32", (outputs, math.ceil(inputs / 4))
            yield "weight_scale", "BF16", (outputs, 1)
            yield "weight_shape", "I64", (2,)
            if not scheme.is_symmetric:
                yield "weight_zero_point", "I32", (math.ceil(outputs / 4), 1)
        case "fp8-block":
            yield "weight", "F8_E4M3", (outputs, inputs)
            scale = "weight_scale_inv" if released else "weight_scale"
            yield scale, "F32", (math.ceil(outputs / TILE), math.ceil(inputs / TILE))
        case "bf16":
            yield "weight", "BF16", (outputs, inputs)
        case weights:
            raise AssertionError(f"{spec.module}: {weights} has no form in vLLM")


def rank_weight_bytes(
    config: ModelConfig, stored: Mapping[str, Scheme], ranks: RankLayout, *, mtp: bool = False
) -> tuple[int, ...]:
    """Bytes of weights that each rank holds of what the directory stores.

    Attention, MLPs, embedding and head are divided over all ranks, `q_a_proj` and
    `kv_a_proj_with_mqa` held whole by each. Routed experts are divided by expert with expert
    parallelism and inside each expert without; both divide by all ranks. Padding of the vocabulary
    and the BF16 copy of kv_b_proj by head are the runtime's, as the planner's workspace counts the
    latter.
    """
    divided: Counter[int] = Counter()  # number of ranks -> bytes that are divided among as many
    for layer, count in _kinds_of_layers(config, stored, mtp):
        for tensor in stored_tensors(config, stored, layer).values():
            divided[_ways(tensor, ranks)] += count * tensor.num_bytes
    return (sum(-(-size // share) for share, size in divided.items()),) * ranks.tp


def _ways(tensor: StoredTensor, ranks: RankLayout) -> int:
    """Over how many ranks a stored tensor is divided; the others hold copies."""
    spec = tensor.spec
    if tensor.suffix == "weight_shape":
        return ranks.ep if spec.split == "expert" else 1
    if spec.name.endswith(("embed_tokens.weight", "lm_head.weight", "shared_head.head.weight")):
        return ranks.tp
    if spec.role in _WHOLE_ROLES or spec.split == "replicated":
        return 1
    by_channel = tensor.suffix in ("weight_scale", "weight_zero_point") and tensor.shape[1] == 1
    if by_channel and spec.role in ("down_proj", "o_proj"):  # cut along inputs, which it has not
        return ranks.ep if spec.split == "expert" else 1
    return ranks.tp


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
            formats.setdefault(layer_of(module), []).append(scheme.label)
    kinds: dict[tuple[object, ...], list[LayerKey]] = {}
    for layer in stored_layers(config, mtp=mtp):
        kind: tuple[object, ...] = (layer,)
        if layer != "globals":
            is_mtp = layer >= config.num_hidden_layers
            kind = config.is_moe(layer), is_mtp, *formats.get(layer, ())
        kinds.setdefault(kind, []).append(layer)
    return [(alike[0], len(alike)) for alike in kinds.values()]
