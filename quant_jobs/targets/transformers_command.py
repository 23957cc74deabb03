"""`build --target transformers`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from deepseek.engine.packing import Source
from deepseek.hf.check import check_engine
from deepseek.hf.versions import VERSIONS, require_version
from quant_jobs.build_options import (
    BuildOptions,
    BuildResult,
    recipe_kv_cache,
    refuse_options,
)
from quant_jobs.targets.command import build_and_check
from quant_jobs.targets.transformers import build_transformers
from quant_jobs.targets.transformers_plan import plan_build

_NOT_OURS = ("tp", "ep", "dialect", "mtp", "context", "concurrency")


def complete(options: BuildOptions) -> BuildOptions:
    """The options, none of which is for ranks, dialects or limits: `from_pretrained` has none.

    Raises:
        DeployError: one is, or the version is unknown.
    """
    refuse_options(options, "transformers", _NOT_OURS)
    version = VERSIONS[0] if options.engine_version is None else options.engine_version
    return replace(options, engine_version=require_version(version))


def build(source: Source, output: Path, options: BuildOptions) -> BuildResult:
    """Build the directory that `from_pretrained` loads; see `build_transformers`."""
    version = require_version(options.engine_version or VERSIONS[0])
    planned = plan_build(source, options.kv_cache or recipe_kv_cache(source), version)
    return build_and_check(
        output,
        lambda progress, note: build_transformers(
            planned, output, options.workers, progress, note=note
        ),
        check_engine,
        warnings=planned.warnings,
    )
