"""`build --check`: whether an engine directory is what its target's loader has to load.

The check itself is the target's (`deepseek/trtllm/check.py`, `deepseek/vllm/check.py`, ...);
engine.json names the target. This is its command, and what it prints.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from deepseek.artifact.engine_checks import CheckReport
from deepseek.artifact.engine_manifest import read_engine_manifest
from deepseek.artifact.reader import ArtifactReader
from deepseek.errors import DeployError
from deepseek.source.checkpoint import CheckpointReader
from quant_jobs.checkpoints import open_checkpoint

if TYPE_CHECKING:
    from deepseek.target_engine import Check


class Printed(BaseModel):
    """What a command prints with --json."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RankReport(Printed):
    """What one rank reads of the engine's files, and what its parameters hold, in bytes; counted by
    the model of the loader, with what it makes beside (for TensorRT-LLM a second copy of
    kv_b_proj)."""

    read_bytes: int
    held_bytes: int


class CheckResult(Printed):
    """What `build --check --json` prints: see `CheckReport`."""

    directory: str
    target: str
    loader: str
    engine_digest: str
    dialect: str | None
    engine_version: str
    ranks: tuple[RankReport, ...]
    tensors: int
    reads: int
    hashed_bytes: int
    verified: int
    compared: int
    warnings: tuple[str, ...] = ()

    def describe(self) -> list[str]:
        """Lines for people."""
        first = self.ranks[0]
        dialect = f" ({self.dialect})" if self.dialect else ""
        plural = "ranks read" if len(self.ranks) > 1 else "rank reads"
        lines = [
            f"{self.directory}: {self.loader} {self.engine_version} would load it{dialect}, "
            f"engine {self.engine_digest[:16]}",
            f"{self.tensors} tensors, {self.hashed_bytes / 1e6:.2f} MB as they were built, "
            f"{self.verified} of them as the quantized checkpoint has them",
            f"{len(self.ranks)} {plural} {self.reads} times, nothing is left unread; the first "
            f"reads {first.read_bytes / 1e6:.2f} MB and holds {first.held_bytes / 1e6:.2f} MB",
        ]
        if self.compared:
            lines.append(
                f"{self.compared} tensors on all ranks, decoded, equal the checkpoint's bit for bit"
            )
        return lines + [f"warning: {warning}" for warning in self.warnings]


def checker_of(directory: Path) -> Check:
    """The check of the target that engine.json names.

    Raises:
        ArtifactError: there is no engine.json, or it was edited.
        DeployError: the target has no check of its own.
    """
    from deepseek.target_engine import CHECKS  # brings every target's room

    target = read_engine_manifest(directory).target
    if target not in CHECKS:
        raise DeployError(
            f"{directory} is an engine for {target}, which verifies its files whenever it loads "
            f"them; --check is for {' and '.join(CHECKS)}"
        )
    return CHECKS[target]


def run_check(directory: Path, checkpoint: Path | None = None) -> CheckResult:
    """Check an engine directory as its target's loader would read it; with `checkpoint` also every
    value that a rank holds against that quantized checkpoint.

    Raises:
        ArtifactError, DeployError, ConfigError: it is not what it should be; a sentence says what.
    """
    check = checker_of(directory)
    artifact: ArtifactReader | None = None
    if checkpoint is not None:
        source = open_checkpoint(checkpoint)
        if isinstance(source, CheckpointReader):
            raise DeployError(
                f"{checkpoint} is a source, and values are compared with a quantized checkpoint; "
                "leave --checkpoint out: the digests of engine.json are checked either way"
            )
        artifact = source
    report = check(directory, artifact=artifact)
    return CheckResult(
        directory=str(report.directory),
        target=report.target,
        loader=report.loader,
        engine_digest=report.engine_digest,
        dialect=report.dialect,
        engine_version=report.engine_version,
        ranks=rank_reports(report),
        tensors=report.tensors,
        reads=report.reads,
        hashed_bytes=report.hashed_bytes,
        verified=report.verified,
        compared=report.compared,
        warnings=report.warnings,
    )


def rank_reports(report: CheckReport) -> tuple[RankReport, ...]:
    """What each rank reads and holds, by rank."""
    return tuple(
        RankReport(read_bytes=load.read_bytes, held_bytes=load.held_bytes) for load in report.ranks
    )
