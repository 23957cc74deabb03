"""Step 5, build: the engine of one target, from a quantized checkpoint or from a source.

The target is the one choice made here. `COMMANDS` maps a target to the file that completes its
options and builds its engine directory; a new target adds a file there and a line here.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Protocol

from cluster.deployability import require_target
from cluster.matrix import Target
from deepseek.cli import make_progress, print_line
from deepseek.engine.packing import Source
from deepseek.outputs import check_directory
from quant_jobs.build_options import BuildOptions, BuildResult, check_target, recipe_kv_cache
from quant_jobs.checkpoints import open_checkpoint
from quant_jobs.targets.staging import StageReport, stage_engine

#: Imported when they are asked for: each brings its target's rooms.
COMMANDS: dict[Target, str] = {
    "embedded": "quant_jobs.targets.embedded_command",
    "trtllm": "quant_jobs.targets.trtllm_command",
    "vllm": "quant_jobs.targets.vllm_command",
    "sglang": "quant_jobs.targets.sglang_command",
    "transformers": "quant_jobs.targets.transformers_command",
}


class Command(Protocol):
    """A target's file."""

    def complete(self, options: BuildOptions) -> BuildOptions:
        """The options with the target's defaults; raises DeployError for what is not for it."""
        ...

    def build(self, source: Source, output: Path, options: BuildOptions) -> BuildResult:
        """Build with completed options."""
        ...


def run_build(
    checkpoint: Path, target: str, output: Path, options: BuildOptions | None = None
) -> BuildResult:
    """Build OUTPUT from CHECKPOINT for one target. The same inputs give the same bytes. An output
    that already holds this very engine is verified and kept.

    Raises:
        DeployError: the target is unknown, or cannot load this artifact; or an option is not for
            this target.
        ArtifactError, CheckpointError, ConfigError: the checkpoint cannot be read; or the output
            directory holds something else.
        OutputError: the disk is too small, or OUTPUT cannot be written.
    """
    options = options or BuildOptions()
    check_directory(output)
    command = _command(target)
    source = open_checkpoint(checkpoint)
    return command.build(source, output, command.complete(options))


def complete_options(target: str, options: BuildOptions) -> BuildOptions:
    """The options as the target takes them, with those of its defaults filled in that need no
    checkpoint.

    Raises:
        DeployError: the target is unknown, or an option is not for it.
    """
    return _command(target).complete(options)


def check_checkpoint(directory: Path, target: str, options: BuildOptions) -> BuildOptions:
    """Check, before anything is built, that the target can load the checkpoint. Returns the options
    with the checkpoint's KV format filled in.

    Raises:
        DeployError: it cannot; the sentence says what to change.
        ArtifactError, CheckpointError, ConfigError: the checkpoint is damaged.
    """
    source, known = open_checkpoint(directory), require_target(target)
    kv_cache = options.kv_cache or recipe_kv_cache(source)
    if known in ("trtllm", "vllm", "sglang"):  # the others run on the CPU too, whatever the GPUs
        check_target(source, known, options.hardware, kv_cache=kv_cache)
    return replace(options, kv_cache=kv_cache)


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


def _command(target: str) -> Command:
    """The file of a target, by name.

    Raises:
        DeployError: no such target.
    """
    command: Command = import_module(COMMANDS[require_target(target)])
    return command
