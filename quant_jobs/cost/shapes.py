"""How a layer is cut for a quantize job, and the bytes of its parts: from shapes alone.

Restates `calibration/units.py` with what the estimate needs of it; a test holds the two equal.

D hidden · I intermediate · K inputs of a linear
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from deepseek.config import ModelConfig
from deepseek.formats import stored_bytes
from deepseek.inventory import TensorSpec, global_tensors, layer_tensors, linears
from deepseek.recipe import Scheme

#: A layer's routed experts are cut into at most this many groups.
EXPERT_GROUPS = 32
F32 = 4

_ATTENTION = (("q_a_proj", "kv_a_proj_with_mqa"), ("q_b_proj",), ("kv_b_proj",), ("o_proj",))


@dataclass(frozen=True, slots=True)
class Unit:
    """What one worker solves: linears of the attention that share an input, or an MLP (gate, up,
    down). A group of routed experts is the linears of its first one, `experts` in number."""

    kind: Literal["attention", "mlp"]
    linears: tuple[TensorSpec, ...]
    experts: int = 0

    @property
    def copies(self) -> int:
        return max(self.experts, 1)

    @property
    def numel(self) -> int:
        return self.copies * sum(spec.numel for spec in self.linears)

    @property
    def is_trunk_mlp(self) -> bool:
        """The shared expert, or the MLP of a dense layer."""
        return self.kind == "mlp" and not self.experts

    @property
    def inputs(self) -> tuple[tuple[TensorSpec, ...], ...]:
        """The linears by the input that they read: gate and up share theirs."""
        return (self.linears,) if self.kind == "attention" else (self.linears[:2], self.linears[2:])


@lru_cache(maxsize=256)
def units(config: ModelConfig, layer: int) -> tuple[Unit, ...]:
    """All units of one decoder layer, in a fixed order."""
    every = linears(config, layer)
    trunk = [spec for spec in every if spec.expert is None]
    found = [
        Unit("attention", tuple(spec for spec in trunk if spec.role in roles))
        for roles in _ATTENTION
    ]
    found.append(Unit("mlp", tuple(spec for spec in trunk if spec.group != "attention")))
    if config.is_moe(layer):
        routed: dict[int, list[TensorSpec]] = {}
        for spec in every:
            if spec.expert is not None:
                routed.setdefault(spec.expert, []).append(spec)
        size = -(-config.n_routed_experts // EXPERT_GROUPS)
        for first in range(0, config.n_routed_experts, size):
            count = min(size, config.n_routed_experts - first)
            found.append(Unit("mlp", tuple(routed[first]), count))
    return tuple(found)


def share_out(config: ModelConfig, layer: int, num_workers: int) -> list[list[Unit]]:
    """The units of each worker: the largest first to whoever has the least."""
    shares: list[list[Unit]] = [[] for _ in range(num_workers)]
    load = [0] * num_workers
    for unit in sorted(units(config, layer), key=lambda unit: -unit.numel):
        worker = load.index(min(load))
        shares[worker].append(unit)
        load[worker] += unit.numel
    return shares


def wanted_together(
    config: ModelConfig, scheme: Callable[[TensorSpec], Scheme], layer: int
) -> Literal["smoothquant", "awq"] | None:
    """What finds the scale that all readers of a MoE layer's MLP input share; None where the recipe
    wants none. AWQ leaves it out when one of them is not AWQ's."""
    if not config.is_moe(layer):
        return None
    asked = {
        scheme(spec).algorithm
        for unit in units(config, layer)
        if unit.kind == "mlp"
        for spec in unit.linears[:2]
    }
    if asked == {"awq"}:
        return "awq"
    return "smoothquant" if asked == {"smoothquant"} else None


@lru_cache(maxsize=256)
def group_numel(config: ModelConfig, layer: int) -> dict[str, int]:
    """Values of one layer by group; 0 for a group that it lacks."""
    found = dict.fromkeys(("attention", "routed_experts", "shared_experts", "dense_mlp"), 0)
    found |= {"router": 0, "norms": 0}
    for spec in layer_tensors(config, layer):
        found[spec.group] += spec.numel
    return found


@lru_cache(maxsize=256)
def layer_source_bytes(config: ModelConfig, layer: int) -> tuple[int, int]:
    """Stored bytes of a source layer: routed experts, and the trunk."""
    specs = list(layer_tensors(config, layer))
    experts = _source_bytes(config, (spec for spec in specs if spec.expert is not None))
    return experts, _source_bytes(config, (spec for spec in specs if spec.expert is None))


def layer_output_bytes(
    config: ModelConfig, scheme: Callable[[TensorSpec], Scheme], layer: int
) -> int:
    """Bytes of the tensors of a quantized layer; its file has a header besides."""
    high = (_high_bytes(spec) for spec in layer_tensors(config, layer) if spec.kind != "linear")
    return sum(high) + sum(
        unit.copies * stored_bytes(scheme(spec), spec.shape[0], spec.shape[1])
        for unit in units(config, layer)
        for spec in unit.linears
    )


@lru_cache(maxsize=16)
def untouched_bytes(config: ModelConfig) -> int:
    """What is carried through as it is: embeddings, final norm, head, MTP layers."""
    mtp = range(config.num_hidden_layers, config.num_layers_with_mtp)
    specs = [*global_tensors(config), *(s for layer in mtp for s in layer_tensors(config, layer))]
    return _source_bytes(config, specs)


def source_bytes(config: ModelConfig) -> int:
    """Bytes of all tensors of the source checkpoint, which a job reads once."""
    layers = (sum(layer_source_bytes(config, n)) for n in range(config.num_hidden_layers))
    return sum(layers) + untouched_bytes(config)


def _source_bytes(config: ModelConfig, specs: Iterable[TensorSpec]) -> int:
    native = Scheme(weights="fp8-block" if config.weight_block_size else "bf16")
    return sum(
        stored_bytes(native, spec.shape[0], spec.shape[1])
        if spec.kind == "linear"
        else _high_bytes(spec)
        for spec in specs
    )


def _high_bytes(spec: TensorSpec) -> int:
    return spec.numel * (F32 if spec.kind == "float32" else 2)
