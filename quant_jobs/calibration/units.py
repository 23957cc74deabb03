"""How a layer is cut for sharing: who reads, measures and solves what.

The *trunk* is all that is not a routed expert: attention, norms, router, shared expert or dense
MLP. One worker reads it and every worker gets a copy, for every worker runs its blocks through it.
Routed experts are read by their owner alone, so that a cluster reads each byte of a layer once.

A *unit* is what one worker solves: the linears of the trunk that share an input, one whole MLP, or
a group of routed experts. Units do not depend on the number of workers; only `share_out`, which
gives each to somebody, does. Whatever is computed for a unit is therefore the same wherever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from deepseek.config import ModelConfig
from deepseek.inventory import MLP_ROLES as MLP_ROLES
from deepseek.inventory import LinearInput, TensorSpec, layer_inputs, layer_tensors

#: A layer's routed experts are cut into at most this many groups. On a GPU GPTQ runs a group as one
#: batch (8 experts of DeepSeek-V3's 256); more workers than groups find no more work in a layer.
MAX_EXPERT_GROUPS = 32

#: Calibration blocks go through a layer in waves of so many tokens, or of so many blocks of each
#: worker where that is more: with fewer, a cluster would wait for the worker whose turn it is.
WAVE_TOKENS = 1 << 16
WAVE_BLOCKS = 4


@dataclass(frozen=True, slots=True)
class Unit:
    """Work that is not cut further: some inputs of a layer with all linears that read them.

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
    def blocks(self) -> tuple[str, ...]:
        """Module names of the MLPs (`model.layers.3.mlp.experts.7`); none in the attention."""
        if self.kind == "attention":
            return ()
        return tuple(dict.fromkeys(linear_input.parent for linear_input in self.inputs))

    @property
    def experts(self) -> tuple[int, ...]:
        """Numbers of the MLPs where they are routed experts."""
        numbers = (linear_input.expert for linear_input in self.inputs)
        return tuple(dict.fromkeys(number for number in numbers if number is not None))

    @property
    def numel(self) -> int:
        """Weights of the linears."""
        return sum(spec.numel for linear_input in self.inputs for spec in linear_input.readers)


def units(config: ModelConfig, layer: int) -> list[Unit]:
    """All units of one decoder layer, in a fixed order: attention, the MLP that every token passes
    (dense or shared expert), groups of routed experts."""
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
    """The units of each worker: the largest first to whoever has the least."""
    shares: list[list[Unit]] = [[] for _ in range(num_workers)]
    load = [0] * num_workers
    every = units(config, layer)
    for index in sorted(range(len(every)), key=lambda index: (-every[index].numel, index)):
        worker = load.index(min(load))
        shares[worker].append(every[index])
        load[worker] += every[index].numel
    order = {unit: index for index, unit in enumerate(every)}
    return [sorted(share, key=order.__getitem__) for share in shares]


def trunk_specs(config: ModelConfig, layer: int) -> list[TensorSpec]:
    """The tensors of a layer that are not a routed expert's."""
    return [spec for spec in layer_tensors(config, layer) if spec.expert is None]


def expert_specs(config: ModelConfig, layer: int, share: Sequence[Unit]) -> list[TensorSpec]:
    """The tensors of the routed experts of a worker's share."""
    mine = {expert for unit in share for expert in unit.experts}
    return [spec for spec in layer_tensors(config, layer) if spec.expert in mine]


def trunk_reader(layer: int, num_workers: int) -> int:
    """The worker that reads the trunk: each in its turn."""
    return layer % num_workers
