"""What an estimate of a quantize job counts: the job, the loads of its workers, and the steps that
the driver waits for.

No rate is in here (`rates.py`), and no schedule (`layer.py`).

K inputs of a linear
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from cluster.hardware import GPUS_PER_NODE
from deepseek.config import ModelConfig
from deepseek.errors import DeployError
from deepseek.inventory import TensorSpec, head_spec
from deepseek.recipe import Recipe, Scheme, source_scheme
from quant_jobs.calibration.units import WAVE_BLOCKS, WAVE_TOKENS, Unit
from quant_jobs.cost import BLOCK_TOKENS, CALIBRATION_TOKENS
from quant_jobs.cost.shapes import F32, counted_inputs, layer_linears

PIECES = Path(__file__).with_name("pieces.json")

Section = Literal["attend", "solve", "carry"]
Phase = Literal["forward A", "statistics", "solve", "forward B"]


@lru_cache
def pieces() -> dict[str, Any]:
    """What `bench/pieces.py --save` measured and counted, with date and machine."""
    measured: dict[str, Any] = json.loads(PIECES.read_text(encoding="utf-8"))
    return measured


@dataclass(frozen=True, kw_only=True)
class Job:
    """One quantize job on `nodes` nodes of `per_node` workers.

    `imbalance` is the busiest expert group's tokens over the mean. `row_bytes`, the size of one
    value of an exchanged or stored activation, is the code's own by default; another value says
    what a change would gain.
    """

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
        if self.block_tokens > self.config.dense_context:
            raise DeployError(
                f"--block-tokens {self.block_tokens} is more than {self.config.context_limit}; "
                "lower it"
            )
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
        """Scheme of one counted linear (`shapes.counted_linears`), `source` made concrete."""
        return self._schemes[spec.module]

    def gram(self, tokens: float, width: int, additions: float) -> Load:
        """x^T x of so many rows, added up in `additions` parts, each in place: it reads and writes
        the matrix."""
        moved = 2 * F32 * width**2 * additions
        return Load(gram=2 * tokens * width**2, moved=moved, launches=2 * additions)

    @cached_property
    def _schemes(self) -> Mapping[str, Scheme]:
        return _counted_schemes(self.recipe, self.config)

    @cached_property
    def head(self) -> Scheme | None:
        """Scheme of the language model's head; None where the recipe leaves it as it is."""
        scheme = self.recipe.scheme_for(head_spec(self.config))
        return scheme if scheme.is_quantized else None

    def is_carried(self, layer: int) -> bool:
        """Whether blocks are carried through the quantized layer: for the next one, or for the head
        behind the last."""
        return layer < self.config.num_hidden_layers - 1 or self.head is not None

    @property
    def sees_all(self) -> bool:
        """Whether every expert is measured on every token."""
        return self.recipe.expert_coverage.policy == "all"

    @property
    def remote(self) -> float:
        """Share of what all workers send to a node that comes from other nodes."""
        return (self.nodes - 1) / self.nodes

    @property
    def row(self) -> int:
        """Bytes of one token's activation as it travels."""
        return self.config.hidden_size * self.row_bytes

    @property
    def activation_bytes(self) -> int:
        """Bytes of all tokens at one layer boundary."""
        return self.num_blocks * self.block_tokens * self.row

    @cached_property
    def waves(self) -> tuple[tuple[int, int], ...]:
        """(blocks of a wave, how many such waves)."""
        size = max(WAVE_TOKENS // self.block_tokens, WAVE_BLOCKS * self.workers)
        full, rest = divmod(self.num_blocks, size)
        return tuple(pair for pair in ((size, full), (rest, 1 if rest else 0)) if pair[1])

    def algorithm(self, spec: TensorSpec) -> str:
        """The algorithm that solves one counted linear."""
        return self.scheme(spec).algorithm


@lru_cache(maxsize=8)
def _counted_schemes(recipe: Recipe, config: ModelConfig) -> Mapping[str, Scheme]:
    """Scheme of every counted linear by module name, `source` made concrete; kept for all jobs of
    one recipe. `Recipe.resolve` would take ten times as long, for every expert, and refuse recipes
    of which an estimate can be made."""
    as_source = source_scheme(config)
    schemes = {}
    for layer in range(config.num_hidden_layers):
        for spec, _ in layer_linears(config, layer):
            scheme = recipe.scheme_for(spec)
            schemes[spec.module] = as_source if scheme.weights == "source" else scheme
    return MappingProxyType(schemes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Work of one worker: FLOPs of large products (`matmul`), of Gram matrices (`gram`), and of
    Cholesky factors and inverses (`factor`); bytes moved by elementwise kernels (`moved`); kernels
    started (`launches`); bytes over PCIe (`pcie`) and into the node's object store (`put`)."""

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


_WORK = tuple(field.name for field in fields(Load))


@dataclass(frozen=True, slots=True)
class Step:
    """A step that the driver waits for `repeat` times.

    `workers` are the loads by phase of the workers that differ, `fabric` the bytes that come into
    the busiest node over the network, `rounds` the rounds of calls.
    """

    section: Section
    workers: list[Mapping[Phase, Load]]
    fabric: float = 0.0
    rounds: int = 1
    repeat: int = 1


def per_weight(name: str, numel: float) -> Load:
    """Load of one counted piece (by its name in `pieces.json`) on `numel` weights. Its kernels are
    few for large weights, and are not counted."""
    piece = pieces()["work"][name]
    share = numel / piece["weights"]
    return Load(matmul=piece["flops"] * share, moved=piece["bytes"] * share)


def observed(tokens: float, width: int) -> Load:
    """Load of taking an input's magnitudes, their largest and their sum per channel."""
    return Load(moved=16 * tokens * width)


def gates(share: Iterable[Unit]) -> Iterator[tuple[Unit, TensorSpec]]:
    """gate and up of the first MLP of each MLP unit, with their unit."""
    for unit in share:
        if unit.kind == "mlp":
            yield from ((unit, spec) for spec in counted_inputs(unit)[0].readers)


def factor(width: int) -> Load:
    """Cholesky, inverse, Cholesky of one matrix: K^3 / 3 + 2 K^3 / 3 + K^3 / 3."""
    return Load(factor=4 / 3 * width**3, launches=20)


def column_loop(rows: int, width: int, batch: int, searches: int) -> Load:
    """GPTQ's column loop over `batch` weights [rows, width] at once.

    After each block of columns all later columns are updated: rows * width^2 FLOPs in all. The loop
    searches the range of a group `searches` times; only the kernels of a search are counted here,
    its other work is counted by `per_weight`.
    """
    work = pieces()["work"]
    loop, search = work["gptq"], work["mse_clip"]
    numel = rows * width * batch
    launches = loop["launches"] / loop["columns"] * width + width / 128 * batch
    return Load(
        matmul=rows * width**2 * batch,
        moved=loop["bytes"] / loop["weights"] * numel,
        launches=launches + search["launches"] * searches,
    )
