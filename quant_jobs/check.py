"""`build --check`: whether an engine directory is what its loader has to load.

The check itself is `deepseek/trtllm/check.py`; this is its command, and what it prints.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from deepseek.errors import DeployError
from deepseek.source.checkpoint import CheckpointReader
from deepseek.trtllm.check import CheckReport, check_engine
from quant_jobs.checkpoints import open_checkpoint


class Printed(BaseModel):
    """What a command prints with --json."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RankReport(Printed):
    """What one rank reads of the engine's files, and what its parameters hold, in bytes; counted by
    the model of the loader, with the second copy of kv_b_proj that it makes."""

    read_bytes: int
    held_bytes: int


class CheckResult(Printed):
    """What `build --check --json` prints: see `CheckReport`."""

    directory: str
    engine_digest: str
    dialect: str
    engine_version: str
    ranks: tuple[RankReport, ...]
    tensors: int
    reads: int
    hashed_bytes: int
    verified: int
    compared: int

    def describe(self) -> list[str]:
        """Lines for people."""
        first = self.ranks[0]
        lines = [
            f"{self.directory}: TensorRT-LLM {self.engine_version} would load it ({self.dialect}), "
            f"engine {self.engine_digest[:16]}",
            f"{self.tensors} tensors, {self.hashed_bytes / 1e6:.2f} MB as they were built, "
            f"{self.verified} of them as the quantized checkpoint has them",
            f"{len(self.ranks)} ranks read {self.reads} times, nothing is left unread; the first "
            f"reads {first.read_bytes / 1e6:.2f} MB and holds {first.held_bytes / 1e6:.2f} MB",
        ]
        if self.compared:
            lines.append(
                f"{self.compared} tensors on all ranks, decoded, equal the checkpoint's bit for bit"
            )
        return lines


def run_check(directory: Path, checkpoint: Path | None = None) -> CheckResult:
    """Check an engine directory of target trtllm as its loader would read it; with `checkpoint`
    also every value that a rank holds against that quantized checkpoint.

    Raises:
        ArtifactError, DeployError, ConfigError: it is not what it should be; a sentence says what.
    """
    artifact = None if checkpoint is None else open_checkpoint(checkpoint)
    if isinstance(artifact, CheckpointReader):
        raise DeployError(
            f"{checkpoint} is a source, and values are compared with a quantized checkpoint; leave "
            "--checkpoint out: the digests of engine.json are checked either way"
        )
    report = check_engine(directory, artifact=artifact)
    return CheckResult(
        directory=str(report.directory),
        engine_digest=report.engine_digest,
        dialect=report.dialect,
        engine_version=report.engine_version,
        ranks=rank_reports(report),
        tensors=report.tensors,
        reads=report.reads,
        hashed_bytes=report.hashed_bytes,
        verified=report.verified,
        compared=report.compared,
    )


def rank_reports(report: CheckReport) -> tuple[RankReport, ...]:
    """What each rank reads and holds, by rank."""
    return tuple(
        RankReport(read_bytes=load.read_bytes, held_bytes=load.held_bytes) for load in report.ranks
    )
