"""Step 5, build: the engine of one target, from a quantized checkpoint or from a source.

Which target is the one choice made here; the layout itself belongs to the target
(`deepseek/engine/packed.py` for the embedded engine). What a target could never load is refused
with the deployability matrix's reason before a byte is written.

`read_engine` is how the later steps see an engine: its manifest, and the manifest of the quantized
checkpoint inside it, so that evaluate, gate and report need no other folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from cluster.deployability import check, require_target, served_schemes
from cluster.hardware import parse_hardware
from deepseek.artifact.manifest import MANIFEST_FILE, Manifest, read_manifest
from deepseek.artifact.reader import ArtifactReader
from deepseek.cli import make_progress
from deepseek.config import ModelConfig
from deepseek.engine.packed import UNQUANTIZED, pack_engine, read_engine_manifest
from deepseek.engine.packing import schemes_of
from deepseek.errors import ArtifactError, DeployError
from deepseek.recipe import Scheme
from deepseek.source.checkpoint import CheckpointReader


class BuildResult(BaseModel):
    """What `build --json` prints. `artifact_digest` is the source's fingerprint and `recipe`
    "unquantized" for a baseline engine; `bytes` counts the engine's tensors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    output: str
    target: str
    tp: int
    recipe: str
    engine_digest: str
    artifact_digest: str
    kv_cache: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """An engine directory as the later steps see it. `config` is the source's, FP8 blocks included;
    `manifest` is the quantized checkpoint's, None for an engine of an unquantized source."""

    directory: Path
    digest: str
    artifact_digest: str
    source_fingerprint: str
    recipe: str
    kv_cache: str
    num_bytes: int
    config: ModelConfig
    schemes: Mapping[str, Scheme]
    manifest: Manifest | None


def run_build(
    checkpoint: Path, target: str, tp: int, output: Path, *, hardware: str = "8xH800-80GB"
) -> BuildResult:
    """Build OUTPUT from CHECKPOINT for one target. The same inputs give the same bytes, and an
    output that holds this very engine is verified and kept.

    Raises:
        DeployError: the target is unknown, cannot load this artifact, or is not built yet.
        ArtifactError, CheckpointError, ConfigError: the checkpoint cannot be read; or the output
            directory holds something else.
    """
    known = require_target(target)
    source = open_checkpoint(checkpoint)
    if known != "embedded":
        refuse_target(source, target, hardware)
    with make_progress() as progress:
        task = progress.add_task("build", total=None)

        def show(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        engine = pack_engine(source, output, tp=tp, progress=show)
    return BuildResult(
        output=str(output),
        target=known,
        tp=tp,
        recipe=engine.recipe,
        engine_digest=engine.digest,
        artifact_digest=engine.artifact_digest,
        kv_cache=engine.kv_cache,
        bytes=engine.tensor_file.num_bytes,
    )


def open_checkpoint(directory: Path) -> ArtifactReader | CheckpointReader:
    """A quantized checkpoint of ours, or a source: whichever the directory holds.

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


def refuse_target(source: ArtifactReader | CheckpointReader, target: str, hardware: str) -> None:
    """Say why `target` is not built: it could never load the artifact, or not by this version.

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


def read_engine(directory: Path) -> BuiltEngine:
    """Read an engine's documents; no tensors.

    Raises:
        ArtifactError: engine.json or intserve.json is absent, edited or of another engine.
        ConfigError: config.json cannot be read.
    """
    engine = read_engine_manifest(directory)
    config = ModelConfig.from_directory(directory)
    manifest = None
    if engine.recipe != UNQUANTIZED:
        manifest = read_manifest(directory)
        if manifest.digest != engine.artifact_digest:
            raise ArtifactError(
                f"{directory / MANIFEST_FILE} is of artifact {manifest.digest[:16]}, but the "
                f"engine was built from {engine.artifact_digest[:16]}; build again"
            )
        config = replace(config, weight_block_size=manifest.source.weight_block_size)
    return BuiltEngine(
        directory=directory,
        digest=engine.digest,
        artifact_digest=engine.artifact_digest,
        source_fingerprint=engine.source_fingerprint,
        recipe=engine.recipe,
        kv_cache=engine.kv_cache,
        num_bytes=engine.tensor_file.num_bytes,
        config=config,
        schemes=engine.schemes,
        manifest=manifest,
    )
