"""Step 5, build: the engine of one target, from a quantized checkpoint or from a source.

The target is the one choice made here. `BUILDERS` maps a target to the function that builds its
engine directory (`quant_jobs/targets/`); a new target adds a file there and a line here. A target
without a builder is refused before a byte is written, with the deployability matrix's reason where
it could never load the artifact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NoReturn

from cluster.deployability import check, require_target, served_schemes
from cluster.hardware import parse_hardware
from cluster.matrix import Target
from deepseek.artifact.engine_manifest import EngineManifest
from deepseek.artifact.reader import ArtifactReader
from deepseek.cli import make_progress, print_line
from deepseek.engine.packing import Source, schemes_of
from deepseek.errors import DeployError
from deepseek.hf.check import check_engine as check_hf
from deepseek.hf.versions import VERSIONS as HF_VERSIONS
from deepseek.hf.versions import require_version as require_hf_version
from deepseek.outputs import check_directory
from deepseek.source.checkpoint import CheckpointReader
from deepseek.trtllm.check import check_engine
from deepseek.trtllm.layout import require_dialect
from deepseek.trtllm.loadable import require_ranks
from deepseek.trtllm.versions import VERSIONS, require_version
from quant_jobs.check import Printed, RankReport, rank_reports
from quant_jobs.checkpoints import open_checkpoint
from quant_jobs.targets.staging import StageReport, stage_engine

#: Options that mean nothing to the embedded engine.
_TRTLLM_OPTIONS = ("dialect", "engine_version", "mtp", "ep", "context", "concurrency")
#: Options that mean nothing to transformers.
_NOT_TRANSFORMERS = ("tp", "ep", "dialect", "mtp", "context", "concurrency")
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


def run_build(
    checkpoint: Path, target: str, output: Path, options: BuildOptions | None = None
) -> BuildResult:
    """Build OUTPUT from CHECKPOINT for one target. The same inputs give the same bytes. An output
    that already holds this very engine is verified and kept.

    Raises:
        DeployError: the target is unknown, cannot load this artifact, or is not built yet; or an
            option is not for this target.
        ArtifactError, CheckpointError, ConfigError: the checkpoint cannot be read; or the output
            directory holds something else.
        OutputError: the disk is too small, or OUTPUT cannot be written.
    """
    options = options or BuildOptions()
    check_directory(output)
    known = require_target(target)
    source = open_checkpoint(checkpoint)
    builder = BUILDERS.get(known)
    if builder is None:
        refuse_target(source, known, options.hardware)
    return builder(source, output, options)


def complete_options(target: str, options: BuildOptions) -> BuildOptions:
    """The options as the target takes them, with those of its defaults filled in that need no
    checkpoint.

    Raises:
        DeployError: the target is unknown or not built, or an option is not for it.
    """
    known = require_target(target)
    if known == "trtllm":
        tp = options.tp or parse_hardware(options.hardware).count
        require_ranks(tp, options.ep or tp)
        return replace(
            options,
            tp=tp,
            ep=options.ep or tp,
            engine_version=require_version(
                VERSIONS[0] if options.engine_version is None else options.engine_version
            ),
            dialect=None if _trtllm_dialect(options) == "mixed" else options.dialect,
        )
    if known == "vllm":
        from deepseek.vllm import loadable, versions

        _refuse_options(options, "vllm", ("dialect",))
        tp = options.tp or parse_hardware(options.hardware).count
        loadable.require_ranks(tp, options.ep or tp)
        version = options.engine_version or versions.VERSIONS[0]
        return replace(
            options, tp=tp, ep=options.ep or tp, engine_version=versions.require_version(version)
        )
    if known == "sglang":
        return _complete_sglang(options)
    if known == "transformers":
        return _transformers_options(options)
    if known == "embedded":
        _refuse_options(options, "embedded", _TRTLLM_OPTIONS)
    return options


def _complete_sglang(options: BuildOptions) -> BuildOptions:
    from deepseek.sglang import layout, loadable, versions

    tp = options.tp or parse_hardware(options.hardware).count
    loadable.require_ranks(tp, options.ep or tp)
    if options.dialect is not None:
        layout.require_dialect(options.dialect)
    version = versions.VERSIONS[0] if options.engine_version is None else options.engine_version
    return replace(
        options, tp=tp, ep=options.ep or tp, engine_version=versions.require_version(version)
    )


def _trtllm_dialect(options: BuildOptions) -> Literal["mixed", "single"] | None:
    """The dialect of TensorRT-LLM that was asked for.

    Raises:
        DeployError: it has no such dialect.
    """
    if options.dialect is None:
        return None
    return "single" if require_dialect(options.dialect) == "single" else "mixed"


def check_checkpoint(directory: Path, target: str, options: BuildOptions) -> BuildOptions:
    """Check, before anything is built, that the target can load the checkpoint. Returns the options
    with the checkpoint's KV format filled in.

    Raises:
        DeployError: it cannot; the sentence says what to change.
        ArtifactError, CheckpointError, ConfigError: the checkpoint is damaged.
    """
    source, known = open_checkpoint(directory), require_target(target)
    if known not in BUILDERS:
        refuse_target(source, known, options.hardware)
    recipe_kv = source.recipe.kv_cache if isinstance(source, ArtifactReader) else "bf16"
    if known in ("trtllm", "vllm", "sglang"):
        check_target(source, known, options.hardware, kv_cache=options.kv_cache or recipe_kv)
    return replace(options, kv_cache=options.kv_cache or recipe_kv)


def run_stage(engine: Path, stage: Path, workers: int) -> StageReport:
    """Copy a built engine to the directory `stage` of every node of the cluster (`workers` 0: of
    this machine), with a progress line.

    Raises:
        ArtifactError: `engine` is no engine.
        IntServeError: the cluster has no node that could have a copy.
    """
    with make_progress() as progress:
        task = progress.add_task("stage", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        return stage_engine(
            engine, stage, workers, show, note=lambda line: print_line(progress.console, line)
        )


def refuse_target(source: Source, target: Target, hardware: str) -> NoReturn:
    """Raise the reason why `target` is not built: it cannot load the artifact, or has no builder.

    Raises:
        DeployError: always.
    """
    check_target(source, target, hardware)
    raise DeployError(
        f"{target} could load this artifact, but this version of IntServe builds engines for "
        f"{' and '.join(BUILDERS)} only; use --target embedded"
    )


def check_target(
    source: Source, target: Target, hardware: str, *, kv_cache: str | None = None
) -> None:
    """Check the checkpoint against the deployability matrix.

    Raises:
        DeployError: the target cannot load it on this hardware; the sentence says what to change.
    """
    if kv_cache is None:
        kv_cache = source.manifest.kv_cache if isinstance(source, ArtifactReader) else "bf16"
    schemes = served_schemes(source.config, schemes_of(source))
    generation = parse_hardware(hardware).hardware.generation
    for refusal in check(schemes, kv_cache, target, generation):
        raise DeployError(refusal.sentence())


def _build_embedded(source: Source, output: Path, options: BuildOptions) -> BuildResult:
    from quant_jobs.targets.embedded import pack_engine

    _refuse_options(options, "embedded", (*_TRTLLM_OPTIONS, "workers"))
    with make_progress() as progress:
        task = progress.add_task("build", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        engine = pack_engine(
            source, output, kv_cache=options.kv_cache, tp=options.tp or 1, progress=show
        )
    return _result(output, engine)


def _build_trtllm(source: Source, output: Path, options: BuildOptions) -> BuildResult:
    from quant_jobs.targets.trtllm import build_trtllm
    from quant_jobs.targets.trtllm_args import args_from_plan, planned_rank_bytes
    from quant_jobs.targets.trtllm_plan import TrtllmOptions, kv_format, plan_build

    machines = parse_hardware(options.hardware).for_ranks(options.tp)
    tp = machines.count
    is_source = isinstance(source, CheckpointReader)
    if is_source and options.dialect is not None:
        raise DeployError(
            f"--dialect says how a quantized checkpoint is stored, and {source.directory} is "
            "a source, which stays as released; leave it out"
        )
    chosen = TrtllmOptions(
        ranks=require_ranks(tp, options.ep or tp),
        dialect=_trtllm_dialect(options),
        kv_cache=kv_format(source, options.kv_cache),
        engine_version=require_version(
            VERSIONS[0] if options.engine_version is None else options.engine_version
        ),
        keep_mtp=options.mtp,
    )
    check_target(source, "trtllm", options.hardware, kv_cache=chosen.kv_cache)
    build = plan_build(
        source,
        chosen,
        lambda stored: args_from_plan(
            source.config,
            stored,
            chosen,
            machines,
            context=options.context,
            concurrency=options.concurrency,
        ),
    )
    with make_progress() as progress:
        task = progress.add_task("build", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        engine, built = build_trtllm(
            build,
            output,
            options.workers,
            show,
            note=lambda line: print_line(progress.console, line),
        )
    report = check_engine(output, digests=False)  # the files were hashed while they were written
    return _result(
        output,
        engine,
        ranks=rank_reports(report),
        bytes_read=sum(file.bytes_read for file in built.values()),
        planned_rank_bytes=planned_rank_bytes(source.config, build.stored, chosen),
        warnings=build.warnings,
    )


def _build_vllm(source: Source, output: Path, options: BuildOptions) -> BuildResult:
    from deepseek.vllm.check import check_engine as check_vllm
    from deepseek.vllm.launch import E8M0_OFF
    from deepseek.vllm.loadable import require_ranks as require_vllm_ranks
    from deepseek.vllm.versions import VERSIONS as VLLM_VERSIONS
    from deepseek.vllm.versions import require_version as require_vllm_version
    from quant_jobs.targets.vllm import build_vllm
    from quant_jobs.targets.vllm_launch import launch_from_plan, planned_rank_bytes
    from quant_jobs.targets.vllm_plan import VllmOptions, kv_format, plan_build

    _refuse_options(options, "vllm", ("dialect",))
    machines = parse_hardware(options.hardware).for_ranks(options.tp)
    tp = machines.count
    chosen = VllmOptions(
        ranks=require_vllm_ranks(tp, options.ep or tp),
        kv_cache=kv_format(source, options.kv_cache),
        engine_version=require_vllm_version(options.engine_version or VLLM_VERSIONS[0]),
        keep_mtp=options.mtp,
        generation=machines.hardware.generation,
    )
    check_target(source, "vllm", options.hardware, kv_cache=chosen.kv_cache)
    build = plan_build(
        source,
        chosen,
        lambda stored: launch_from_plan(
            source.config,
            stored,
            chosen,
            machines,
            context=options.context,
            concurrency=options.concurrency,
        ),
    )
    with make_progress() as progress:
        task = progress.add_task("build", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        engine, built = build_vllm(
            build,
            output,
            options.workers,
            show,
            note=lambda line: print_line(progress.console, line),
        )
    report = check_vllm(output, digests=False)  # the files were hashed while they were written
    has_tiles = any(scheme.weights == "fp8-block" for scheme in build.stored.values())
    return _result(
        output,
        engine,
        ranks=rank_reports(report),
        bytes_read=sum(file.bytes_read for file in built.values()),
        planned_rank_bytes=planned_rank_bytes(source.config, build.stored, chosen),
        warnings=(
            "with DeepGEMM, which its wheel has, vLLM on Hopper quantizes FP8 tiles again with "
            f"power-of-two scales: `evaluate` judges that, and {E8M0_OFF} avoids it",
        )
        if has_tiles
        else (),
    )


def _build_sglang(source: Source, output: Path, options: BuildOptions) -> BuildResult:
    from deepseek.sglang.check import check_engine as check_sglang
    from deepseek.sglang.layout import require_dialect as require_sglang_dialect
    from deepseek.sglang.loadable import require_ranks as require_sglang_ranks
    from deepseek.sglang.versions import require_version as require_sglang_version
    from quant_jobs.targets.sglang import build_sglang
    from quant_jobs.targets.sglang_launch import launch_from_plan, planned_rank_bytes
    from quant_jobs.targets.sglang_plan import SglangOptions, kv_format, plan_build

    options = _complete_sglang(options)
    assert options.tp is not None
    assert options.ep is not None
    assert options.engine_version is not None
    machines = parse_hardware(options.hardware).for_ranks(options.tp)
    dialect = None if options.dialect is None else require_sglang_dialect(options.dialect)
    chosen = SglangOptions(
        ranks=require_sglang_ranks(options.tp, options.ep),
        kv_cache=kv_format(source, options.kv_cache),
        dialect=dialect,
        engine_version=require_sglang_version(options.engine_version),
        keep_mtp=options.mtp,
        generation=machines.hardware.generation,
    )
    build = plan_build(
        source,
        chosen,
        lambda stored, dialect: launch_from_plan(
            source.config,
            stored,
            dialect,
            chosen,
            machines,
            context=options.context,
            concurrency=options.concurrency,
        ),
    )
    with make_progress() as progress:
        task = progress.add_task("build", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        engine, built = build_sglang(
            build,
            output,
            options.workers,
            show,
            note=lambda line: print_line(progress.console, line),
        )
    report = check_sglang(output, digests=False)  # the files were hashed while they were written
    return _result(
        output,
        engine,
        ranks=rank_reports(report),
        bytes_read=sum(file.bytes_read for file in built.values()),
        planned_rank_bytes=planned_rank_bytes(source.config, build.stored, chosen),
        warnings=build.warnings,
    )


def _build_transformers(source: Source, output: Path, options: BuildOptions) -> BuildResult:
    from quant_jobs.targets.transformers import build_transformers
    from quant_jobs.targets.transformers_plan import plan_build

    options = _transformers_options(options)
    recipe_kv = source.recipe.kv_cache if isinstance(source, ArtifactReader) else "bf16"
    version = require_hf_version(options.engine_version or HF_VERSIONS[0])
    build = plan_build(source, options.kv_cache or recipe_kv, version)
    with make_progress() as progress:
        task = progress.add_task("build", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        engine, built = build_transformers(
            build,
            output,
            options.workers,
            show,
            note=lambda line: print_line(progress.console, line),
        )
    report = check_hf(output, digests=False)  # the files were hashed while they were written
    return _result(
        output,
        engine,
        ranks=rank_reports(report),
        bytes_read=sum(file.bytes_read for file in built.values()),
        warnings=build.warnings,
    )


def _transformers_options(options: BuildOptions) -> BuildOptions:
    """The options, none of which is for ranks, dialects or limits: `from_pretrained` has none."""
    _refuse_options(options, "transformers", _NOT_TRANSFORMERS)
    version = HF_VERSIONS[0] if options.engine_version is None else options.engine_version
    return replace(options, engine_version=require_hf_version(version))


def _result(
    output: Path,
    engine: EngineManifest,
    bytes_read: int | None = None,
    planned_rank_bytes: int | None = None,
    ranks: tuple[RankReport, ...] = (),
    warnings: tuple[str, ...] = (),
) -> BuildResult:
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


def _refuse_options(options: BuildOptions, target: str, names: tuple[str, ...]) -> None:
    """Refuse options that mean nothing to a target.

    Raises:
        DeployError: one is given.
    """
    for name in names:
        if getattr(options, name) != BuildOptions.__dataclass_fields__[name].default:
            option = f"--{name.replace('_', '-')}"
            raise DeployError(f"{option} means nothing to target {target}; leave it out")


BUILDERS: dict[Target, Callable[[Source, Path, BuildOptions], BuildResult]] = {
    "embedded": _build_embedded,
    "trtllm": _build_trtllm,
    "vllm": _build_vllm,
    "sglang": _build_sglang,
    "transformers": _build_transformers,
}
