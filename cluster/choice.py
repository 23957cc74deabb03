"""Which target a plan is for, and what each target holds of a recipe: bytes, and what it refuses.

`Asked` is a question about any target; answers that depend on the recipe alone are cached, because
`better_recipes` and the generated pages ask the same many times.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from cluster.deployability import (
    Findings,
    cells_of,
    examine,
    require_engine_version,
    require_target,
    served_schemes,
)
from cluster.hardware import GpuGeneration, Machines
from cluster.layouts import dialect_refusals, fitting_dialects
from cluster.matrix import DIALECTS, KV_CACHE, Refusal, Target
from cluster.memory import Footprint, Tally
from cluster.splits import split_notes, split_refusals, trtllm_refusals
from deepseek.config import ModelConfig
from deepseek.errors import DeployError
from deepseek.recipe import Recipe
from deepseek.trtllm.layout import Dialect, stored_schemes
from deepseek.trtllm.versions import EngineVersion, require_version
from deepseek.untrusted import show_name

#: In this order `auto` takes the first target that loads the recipe. transformers is not among
#: them: it dequantizes everything and has no batching, so that it is for looking and comparing.
GPU_TARGETS: tuple[Target, ...] = ("trtllm", "vllm", "sglang")
#: Why a target has no MTP layer.
_NO_MTP: dict[Target, str] = {
    "embedded": "the embedded engine does not speculate yet",
    "transformers": "its DeepSeek-V3 leaves that layer out",
}


@lru_cache(maxsize=32)
def tally_of(config: ModelConfig, recipe: Recipe) -> Tally:
    """The tensors of a model under a recipe, counted; the one slow step of a plan (a second)."""
    schemes = recipe.resolve(config)
    recipe.check_rules(config)
    return Tally(config, schemes)


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be planned, whatever the target. `dialect` and `engine_version` are as given."""

    config: ModelConfig
    recipe: Recipe
    machines: Machines
    mtp: bool
    dialect: str | None
    engine_version: str | None

    @property
    def trtllm_dialect(self) -> Dialect:
        """The dialect on target trtllm. A recipe that quantizes nothing is a release there."""
        schemes = tally_of(self.config, self.recipe).schemes
        if not any(scheme.is_quantized for scheme in schemes.values()):
            return "released"
        return "single" if self.dialect == "single" else "mixed"

    def dialect_on(self, target: Target) -> str | None:
        """The dialect that the plan is for, None for a target without any."""
        if target == "trtllm":
            return self.trtllm_dialect
        if target not in DIALECTS:
            return None
        generation = self.machines.hardware.generation
        fitting = fitting_dialects(self._linears(), target, generation)
        return self.dialect or next(iter(fitting), None)

    def version_on(self, target: Target) -> str:
        """The version of the target that the plan is for.

        Raises:
            DeployError: it is unknown.
        """
        return require_engine_version(target, self.engine_version)

    def footprint(
        self, target: Target, machines: Machines, dialect: Dialect | None = None
    ) -> Footprint:
        """Bytes on these machines, which may be other than those asked for."""
        tally, kv_cache = tally_of(self.config, self.recipe), self.recipe.kv_cache
        if target == "transformers":
            return tally.dequantized_footprint(max(1, machines.num_gpus))
        if not machines.hardware.is_gpu:
            return tally.embedded_footprint(kv_cache)
        stored = (dialect or self.trtllm_dialect) if target == "trtllm" else "mixed"
        return _stored_tally(self.config, self.recipe, stored).gpu_footprint(
            machines.count, kv_cache, mtp=self.mtp, target=target
        )

    def format_findings(self, target: Target) -> Findings:
        """What the matrix says of the recipe's formats."""
        return _format_findings(
            self.config,
            self.recipe,
            target,
            self.machines.hardware.generation,
            self.mtp,
            self.version_on(target),
        )

    def _linears(self) -> list[tuple[str, str]]:
        """Part and format of the served linears."""
        schemes = tally_of(self.config, self.recipe).schemes
        used = cells_of(served_schemes(self.config, schemes, mtp=self.mtp), self.recipe.kv_cache)
        return [(part, form) for part, form in used if part != KV_CACHE]

    def trtllm_refusals(self, dialect: Dialect) -> tuple[Refusal, ...]:
        """What TensorRT-LLM refuses of a dialect on these GPUs."""
        version = require_version(self.version_on("trtllm"))
        return _trtllm_refusals(
            self.config, self.recipe, dialect, self.machines.num_gpus, self.mtp, version
        )

    def findings(self, target: Target) -> Findings:
        """All that the target refuses, and its notes."""
        found = self.format_findings(target)
        if found.refusals or target == "embedded":
            return found
        tally, gpus = tally_of(self.config, self.recipe), self.machines.num_gpus
        if target == "trtllm":
            refusals = self.trtllm_refusals(self.trtllm_dialect)
        else:
            refusals = tuple(split_refusals(tally, target, gpus)) if gpus else ()
        if self.dialect is not None and target in DIALECTS and target != "trtllm":
            generation = self.machines.hardware.generation
            refusals += tuple(dialect_refusals(self._linears(), target, generation, self.dialect))
        notes = split_notes(tally, target, gpus)
        return Findings(refusals, (*found.notes, *notes), found.rows, found.evidence)


def require_plan_dialect(target: str, dialect: str | None) -> None:
    """Check `--dialect` against `--target`, which may be `auto`.

    Raises:
        DeployError: no such dialect, or none of this target.
    """
    if dialect is None:
        return
    known = {name for names in DIALECTS.values() for name in names}
    if target == "auto":
        if dialect not in known:
            of = "; ".join(f"{name}: {', '.join(DIALECTS[name])}" for name in DIALECTS)
            raise DeployError(f"--dialect {show_name(dialect)} is unknown; use one of {of}")
        return
    names = DIALECTS.get(require_target(target), ())
    if not names:
        raise DeployError(
            f"--dialect is of --target {' and '.join(DIALECTS)}; leave it out for {target}"
        )
    if dialect not in names:
        raise DeployError(
            f"--dialect {show_name(dialect)} is none of {target}'s; use {', '.join(names[:-1])} or "
            f"{names[-1]}"
        )


def choose(asked: Asked, target: str) -> tuple[Target, bool, tuple[Refusal, ...], tuple[str, ...]]:
    """(target, whether it loads, refusals of the targets that were tried, notes of the target)."""
    candidates: tuple[Target, ...]
    if target != "auto":
        candidates = (require_target(target),)
    else:
        candidates = GPU_TARGETS if asked.machines.hardware.is_gpu else ("embedded",)
    met: list[Refusal] = []
    for candidate in candidates:
        findings = asked.findings(candidate)
        refusals = [*findings.refusals, *_mtp_refusals(candidate, asked.mtp)]
        met += refusals
        if not refusals:
            return candidate, True, tuple(met), findings.notes
    return candidates[0], False, tuple(met), ()


@lru_cache(maxsize=32)
def _stored_tally(config: ModelConfig, recipe: Recipe, dialect: Dialect) -> Tally:
    """The tensors as an engine holds them: as the artifact does, but in the dialect single, where
    every linear but the routed experts is BF16."""
    if dialect != "single":
        return tally_of(config, recipe)
    schemes = tally_of(config, recipe).schemes
    return Tally(config, stored_schemes(config, schemes, dialect, mtp=True))


@lru_cache(maxsize=128)
def _format_findings(
    config: ModelConfig,
    recipe: Recipe,
    target: Target,
    gpu: GpuGeneration,
    mtp: bool,
    version: str,
) -> Findings:
    schemes = served_schemes(config, tally_of(config, recipe).schemes, mtp=mtp)
    return examine(schemes, recipe.kv_cache, target, gpu, version)


@lru_cache(maxsize=128)
def _trtllm_refusals(
    config: ModelConfig,
    recipe: Recipe,
    dialect: Dialect,
    tp: int,
    mtp: bool,
    version: EngineVersion,
) -> tuple[Refusal, ...]:
    schemes = tally_of(config, recipe).schemes
    return tuple(trtllm_refusals(config, schemes, dialect, tp, mtp=mtp, version=version))


def _mtp_refusals(target: Target, mtp: bool) -> list[Refusal]:
    if not mtp or target not in _NO_MTP:
        return []
    return [Refusal(target, "the MTP layer", _NO_MTP[target], "Leave out --mtp", "read")]
