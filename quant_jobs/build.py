"""Step 5, build: the engine of one target, from a quantized checkpoint or from a source.

The target is the one choice made here. `BUILDERS` maps a target to the function that builds its
engine directory (`quant_jobs/targets/`); a new target adds a file there and a line here. A target
without a builder is refused before a byte is written, with the deployability matrix's reason where
it could never load the artifact.
"""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from pydantic import BaseModel, ConfigDict

from cluster.deployability import check, require_target, served_schemes
from cluster.hardware import parse_hardware
from deepseek.artifact.manifest import MANIFEST_FILE
from deepseek.artifact.reader import ArtifactReader
from deepseek.cli import make_progress
from deepseek.engine.packing import schemes_of
from deepseek.errors import ArtifactError, DeployError
from deepseek.outputs import check_directory
from deepseek.source.checkpoint import CheckpointReader
from quant_jobs.targets import embedded

BUILDERS = {"embedded": embedded.pack_engine}


class BuildResult(BaseModel):
    """What `build --json` prints. `artifact_digest` is the source's fingerprint and `recipe` is
    "unquantized" for a baseline engine; `bytes` is the size of the engine's tensor files."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    output: str
    target: str
    tp: int
    recipe: str
    engine_digest: str
    artifact_digest: str
    kv_cache: str
    bytes: int


def run_build(
    checkpoint: Path, target: str, tp: int, output: Path, *, hardware: str = "8xH800-80GB"
) -> BuildResult:
    """Build OUTPUT from CHECKPOINT for one target. The same inputs give the same bytes. An output
    that already holds this very engine is verified and kept.

    Raises:
        DeployError: the target is unknown, cannot load this artifact, or is not built yet.
        ArtifactError, CheckpointError, ConfigError: the checkpoint cannot be read; or the output
            directory holds something else.
        OutputError: the disk is too small, or OUTPUT cannot be written.
    """
    check_directory(output)
    known = require_target(target)
    source = open_checkpoint(checkpoint)
    builder = BUILDERS.get(known)
    if builder is None:
        refuse_target(source, known, hardware)
    with make_progress() as progress:
        task = progress.add_task("build", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        engine = builder(source, output, tp=tp, progress=show)
    return BuildResult(
        output=str(output),
        target=engine.target,
        tp=engine.ranks.tp,
        recipe=engine.recipe,
        engine_digest=engine.digest,
        artifact_digest=engine.artifact_digest,
        kv_cache=engine.kv_cache,
        bytes=engine.num_bytes,
    )


def open_checkpoint(directory: Path) -> ArtifactReader | CheckpointReader:
    """Open the quantized checkpoint or the source checkpoint that the directory holds.

    Raises:
        ArtifactError, CheckpointError, ConfigError: it is neither, or is damaged.
    """
    if not (directory / "config.json").exists():
        raise ArtifactError(
            f"{directory} has no config.json: it is neither a source nor a finished quantized "
            "checkpoint; correct --checkpoint, or run quantize again, which resumes"
        )
    if (directory / MANIFEST_FILE).exists():
        return ArtifactReader(directory)
    return CheckpointReader(directory)


def refuse_target(
    source: ArtifactReader | CheckpointReader, target: str, hardware: str
) -> NoReturn:
    """Raise the reason why `target` is not built: it cannot load the artifact, or has no builder.

    Raises:
        DeployError: always.
    """
    kv_cache = source.manifest.kv_cache if isinstance(source, ArtifactReader) else "bf16"
    schemes = served_schemes(source.config, schemes_of(source))
    generation = parse_hardware(hardware).hardware.generation
    for refusal in check(schemes, kv_cache, target, generation):
        raise DeployError(refusal.sentence())
    raise DeployError(
        f"{target} could load this artifact, but this version of IntServe builds embedded engines "
        "only; use --target embedded"
    )
