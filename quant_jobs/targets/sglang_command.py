"""`build --target sglang`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cluster.hardware import parse_hardware
from deepseek.artifact.ranks import require_ranks
from deepseek.engine.packing import Source
from deepseek.sglang.check import check_engine
from deepseek.sglang.layout import require_dialect
from deepseek.sglang.versions import VERSIONS, require_version
from quant_jobs.build_options import BuildOptions, BuildResult
from quant_jobs.targets.command import build_and_check
from quant_jobs.targets.sglang import build_sglang
from quant_jobs.targets.sglang_launch import launch_from_plan, planned_rank_bytes
from quant_jobs.targets.sglang_plan import SglangOptions, kv_format, plan_build


def complete(options: BuildOptions) -> BuildOptions:
    """The options with ranks and version.

    Raises:
        DeployError: the ranks, the dialect or the version are none of its own.
    """
    if options.dialect is not None:
        require_dialect(options.dialect)
    tp = options.tp or parse_hardware(options.hardware).count
    require_ranks(tp, options.ep or tp)
    version = VERSIONS[0] if options.engine_version is None else options.engine_version
    return replace(options, tp=tp, ep=options.ep or tp, engine_version=require_version(version))


def build(source: Source, output: Path, options: BuildOptions) -> BuildResult:
    """Build the directory that SGLang loads; see `build_sglang`."""
    machines = parse_hardware(options.hardware).for_ranks(options.tp)
    chosen = SglangOptions(
        ranks=require_ranks(machines.count, options.ep or machines.count),
        kv_cache=kv_format(source, options.kv_cache),
        dialect=None if options.dialect is None else require_dialect(options.dialect),
        engine_version=require_version(options.engine_version or VERSIONS[0]),
        keep_mtp=options.mtp,
        generation=machines.hardware.generation,
    )
    planned = plan_build(
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
    return build_and_check(
        output,
        lambda progress, note: build_sglang(planned, output, options.workers, progress, note=note),
        check_engine,
        planned_rank_bytes=planned_rank_bytes(source.config, planned.stored, chosen),
        warnings=planned.warnings,
    )
