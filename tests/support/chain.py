"""Values that the fixtures of quant_jobs pass to its tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Chain:
    """The folders of one run, in the order in which they were made."""

    source: Path
    checkpoint: Path
    engine: Path
    evaluation: Path


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str
