"""What driver and workers say to each other, beside `calibrate.Statistics` and `Smoothing`.

Apart from `worker.py`, so that the driver need not load transformers' modeling code and modelopt.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

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


@dataclass(frozen=True, slots=True)
class Usage:
    """Where this worker's time went, by step, and its peak resident memory."""

    pid: int
    seconds: dict[str, float]
    peak_rss_bytes: int
