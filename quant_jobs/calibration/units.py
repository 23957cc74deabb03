"""Units: how the work on a layer is divided among workers. Arithmetic on the inventory only.

The *trunk* of a layer is everything but the routed experts: attention, indexer, norms, router,
shared expert or dense MLP. One worker reads it and sends a copy to every worker, because every
worker runs its blocks through it. A routed expert is read by its owner alone, so a cluster reads
each byte of a layer once. Called by `job/layer_steps.py`, `workers/` and `cost/`.

A *unit* is what one worker solves: the attention linears that share an input, one whole MLP, or a
group of routed experts. Units do not depend on the number of workers; only `share_out`, which gives
each unit to a worker, does. So a unit's result is the same on every worker. The indexer is in no
unit: it is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from deepseek.config import ModelConfig
from deepseek.inventory import LinearInput, TensorSpec, layer_inputs, layer_tensors

#: The routed experts of a layer form at most this many groups. On a GPU, GPTQ solves a group as one
#: batch (8 of DeepSeek-V3's 256 experts). Workers beyond this number have no experts to solve.
MAX_EXPERT_GROUPS = 32

#: Calibration blocks go through a layer in waves of this many tokens, or this many blocks per
#: worker if that is more: with fewer, the other workers would idle while one computes.
WAVE_TOKENS = 1 << 16
WAVE_BLOCKS = 4


@dataclass(frozen=True, slots=True)
class Unit:
    """The smallest piece of work: some inputs of a layer with all linears that read them.

    `attention`: one input. `mlp`: both inputs of one MLP, or of each MLP in a group of routed
    experts, one MLP after the other.
    """

    kind: Literal["attention", "mlp"]
    inputs: tuple[LinearInput, ...]

    @property
    def modules(self) -> tuple[str, ...]:
        """Module names of the linears."""
        return tuple(module for linear_input in self.inputs for module in linear_input.modules)

    @property
    def mlps(self) -> tuple[str, ...]:
        """Module names of the MLPs (`model.layers.3.mlp.experts.7`); none in the attention."""
        if self.kind == "attention":
            return ()
        return tuple(dict.fromkeys(linear_input.parent for linear_input in self.inputs))

    @property
    def experts(self) -> tuple[int, ...]:
        """Numbers of the routed experts; empty for attention, shared expert and dense MLP."""
        numbers = (linear_input.expert for linear_input in self.inputs)
        return tuple(dict.fromkeys(number for number in numbers if number is not None))

    @property
    def numel(self) -> int:
        """Number of weights of the linears."""
        return sum(spec.numel for linear_input in self.inputs for spec in linear_input.readers)

    def numbered_mlps(self) -> list[tuple[str, int | None]]:
        """Module names of the MLPs, each with the routed expert's number, or None."""
        numbers = self.experts or (None,) * len(self.mlps)
        return list(zip(self.mlps, numbers, strict=True))


def units(config: ModelConfig, layer: int) -> list[Unit]:
    """All units of one decoder layer, in a fixed order: attention, the dense MLP or shared expert,
    groups of routed experts."""
    attention: list[Unit] = []
    trunk_mlp: list[LinearInput] = []
    routed: dict[int, list[LinearInput]] = {}
    group_size = -(-config.n_routed_experts // MAX_EXPERT_GROUPS)
    for linear_input in layer_inputs(config, layer):
        if linear_input.is_attention:
            attention.append(Unit("attention", (linear_input,)))
        elif linear_input.expert is None:
            trunk_mlp.append(linear_input)
        else:
            routed.setdefault(linear_input.expert // group_size, []).append(linear_input)
    mlps = [trunk_mlp, *routed.values()]
    return [*attention, *(Unit("mlp", tuple(inputs)) for inputs in mlps)]


def share_out(config: ModelConfig, layer: int, num_workers: int) -> list[list[Unit]]:
    """The units of each worker, in the order of `units`. Assigns the largest unit first, each to
    the worker with the fewest weights so far."""
    layer_units = units(config, layer)
    indices: list[list[int]] = [[] for _ in range(num_workers)]
    load = [0] * num_workers  # weights of each worker
    sizes = [unit.numel for unit in layer_units]
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        worker = load.index(min(load))
        indices[worker].append(index)
        load[worker] += sizes[index]
    return [[layer_units[index] for index in sorted(share)] for share in indices]


def trunk_specs(config: ModelConfig, layer: int) -> list[TensorSpec]:
    """The tensors of a layer's trunk."""
    return [spec for spec in layer_tensors(config, layer) if spec.expert is None]


def expert_specs(config: ModelConfig, layer: int, share: Sequence[Unit]) -> list[TensorSpec]:
    """The tensors of the routed experts in a worker's share of the units."""
    experts = {expert for unit in share for expert in unit.experts}
    return [spec for spec in layer_tensors(config, layer) if spec.expert in experts]


def trunk_reader(layer: int, num_workers: int) -> int:
    """The index of the worker that reads the trunk; workers take turns, layer by layer."""
    return layer % num_workers
