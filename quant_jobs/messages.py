"""What driver and workers say to each other, beside `calibrate.Statistics` and `Smoothing`.

Apart from `worker.py`, so that the driver need not load transformers' modeling code and modelopt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek.manifest import Fallback
from deepseek.recipe import Recipe


@dataclass(frozen=True, slots=True)
class WorkerJob:
    """What a worker must know to work; `num_blocks` is of the whole job, not of this worker."""

    model: Path
    recipe: Recipe
    num_blocks: int


@dataclass(slots=True)
class Solved:
    """A share of a layer, ready to publish: tensors by full name, errors by module."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    fallbacks: tuple[Fallback, ...] = ()
    source_sha256: str | None = None

    def __reduce__(self) -> tuple[Callable[..., Solved], tuple[Any, ...]]:
        # torch 2.13 pickles a float8 tensor but cannot read it back; its bytes travel instead.
        packed = {
            name: (tensor.view(torch.uint8) if _is_float8(tensor) else tensor, tensor.dtype)
            for name, tensor in self.tensors.items()
        }
        return _unpack, (packed, self.errors, self.fallbacks, self.source_sha256)


def _is_float8(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() == 1


def _unpack(packed: dict[str, tuple[Tensor, torch.dtype]], *rest: Any) -> Solved:
    return Solved({name: tensor.view(dtype) for name, (tensor, dtype) in packed.items()}, *rest)


@dataclass(frozen=True, slots=True)
class Usage:
    """Where this worker's time went, by step, and its peak resident memory."""

    pid: int
    seconds: dict[str, float]
    peak_rss_bytes: int
