"""`build --target trtllm`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

from cluster.hardware import parse_hardware
from deepseek.artifact.ranks import require_ranks
from deepseek.engine.packing import Source
from deepseek.errors import DeployError
from deepseek.source.checkpoint import CheckpointReader
from deepseek.trtllm.check import check_engine
from deepseek.trtllm.layout import require_dialect
from deepseek.trtllm.versions import VERSIONS, require_version
from quant_jobs.build_options import BuildOptions, BuildResult, check_target
from quant_jobs.targets.command import build_and_check
from quant_jobs.targets.trtllm import build_trtllm
from quant_jobs.targets.trtllm_args import args_from_plan, planned_rank_bytes
from quant_jobs.targets.trtllm_plan import TrtllmOptions, kv_format, plan_build


def complete(options: BuildOptions) -> BuildOptions:
    """The options with ranks and version; the dialect `mixed` is the default, and not named.

    Raises:
        DeployError: the ranks, the dialect or the version are none of its own.
    """
    dialect = None if _dialect(options) == "mixed" else options.dialect
    tp = options.tp or parse_hardware(options.hardware).count
    require_ranks(tp, options.ep or tp)
    version = VERSIONS[0] if options.engine_version is None else options.engine_version
    return replace(
        options,
        tp=tp,
        ep=options.ep or tp,
        engine_version=require_version(version),
        dialect=dialect,
    )


def build(source: Source, output: Path, options: BuildOptions) -> BuildResult:
    """Build the directory that TensorRT-LLM's PyTorch backend loads; see `build_trtllm`."""
    machines = parse_hardware(options.hardware).for_ranks(options.tp)
    if isinstance(source, CheckpointReader) and options.dialect is not None:
        raise DeployError(
            f"--dialect says how a quantized checkpoint is stored, and {source.directory} is "
            "a source, which stays as released; leave it out"
        )
    chosen = TrtllmOptions(
        ranks=require_ranks(machines.count, options.ep or machines.count),
        dialect=_dialect(options),
        kv_cache=kv_format(source, options.kv_cache),
        engine_version=require_version(options.engine_version or VERSIONS[0]),
        keep_mtp=options.mtp,
    )
    check_target(source, "trtllm", options.hardware, kv_cache=chosen.kv_cache)
    planned = plan_build(
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
    return build_and_check(
        output,
        lambda progress, note: build_trtllm(planned, output, options.workers, progress, note=note),
        check_engine,
        planned_rank_bytes=planned_rank_bytes(source.config, planned.stored, chosen),
        warnings=planned.warnings,
    )


def _dialect(options: BuildOptions) -> Literal["mixed", "single"] | None:
    """The dialect that was asked for.

    Raises:
        DeployError: there is no such dialect.
    """
    if options.dialect is None:
        return None
    return "single" if require_dialect(options.dialect) == "single" else "mixed"
