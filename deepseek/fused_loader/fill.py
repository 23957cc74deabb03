"""How one tensor of the checkpoint is copied into a parameter of a rank.

Linears take the first rows of a tensor that has too many. Experts copy by `Tensor.copy_`, which
repeats a dimension of 1 and converts any type. Both engines say nothing of it; it is noted here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deepseek.artifact.loader_files import Checkpoint, LoaderRefusal
from deepseek.fused_loader.modules import TILE, Experts, Linear, Part, Plain

#: Types that may stand for each other in what no method touches.
_HIGH = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(slots=True)
class Filler(ABC):
    """Copies for one rank. `silent` maps a key to what the engine does to it without a word
    although it is wrong."""

    checkpoint: Checkpoint
    silent: dict[str, str] = field(default_factory=dict)

    @abstractmethod
    def fit(self, data: Tensor, shape: list[int], dim: int) -> Tensor:
        """The part of an expert's parameter that a tensor of `shape`, cut along `dim`, is copied
        into, where it is smaller than meant."""

    def rounds_later(self, module: Experts, suffix: str) -> bool:
        """Whether a parameter of experts changes its type on purpose after it is read."""
        return False

    def plain(self, key: str, module: Plain, parameter: Tensor) -> None:
        """Fill what no method touches: whole, or the rank's rows of a vocabulary."""
        shape = self.checkpoint.entry(key).shape
        if module.whole is None:
            if tuple(shape) != tuple(parameter.shape):
                raise self.wrong(key, tuple(parameter.shape))
            self._typed(key, parameter, loose=True)
            parameter.copy_(self.checkpoint.take(key))
            return
        whole = (module.whole, *parameter.shape[1:])
        if tuple(shape) != whole:
            raise self.wrong(key, whole)
        begin = min(module.first, module.whole)
        rows = slice(begin, min(module.first + parameter.shape[0], module.whole))
        self._typed(key, parameter, loose=True)
        part = self.checkpoint.take(key, 0, rows)
        parameter[: part.shape[0]].copy_(part)
        parameter[part.shape[0] :].zero_()

    def linear(self, key: str, module: Linear, part: Part, suffix: str, parameter: Tensor) -> None:
        """Fill the part of a linear that a tensor of the checkpoint is."""
        if suffix == "weight_shape":
            if tuple(self.checkpoint.entry(key).shape) != (2,):
                raise self.wrong(key, (2,))
            parameter.copy_(self.checkpoint.take(key))
            return
        shape = list(self.checkpoint.entry(key).shape)
        first, size = self._rows(module, part, suffix)
        target = parameter.narrow(0, first, size)
        wanted = list(target.shape)
        by_input = module.cut == 1 and not (suffix != "weight_packed" and module.scales_whole)
        by_input &= not (module.method.kind == "w8a8" and suffix == "weight_scale")
        if len(shape) != 2:
            raise self.wrong(key, tuple(wanted))
        dim = 0 if module.cut != 1 else 1
        ways = module.ways if dim == 0 or by_input else 1
        begin = module.rank * wanted[dim] if ways > 1 else 0
        other = 1 - dim
        whole = list(wanted)
        whole[dim] *= ways
        # a row-parallel parameter without inputs, and one that no rank divides, must fit exactly
        exact = dim == 1 and not by_input
        too_short = shape[dim] < begin + wanted[dim]
        if shape[other] != wanted[other] or too_short or (exact and shape != wanted):
            raise self.wrong(key, tuple(whole))
        if shape[dim] != whole[dim]:
            self.note(
                key,
                f"has {shape[dim]} {_DIMS[dim]} where {whole[dim]} are meant, of which "
                "the others are never read",
            )
        self._typed(key, parameter)
        target.copy_(self.checkpoint.take(key, dim, slice(begin, begin + wanted[dim])))

    def expert(
        self, key: str, module: Experts, index: int, role: str, suffix: str, parameter: Tensor
    ) -> None:
        """Fill one projection of one expert; `index` is its place on the rank."""
        data = parameter[index]
        tensor = self.checkpoint.peek(key)
        if suffix == "weight_shape":
            if tensor.numel() not in (1, data.numel()):
                raise self.wrong(key, tuple(data.shape))
            data.copy_(self.checkpoint.take(key).reshape(-1))
            return
        dim = 1 if role == "down_proj" else 0
        by_channel = suffix == "weight_scale" and (
            module.method.kind == "w8a8"
            or (module.method.kind == "wna16" and not module.method.group)
        )
        divided = not (by_channel and role == "down_proj")
        wanted = list(data.shape)
        if role != "down_proj":
            half = data.shape[0] // 2
            wanted[0] = half
            data = data.narrow(0, 0 if role == "gate_proj" else half, half)
        whole = list(wanted)
        if divided:
            whole[dim] *= module.ways
        shape = list(tensor.shape)
        if tensor.dim() != 2:
            raise self.wrong(key, tuple(whole))
        begin, count = 0, shape[dim]
        if divided:
            count = shape[dim] // module.ways
            begin = count * module.rank
        part = slice(begin, begin + count)
        narrowed = list(shape)
        narrowed[dim] = count
        data = self.fit(data, narrowed, dim)
        if any(narrowed[each] not in (1, data.shape[each]) for each in (0, 1)):
            raise self.wrong(key, tuple(whole))
        if shape != whole:
            self.note(
                key,
                f"has the shape {shape} where {whole} is meant, and is copied into a "
                "part of the parameter",
            )
        self._typed(key, parameter, loose=self.rounds_later(module, suffix))
        data.copy_(self.checkpoint.take(key, dim, part))

    def _rows(self, module: Linear, part: Part, suffix: str) -> tuple[int, int]:
        """Where a part's rows of a parameter begin, and how many they are."""
        first, size = part.first, part.outputs
        if module.method.tiles is not None and suffix == module.method.scale:
            return math.ceil(first / TILE), math.ceil(size / TILE)
        if suffix == "weight_zero_point":
            per_word = 32 // module.method.bits
            return first // per_word, math.ceil(size / per_word)
        return first, size

    def _typed(self, key: str, parameter: Tensor, *, loose: bool = False) -> None:
        dtype = self.checkpoint.entry(key).dtype
        if dtype != parameter.dtype and not (loose and dtype in _HIGH):
            self.note(key, f"is {dtype}, converted to {parameter.dtype}".replace("torch.", ""))

    def note(self, key: str, what: str) -> None:
        """Note what the engine does to a key in silence: the first thing counts."""
        self.silent.setdefault(key, what)

    def wrong(self, key: str, wanted: tuple[int, ...]) -> LoaderRefusal:
        """The refusal of a tensor whose shape is not what is wanted."""
        shape = list(self.checkpoint.entry(key).shape)
        return LoaderRefusal(
            f"{self.checkpoint.directory}: tensor {key} has the shape {shape}, where "
            f"{self.checkpoint.loader} takes {list(wanted)}"
        )


_DIMS = ("rows", "columns")
