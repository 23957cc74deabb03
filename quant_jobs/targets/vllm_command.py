"""`build --target vllm`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cluster.hardware import parse_hardware
from deepseek.engine.packing import Source
from deepseek.vllm.check import check_engine
from deepseek.vllm.launch import E8M0_OFF
from deepseek.vllm.loadable import require_ranks
from deepseek.vllm.versions import VERSIONS, require_version
from quant_jobs.build_options import BuildOptions, BuildResult, check_target, refuse_options
from quant_jobs.targets.command import build_and_check
from quant_jobs.targets.vllm import build_vllm
from quant_jobs.targets.vllm_launch import launch_from_plan, planned_rank_bytes
from quant_jobs.targets.vllm_plan import VllmOptions, kv_format, plan_build


def complete(options: BuildOptions) -> BuildOptions:
    """The options with ranks and version.

    Raises:
        DeployError: the ranks or the version are none of its own, or --dialect is given.
    """
    refuse_options(options, "vllm", ("dialect",))
    tp = options.tp or parse_hardware(options.hardware).count
    require_ranks(tp, options.ep or tp)
    version = VERSIONS[0] if options.engine_version is None else options.engine_version
    return replace(options, tp=tp, ep=options.ep or tp, engine_version=require_version(version))


def build(source: Source, output: Path, options: BuildOptions) -> BuildResult:
    """Build the directory that `vllm serve` loads; see `build_vllm`."""
    machines = parse_hardware(options.hardware).for_ranks(options.tp)
    chosen = VllmOptions(
        ranks=require_ranks(machines.count, options.ep or machines.count),
        kv_cache=kv_format(source, options.kv_cache),
        engine_version=require_version(options.engine_version or VERSIONS[0]),
        keep_mtp=options.mtp,
        generation=machines.hardware.generation,
    )
    check_target(source, "vllm", options.hardware, kv_cache=chosen.kv_cache)
    planned = plan_build(
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
    has_tiles = any(scheme.weights == "fp8-block" for scheme in planned.stored.values())
    tiles = (
        "with DeepGEMM, which its wheel has, vLLM on Hopper quantizes FP8 tiles again with "
        f"power-of-two scales: `evaluate` judges that, and {E8M0_OFF} avoids it"
    )
    return build_and_check(
        output,
        lambda progress, note: build_vllm(planned, output, options.workers, progress, note=note),
        check_engine,
        planned_rank_bytes=planned_rank_bytes(source.config, planned.stored, chosen),
        warnings=(*planned.warnings, *[tiles][: int(has_tiles)]),
    )
