"""How TensorRT-LLM's loader cuts a tensor for one rank, without attention data parallelism."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from deepseek.artifact.engine_manifest import RankLayout

#: How a linear is cut: its outputs, its inputs, or not at all.
Cut = Literal["column", "row", "whole"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank stands among those that share a linear: `rank` of `size`."""

    size: int
    rank: int

    def part(self, width: int) -> slice:
        """This rank's part of a dimension: equal parts, rounded up, the last one shorter. A
        dimension of 1 is not cut."""
        if self.size == 1 or width == 1:
            return slice(0, width)
        each = math.ceil(width / self.size)
        return slice(self.rank * each, min((self.rank + 1) * each, width))


WHOLE = Place(1, 0)


@dataclass(frozen=True, slots=True)
class RankPlace:
    """One rank of the layout. Neighboring ranks hold different groups of experts: the place in
    expert parallelism is `rank % ep`, that within an expert is `rank // ep`."""

    layout: RankLayout
    rank: int
    gpus_per_node: int = 8

    @property
    def attention(self) -> Place:
        """Among the ranks that share attention, head and dense layers: all of them."""
        return Place(self.layout.tp, self.rank)

    @property
    def experts(self) -> Place:
        """Among the groups of experts."""
        return Place(self.layout.ep, self.rank % self.layout.ep)

    @property
    def within_expert(self) -> Place:
        """Among the ranks that share each expert of a group."""
        return Place(self.layout.tp // self.layout.ep, self.rank // self.layout.ep)

    def dense_mlp(self, width: int, group_size: int | None) -> Place:
        """Among the ranks that share a dense MLP of `width`: as many of tp as divide it in whole
        groups, within a node; the others hold copies."""
        size = math.gcd(width // (group_size or 1), self.layout.tp)
        if size > self.gpus_per_node:
            size = math.gcd(size, self.gpus_per_node)
        return Place(size, self.rank % size)

    def shared_experts(self, width: int, group_size: int | None) -> Place:
        """The same for the shared experts, which may spread over nodes."""
        size = math.gcd(width // (group_size or 1), self.layout.tp)
        return Place(size, self.rank % size)
