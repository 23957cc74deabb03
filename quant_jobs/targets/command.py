"""What the builds of all targets of layer files share: a progress line, the check of what was
built, and the result. A target's own file, `trtllm_command.py` and its like, has two functions:

    complete(options)               the options as the target takes them, its defaults filled in as
                                    far as they need no checkpoint; what is not for it is refused
    build(source, output, options)  builds with completed options
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from deepseek.artifact.engine_checks import CheckReport
from deepseek.artifact.engine_manifest import EngineManifest
from deepseek.cli import make_progress, print_line
from quant_jobs.build_options import BuildResult, result_of
from quant_jobs.check import rank_reports
from quant_jobs.targets.sharded import BuiltFile, Note, Progress


def build_and_check(
    output: Path,
    make: Callable[[Progress, Note], tuple[EngineManifest, dict[str, BuiltFile]]],
    check: Callable[..., CheckReport],
    *,
    planned_rank_bytes: int | None = None,
    warnings: tuple[str, ...] = (),
) -> BuildResult:
    """Make the directory, with a progress line, and check it with the model of its loader.

    Raises:
        ArtifactError, DeployError, OutputError: as `make` and `check` do.
    """
    with make_progress() as progress:
        task = progress.add_task("build", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        engine, built = make(show, lambda line: print_line(progress.console, line))
    report = check(output, digests=False)  # the files were hashed while they were written
    return result_of(
        output,
        engine,
        ranks=rank_reports(report),
        bytes_read=sum(file.bytes_read for file in built.values()),
        planned_rank_bytes=planned_rank_bytes,
        warnings=warnings,
    )
