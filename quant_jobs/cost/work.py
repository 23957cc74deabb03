"""What an estimate of a quantize job counts: the job, loads of workers, steps that are waited for.

No rate is in here (`rates.py`), and no schedule (`layer.py`).

K inputs of a linear
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

from cluster.hardware import GPUS_PER_NODE
from deepseek.config import ModelConfig
from deepseek.errors import DeployError
from deepseek.inventory import TensorSpec
from deepseek.recipe import Recipe, Scheme
from quant_jobs.cost import BLOCK_TOKENS, CALIBRATION_TOKENS
from quant_jobs.cost.shapes import F32, Unit

#: Restated from `quant_jobs` (which this package may not import); a test holds them equal.
WAVE_TOKENS = 1 << 16
WAVE_BLOCKS = 4
SAMPLE_TOKENS = 256
AWQ_CANDIDATES = 20

PIECES = Path(__file__).with_name("pieces.json")

Section = Literal["attend", "solve", "carry"]
Phase = Literal["forward A", "statistics", "solve", "forward B"]


@lru_cache
def pieces() -> dict[str, Any]:
    """What `bench/pieces.py --save` measured and counted, with date and machine."""
    found: dict[str, Any] = json.loads(PIECES.read_text(encoding="utf-8"))
    return found


@dataclass(frozen=True, kw_only=True)
class Job:
    """One quantize job on `nodes` of `per_node` workers. `row_bytes`, the size of an exchanged or
    stored activation, is what the code has now; another value answers what a change would bring."""

    config: ModelConfig
    recipe: Recipe
    nodes: int
    per_node: int = GPUS_PER_NODE
    tokens: int = CALIBRATION_TOKENS
    block_tokens: int = BLOCK_TOKENS
    imbalance: float = 1.0
    row_bytes: int = F32

    def __post_init__(self) -> None:
        if self.nodes < 1:
            raise DeployError(f"--nodes {self.nodes}: at least one node is needed")
        if self.block_tokens < 1:
            raise DeployError(f"--block-tokens {self.block_tokens}: give at least one")
        if self.tokens < self.block_tokens:
            raise DeployError(
                f"--tokens {self.tokens}: give at least one block of {self.block_tokens} tokens"
            )

    @property
    def workers(self) -> int:
        return self.nodes * self.per_node

    @property
    def num_blocks(self) -> int:
        return self.tokens // self.block_tokens

    def scheme(self, spec: TensorSpec) -> Scheme:
        """Of one linear, `source` made concrete."""
        if spec.module not in self._schemes:
            found = self.recipe.scheme_for(spec)
            self._schemes[spec.module] = self._native if found.weights == "source" else found
        return self._schemes[spec.module]

    def gram(self, tokens: float, width: int, additions: float) -> Load:
        """x^T x of so many rows, added up in `additions` parts, each in place: it reads and writes
        the matrix."""
        moved = 2 * F32 * width**2 * additions
        return Load(gram=2 * tokens * width**2, moved=moved, launches=2 * additions)

    @cached_property
    def _schemes(self) -> dict[str, Scheme]:
        return _known_schemes(self.recipe, self.config)

    @cached_property
    def _native(self) -> Scheme:
        return Scheme(weights="fp8-block" if self.config.weight_block_size else "bf16")

    @property
    def sees_all(self) -> bool:
        """Whether every expert is measured on every token."""
        return self.recipe.expert_coverage.policy == "all"

    @property
    def remote(self) -> float:
        """Share of what all workers send that a node gets from others."""
        return (self.nodes - 1) / self.nodes

    @property
    def row(self) -> int:
        """Bytes of one token's activation as it travels."""
        return self.config.hidden_size * self.row_bytes

    @property
    def activation_bytes(self) -> int:
        """Of all tokens at one layer boundary."""
        return self.num_blocks * self.block_tokens * self.row

    @cached_property
    def waves(self) -> tuple[tuple[int, int], ...]:
        """(blocks of a wave, how many such waves)."""
        size = max(WAVE_TOKENS // self.block_tokens, WAVE_BLOCKS * self.workers)
        full, rest = divmod(self.num_blocks, size)
        return tuple(pair for pair in ((size, full), (rest, 1 if rest else 0)) if pair[1])

    def algorithm(self, spec: TensorSpec) -> str:
        return self.scheme(spec).algorithm


@lru_cache(maxsize=8)
def _known_schemes(recipe: Recipe, config: ModelConfig) -> dict[str, Scheme]:
    """By module, as far as anybody has asked; for all jobs of one recipe."""
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one worker does: FLOPs of large products, of Gram matrices, and of Cholesky factors and
    inverses; bytes moved by elementwise kernels; kernels; bytes over PCIe; bytes put into the
    node's object store."""

    matmul: float = 0.0
    gram: float = 0.0
    factor: float = 0.0
    moved: float = 0.0
    launches: float = 0.0
    pcie: float = 0.0
    put: float = 0.0

    def __add__(self, other: Load) -> Load:
        return Load(**{name: getattr(self, name) + getattr(other, name) for name in _WORK})

    def times(self, count: float) -> Load:
        return Load(**{name: count * getattr(self, name) for name in _WORK})


_WORK = tuple(one.name for one in fields(Load))


@dataclass(frozen=True, slots=True)
class Step:
    """Something that the driver waits for `repeat` times: the loads of the workers that differ, by
    phase, the bytes that come into the fullest node, and the rounds of calls that it takes."""

    section: Section
    workers: list[Mapping[Phase, Load]]
    fabric: float = 0.0
    rounds: int = 1
    repeat: int = 1


def per_weight(name: str, numel: float) -> Load:
    """A counted piece on so many weights. Its kernels are few for large weights: not counted."""
    one = pieces()["work"][name]
    share = numel / one["weights"]
    return Load(matmul=one["flops"] * share, moved=one["bytes"] * share)


def observed(tokens: float, width: int) -> Load:
    """Magnitudes of an input, their largest and their sum."""
    return Load(moved=16 * tokens * width)


def gates(share: Iterable[Unit]) -> Iterator[tuple[Unit, TensorSpec]]:
    """gate and up of the MLPs among these units."""
    for unit in share:
        if unit.kind == "mlp":
            yield from ((unit, spec) for spec in unit.linears[:2])


def factor(width: int) -> Load:
    """Cholesky, inverse, Cholesky of one matrix: K^3 / 3 + 2 K^3 / 3 + K^3 / 3."""
    return Load(factor=4 / 3 * width**3, launches=20)


def column_loop(rows: int, width: int, batch: int, searches: int) -> Load:
    """GPTQ's column loop over `batch` weights [rows, width] at once. Behind each block of columns
    all later ones are updated: rows * width^2 FLOPs in all. On its way it searches `searches` times
    for the range of a group: kernels only here, for `per_weight` has their work."""
    work = pieces()["work"]
    one, search = work["gptq"], work["mse_clip"]
    numel = rows * width * batch
    launches = one["launches"] / one["columns"] * width + width / 128 * batch
    return Load(
        matmul=rows * width**2 * batch,
        moved=one["bytes"] / one["weights"] * numel,
        launches=launches + search["launches"] * searches,
    )
