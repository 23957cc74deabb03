"""Opens what `build` starts from: a quantized checkpoint, or a source as it is."""

from __future__ import annotations

from pathlib import Path

from deepseek.artifact.manifest import MANIFEST_FILE
from deepseek.artifact.reader import ArtifactReader
from deepseek.engine.packing import Source
from deepseek.errors import ArtifactError
from deepseek.source.checkpoint import CheckpointReader


def open_checkpoint(directory: Path) -> Source:
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
