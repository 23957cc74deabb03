"""What `build` takes and what it says, whatever the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cluster.deployability import check, served_schemes
from cluster.hardware import parse_hardware
from cluster.matrix import Target
from deepseek.artifact.engine_manifest import EngineManifest
from deepseek.artifact.reader import ArtifactReader
from deepseek.engine.packing import Source, schemes_of
from deepseek.errors import DeployError
from quant_jobs.check import Printed, RankReport

#: KV formats that `--kv-cache` may name.
KVChoice = Literal["bf16", "fp8", "int8"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """What a user chooses beside checkpoint, target and output. None is the target's own default.

    `tp` ranks share the engine, its routed experts are divided over `ep` of them. `workers` are
    Ray workers, 0 none; only a target with several files has use for them. `context` and
    `concurrency` are the longest request in tokens and the largest batch of the engine's arguments.
    `dialect` is one of the target's own.
    """

    hardware: str = "8xH800-80GB"
    tp: int | None = None
    ep: int | None = None
    kv_cache: KVChoice | None = None
    dialect: str | None = None
    engine_version: str | None = None
    mtp: bool = False
    context: int | None = None
    concurrency: int | None = None
    workers: int = 0


class BuildResult(Printed):
    """What `build --json` prints. `artifact_digest` is the source's fingerprint and `recipe` is
    "unquantized" for a baseline engine. `bytes` is the size of the engine's tensor files,
    `bytes_read` what was read of the checkpoint's tensors to make them, by this run and by killed
    ones before it (0 for files of an engine that was finished), `rank_weight_bytes` the stored
    weights that each rank holds."""

    output: str
    target: str
    tp: int
    ep: int
    recipe: str
    engine_digest: str
    artifact_digest: str
    kv_cache: str
    dialect: str | None
    engine_version: str | None
    bytes: int
    bytes_read: int | None
    rank_weight_bytes: tuple[int, ...]
    #: What the plan says that a rank holds; None for the embedded engine, which is what it says.
    planned_rank_bytes: int | None
    #: By rank, for a target whose loader is modeled.
    ranks: tuple[RankReport, ...] = ()
    #: What may go wrong with the engine: outliers among input scales, the linter's warnings.
    warnings: tuple[str, ...] = ()

    def describe(self) -> list[str]:
        """Lines for people."""
        variant = f", {self.dialect} for {self.engine_version}" if self.dialect else ""
        lines = [
            f"{self.output}: {self.target} engine of {self.recipe}{variant}, "
            f"{self.bytes / 1e6:.2f} MB, engine {self.engine_digest[:16]}"
        ]
        if self.planned_rank_bytes is not None:
            held = max(self.rank_weight_bytes)
            lines.append(
                f"each of {self.tp} ranks (tp {self.tp}, ep {self.ep}) holds {held / 1e9:.3f} GB "
                f"of weights, {held / self.planned_rank_bytes - 1:+.1%} of the plan's "
                f"{self.planned_rank_bytes / 1e9:.3f} GB"
            )
        return lines + [f"warning: {warning}" for warning in self.warnings]


def result_of(
    output: Path,
    engine: EngineManifest,
    bytes_read: int | None = None,
    planned_rank_bytes: int | None = None,
    ranks: tuple[RankReport, ...] = (),
    warnings: tuple[str, ...] = (),
) -> BuildResult:
    """The result of a build, from the engine's manifest."""
    dialect, version = (engine.target_fields.get(key) for key in ("dialect", "engine_version"))
    return BuildResult(
        output=str(output),
        target=engine.target,
        tp=engine.ranks.tp,
        ep=engine.ranks.ep,
        recipe=engine.recipe,
        engine_digest=engine.digest,
        artifact_digest=engine.artifact_digest,
        kv_cache=engine.kv_cache,
        dialect=None if dialect is None else str(dialect),
        engine_version=None if version is None else str(version),
        bytes=engine.num_bytes,
        bytes_read=bytes_read,
        rank_weight_bytes=engine.plan.rank_weight_bytes,
        planned_rank_bytes=planned_rank_bytes,
        ranks=ranks,
        warnings=warnings,
    )


def refuse_options(options: BuildOptions, target: str, names: Sequence[str]) -> None:
    """Refuse options that mean nothing to a target.

    Raises:
        DeployError: one is given.
    """
    for name in names:
        if getattr(options, name) != BuildOptions.__dataclass_fields__[name].default:
            option = f"--{name.replace('_', '-')}"
            raise DeployError(f"{option} means nothing to target {target}; leave it out")


def check_target(
    source: Source, target: Target, hardware: str, *, kv_cache: str | None = None
) -> None:
    """Check the checkpoint against the deployability matrix.

    Raises:
        DeployError: the target cannot load it on this hardware; the sentence says what to change.
    """
    kv_cache = kv_cache or recipe_kv_cache(source)
    schemes = served_schemes(source.config, schemes_of(source))
    generation = parse_hardware(hardware).hardware.generation
    for refusal in check(schemes, kv_cache, target, generation):
        raise DeployError(refusal.sentence())


def recipe_kv_cache(source: Source) -> KVChoice:
    """The KV format of the recipe; that of a source is bf16."""
    return source.recipe.kv_cache if isinstance(source, ArtifactReader) else "bf16"
