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
from deepseek.inventory import TensorSpec, layer_tensors, linears

#: A layer's routed experts are cut into at most this many groups. On a GPU GPTQ runs a group as one
#: batch (8 experts of DeepSeek-V3's 256); more workers than groups find no more work in a layer.
MAX_EXPERT_GROUPS = 32

MLP_ROLES = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class Unit:
    """Work that is not cut further.

    `attention`: the linears `modules` share one input. `mlp`: `blocks` are MLPs by module name
    (`model.layers.3.mlp.experts.7`), `modules` all of their linears; `experts` are their numbers
    where they are routed experts.
    """

    kind: Literal["attention", "mlp"]
    modules: tuple[str, ...]
    blocks: tuple[str, ...] = ()
    experts: tuple[int, ...] = ()
    numel: int = 0

    def numbered_mlps(self) -> list[tuple[str, int | None]]:
        """Its MLPs by module name, each with the routed expert's number, or None."""
        numbers = self.experts or (None,) * len(self.blocks)
        return list(zip(self.blocks, numbers, strict=True))


def units(config: ModelConfig, layer: int) -> list[Unit]:
    """All units of one decoder layer, in a fixed order."""
    size = {spec.module: spec.numel for spec in linears(config, layer)}
    prefix = f"model.layers.{layer}"

    def unit(
        kind: Literal["attention", "mlp"],
        modules: Sequence[str],
        blocks: Sequence[str] = (),
        experts: Sequence[int] = (),
    ) -> Unit:
        numel = sum(size[module] for module in modules)
        return Unit(kind, tuple(modules), tuple(blocks), tuple(experts), numel)

    def mlp(blocks: Sequence[str], experts: Sequence[int] = ()) -> Unit:
        modules = [f"{block}.{role}" for block in blocks for role in MLP_ROLES]
        return unit("mlp", modules, blocks, experts)

    attention = f"{prefix}.self_attn"
    found = [
        unit("attention", [f"{attention}.q_a_proj", f"{attention}.kv_a_proj_with_mqa"]),
        unit("attention", [f"{attention}.q_b_proj"]),
        unit("attention", [f"{attention}.kv_b_proj"]),
        unit("attention", [f"{attention}.o_proj"]),
    ]
    if not config.is_moe(layer):
        return [*found, mlp([f"{prefix}.mlp"])]
    found.append(mlp([f"{prefix}.mlp.shared_experts"]))
    group = -(-config.n_routed_experts // MAX_EXPERT_GROUPS)
    for first in range(0, config.n_routed_experts, group):
        experts = range(first, min(first + group, config.n_routed_experts))
        found.append(mlp([f"{prefix}.mlp.experts.{expert}" for expert in experts], experts))
    return found


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
