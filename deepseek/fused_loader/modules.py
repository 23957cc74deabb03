"""The modules of one rank of an engine that fuses linears, and the parameters that each has before
they are filled: what `create_weights` of a method registers.

I inputs of a rank · O outputs of a rank · E experts of a rank
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

TILE = 128
#: (shape, type) of a parameter.
Parameter = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True, slots=True)
class Method:
    """How a module is held; no engine has every kind. `group` is the group size along the inputs, 0
    for one scale per output; `scale` the name of its scale parameter; `tiles` the type of the codes
    of a method with one scale per tile, None for the others."""

    kind: Literal["bf16", "wna16", "w8a8", "fp8", "int8-tiles", "w4afp8"]
    bits: int = 0
    group: int = 0
    symmetric: bool = True
    scale: str = "weight_scale"
    tiles: torch.dtype | None = None


BF16 = Method("bf16")


@dataclass(frozen=True, slots=True)
class Part:
    """One of the checkpoint's linears inside a module: its outputs on this rank, and where they
    begin there."""

    role: str
    outputs: int
    first: int


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear of one rank. `cut` is the dimension that is divided over `ways` ranks, None for
    none."""

    name: str
    parts: tuple[Part, ...]
    inputs: int
    method: Method
    cut: int | None
    ways: int
    rank: int

    @property
    def outputs(self) -> int:
        return sum(part.outputs for part in self.parts)

    def module(self, part: Part) -> str:
        """The checkpoint's module that a part is made of."""
        parent = self.name.rpartition(".")[0]
        return f"{parent}.{part.role}" if parent else part.role

    @property
    def scales_whole(self) -> bool:
        """One scale per output is held by all ranks that divide the inputs."""
        return self.method.kind == "wna16" and not self.method.group

    def parameters(self, inputs_whole: int) -> dict[str, Parameter]:
        """What `create_weights` registers."""
        shape, method = (self.outputs, self.inputs), self.method
        if method.tiles is not None:
            return {
                "weight": (shape, method.tiles),
                method.scale: (tiles(shape), torch.float32),
            }
        match method.kind:
            case "bf16":
                return {"weight": (shape, torch.bfloat16)}
            case "w8a8":
                return {
                    "weight": (shape, torch.int8),
                    "weight_scale": ((self.outputs, 1), torch.float32),
                }
        groups = self.inputs // method.group if method.group else 1
        packed = math.ceil(self.inputs * method.bits / 32)
        found: dict[str, Parameter] = {
            "weight_packed": ((self.outputs, packed), torch.int32),
            "weight_scale": ((self.outputs, groups), torch.bfloat16),
            "weight_shape": ((2,), torch.int64),
        }
        if not method.symmetric:
            words = math.ceil(self.outputs * method.bits / 32)
            found["weight_zero_point"] = (words, groups), torch.int32
        return found


@dataclass(frozen=True, slots=True)
class Experts:
    """The routed experts of one rank: `first` is its first expert, `count` how many it holds."""

    name: str
    first: int
    count: int
    hidden: int
    width: int
    method: Method
    ways: int
    rank: int

    def parameters(self) -> dict[str, Parameter]:
        """What `create_weights` registers, by the names below `routed_experts`."""
        both, method = (self.count, 2 * self.width, self.hidden), self.method
        down = self.count, self.hidden, self.width
        if method.tiles is not None:
            side = math.ceil(self.width / TILE)
            across = math.ceil(self.hidden / TILE)
            return {
                "w13_weight": (both, method.tiles),
                "w2_weight": (down, method.tiles),
                f"w13_{method.scale}": ((self.count, 2 * side, across), torch.float32),
                f"w2_{method.scale}": ((self.count, across, side), torch.float32),
            }
        match method.kind:
            case "bf16":
                return {
                    "w13_weight": (both, torch.bfloat16),
                    "w2_weight": (down, torch.bfloat16),
                }
            case "w8a8":
                return {
                    "w13_weight": (both, torch.int8),
                    "w2_weight": (down, torch.int8),
                    "w13_weight_scale": ((self.count, 2 * self.width, 1), torch.float32),
                    "w2_weight_scale": ((self.count, self.hidden, 1), torch.float32),
                }
        per_word = 32 // method.bits
        groups13 = self.hidden // method.group if method.group else 1
        groups2 = self.width // method.group if method.group else 1
        found: dict[str, Parameter] = {
            "w13_weight_packed": ((*both[:2], self.hidden // per_word), torch.int32),
            "w2_weight_packed": ((*down[:2], self.width // per_word), torch.int32),
            "w13_weight_scale": ((*both[:2], groups13), torch.bfloat16),
            "w2_weight_scale": ((*down[:2], groups2), torch.bfloat16),
            "w13_weight_shape": ((self.count, 2), torch.float32),
            "w2_weight_shape": ((self.count, 2), torch.float32),
        }
        if not method.symmetric:
            found["w13_weight_zero_point"] = (
                (self.count, 2 * self.width // per_word, groups13),
                torch.int32,
            )
            found["w2_weight_zero_point"] = (
                (self.count, self.hidden // per_word, groups2),
                torch.int32,
            )
        return found


@dataclass(frozen=True, slots=True)
class Plain:
    """A tensor that no method touches. `rows` of `whole` begin at `first`, where it is divided."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    suffix: str = "weight"
    whole: int | None = None
    first: int = 0


Module = Linear | Experts | Plain


def tiles(shape: tuple[int, int]) -> tuple[int, int]:
    return math.ceil(shape[0] / TILE), math.ceil(shape[1] / TILE)
