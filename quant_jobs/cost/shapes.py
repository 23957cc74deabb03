"""Bytes and numbers of weights of a quantize job's parts, from shapes alone.

How a layer is cut is `calibration/units.py`, the job's own. A group of routed experts is counted as
so many times its first expert: all have its shapes, and are taken to have its schemes.

D hidden · I intermediate · K inputs of a linear
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Literal

from deepseek.config import ModelConfig
from deepseek.formats import stored_bytes
from deepseek.inventory import (
    HEAD,
    LinearInput,
    TensorSpec,
    global_tensors,
    head_spec,
    layer_tensors,
)
from deepseek.recipe import Scheme, source_scheme
from quant_jobs.calibration.units import Unit, share_out, units

#: Bytes of a float32 value.
F32 = 4


@lru_cache(maxsize=256)
def layer_units(config: ModelConfig, layer: int) -> tuple[Unit, ...]:
    """The units of one decoder layer; kept, because every estimate asks for the same ones."""
    return tuple(units(config, layer))


@lru_cache(maxsize=256)
def layer_shares(config: ModelConfig, layer: int, num_workers: int) -> tuple[tuple[Unit, ...], ...]:
    """The units of each worker, as the job shares them out; kept likewise."""
    return tuple(tuple(share) for share in share_out(config, layer, num_workers))


def num_copies(unit: Unit) -> int:
    """How many times the unit's first MLP (or its attention linears) is counted."""
    return max(len(unit.experts), 1)


def counted_inputs(unit: Unit) -> tuple[LinearInput, ...]:
    """The inputs of the unit's first MLP, or of its attention linears."""
    first = unit.inputs[0].expert
    return tuple(counted for counted in unit.inputs if counted.expert == first)


def counted_linears(unit: Unit) -> tuple[TensorSpec, ...]:
    """The linears of the unit's first MLP (gate, up, down), or of the attention."""
    return tuple(spec for counted in counted_inputs(unit) for spec in counted.readers)


@lru_cache(maxsize=256)
def layer_linears(config: ModelConfig, layer: int) -> tuple[tuple[TensorSpec, int], ...]:
    """The counted linears of one decoder layer, each with its number of copies."""
    return tuple(
        (spec, num_copies(unit))
        for unit in layer_units(config, layer)
        for spec in counted_linears(unit)
    )


def is_trunk_mlp(unit: Unit) -> bool:
    """Whether the unit is the shared expert, or the MLP of a dense layer."""
    return unit.kind == "mlp" and not unit.experts


def mlp_scale_algorithm(
    config: ModelConfig, scheme: Callable[[TensorSpec], Scheme], layer: int
) -> Literal["smoothquant", "awq"] | None:
    """The algorithm of the smoothing scale that all readers of a MoE layer's MLP input share; None
    where the recipe asks for none. AWQ leaves it out when one of them is not AWQ's."""
    if not config.is_moe(layer):
        return None
    algorithms = {
        scheme(spec).algorithm
        for unit in layer_units(config, layer)
        if unit.kind == "mlp"
        for spec in counted_inputs(unit)[0].readers
    }
    if algorithms == {"awq"}:
        return "awq"
    return "smoothquant" if algorithms == {"smoothquant"} else None


@lru_cache(maxsize=256)
def group_numel(config: ModelConfig, layer: int) -> Mapping[str, int]:
    """Number of values of one layer by group; 0 for a group that it lacks."""
    numel = dict.fromkeys(("attention", "routed_experts", "shared_experts", "dense_mlp"), 0)
    numel |= {"router": 0, "norms": 0, "indexer": 0}
    for spec in layer_tensors(config, layer):
        numel[spec.group] += spec.numel
    return MappingProxyType(numel)


@lru_cache(maxsize=256)
def layer_source_bytes(config: ModelConfig, layer: int) -> tuple[int, int]:
    """Stored bytes of a source layer: (routed experts, trunk)."""
    specs = list(layer_tensors(config, layer))
    experts = _source_bytes(config, (spec for spec in specs if spec.expert is not None))
    return experts, _source_bytes(config, (spec for spec in specs if spec.expert is None))


def layer_output_bytes(
    config: ModelConfig, scheme: Callable[[TensorSpec], Scheme], layer: int
) -> int:
    """Bytes of the tensors of a quantized layer; its file has a header besides."""
    specs = list(layer_tensors(config, layer))
    copied = _source_bytes(config, (spec for spec in specs if spec.is_indexer))
    high = (s for s in specs if s.kind != "linear" and not s.is_indexer)
    return (
        copied
        + sum(map(_high_bytes, high))
        + sum(
            copies * stored_bytes(scheme(spec), spec.shape[0], spec.shape[1])
            for spec, copies in layer_linears(config, layer)
        )
    )


@lru_cache(maxsize=16)
def mtp_bytes(config: ModelConfig) -> int:
    """Bytes of the MTP layers, which the job copies as the source stores them."""
    mtp = range(config.num_hidden_layers, config.num_layers_with_mtp)
    return _source_bytes(config, (s for layer in mtp for s in layer_tensors(config, layer)))


@lru_cache(maxsize=16)
def globals_source_bytes(config: ModelConfig) -> int:
    """Stored bytes of the source outside of layers: embeddings, final norm, head."""
    return _source_bytes(config, global_tensors(config))


def globals_output_bytes(config: ModelConfig, head: Scheme | None) -> int:
    """Bytes of the same tensors in the artifact. `head` is the head's scheme where the recipe
    quantizes it; None: it is copied."""
    if head is None:
        return globals_source_bytes(config)
    others = (spec for spec in global_tensors(config) if spec.module != HEAD)
    rows, width = head_spec(config).shape
    return _source_bytes(config, others) + stored_bytes(head, rows, width)


def source_bytes(config: ModelConfig) -> int:
    """Bytes of all tensors of the source checkpoint, which a job reads once."""
    layers = (sum(layer_source_bytes(config, n)) for n in range(config.num_hidden_layers))
    return sum(layers) + mtp_bytes(config) + globals_source_bytes(config)


def _source_bytes(config: ModelConfig, specs: Iterable[TensorSpec]) -> int:
    scheme = source_scheme(config)
    return sum(
        stored_bytes(scheme, spec.shape[0], spec.shape[1])
        if spec.kind == "linear"
        else _high_bytes(spec)
        for spec in specs
    )


def _high_bytes(spec: TensorSpec) -> int:
    return spec.numel * (F32 if spec.kind == "float32" else 2)
