"""`build --target embedded`."""

from __future__ import annotations

from pathlib import Path

from deepseek.cli import make_progress
from deepseek.engine.packing import Source
from quant_jobs.build_options import BuildOptions, BuildResult, refuse_options, result_of
from quant_jobs.targets.embedded import pack_engine

_NOT_OURS = ("dialect", "engine_version", "mtp", "ep", "context", "concurrency")


def complete(options: BuildOptions) -> BuildOptions:
    """The options, none of which is for a server's limits or a version.

    Raises:
        DeployError: one is.
    """
    refuse_options(options, "embedded", _NOT_OURS)
    return options


def build(source: Source, output: Path, options: BuildOptions) -> BuildResult:
    """Build the one packed file; see `pack_engine`."""
    refuse_options(options, "embedded", ("workers",))
    with make_progress() as progress:
        task = progress.add_task("build", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        engine = pack_engine(
            source, output, kv_cache=options.kv_cache, tp=options.tp or 1, progress=show
        )
    return result_of(output, engine)
