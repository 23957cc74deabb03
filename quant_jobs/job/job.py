"""The inputs of a job, checked, and the fingerprint by which a rerun recognizes its own output.

Starts nothing and writes nothing. Called by `quantize.py` before it takes the job's folder.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek.artifact.documents import read_copied
from deepseek.artifact.manifest import (
    MANIFEST_FILE,
    CalibrationFile,
    CalibrationRecord,
    Manifest,
    read_manifest,
)
from deepseek.errors import ArtifactError
from deepseek.files import canonical_json
from deepseek.outputs import check_apart, check_directory
from deepseek.recipe import Recipe, load_recipe
from deepseek.source.checkpoint import CheckpointReader
from quant_jobs.algorithms.folding import scaled_groups
from quant_jobs.calibration.token_blocks import CalibrationSource, TokenBlocks, load_token_blocks
from quant_jobs.job.folder import FOLDER, JobFolder, check_same_run
from quant_jobs.job.restore import lost_files, lost_maxima
from quant_jobs.workers.devices import Device

#: A file of text, or several with weights.
Calibration = Path | Sequence[CalibrationSource]

#: Packages whose version can change the bytes.
_TOOLS = ("intserve", "nvidia-modelopt", "torch", "transformers", "tokenizers")


@dataclass(frozen=True, slots=True)
class Job:
    """A checked job: all inputs that determine the bytes of its output."""

    source: CheckpointReader
    recipe: Recipe
    blocks: TokenBlocks
    output: Path
    device: Device = "cpu"

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What a rerun must have in common to resume. Keys are words for the error sentence."""
        return {
            "source checkpoint": self.source.fingerprint,
            "recipe": self.recipe.model_dump(mode="json"),
            "calibration text": _digest(self.calibration),
            "device": self.device,
            "tools": tools(),
        }

    @property
    def calibration(self) -> CalibrationRecord:
        """The calibration data as the manifest records it: files by digest, no paths."""
        num_blocks, block_tokens = self.blocks.ids.shape
        return CalibrationRecord(
            digest=self.blocks.digest,
            num_tokens=self.blocks.num_tokens,
            num_blocks=num_blocks,
            block_tokens=block_tokens,
            files=tuple(
                CalibrationFile(
                    sha256=file.sha256, weight=file.weight, blocks=file.blocks, tokens=file.tokens
                )
                for file in self.blocks.sources
            ),
        )


def plan_job(
    model: Path,
    recipe: Recipe | str,
    calibration: Calibration,
    output: Path,
    device: Device = "cpu",
) -> Job:
    """Check all inputs, and that `output` can be a directory. Reads tensor headers and the
    calibration text, no weights.

    Raises:
        OutputError: something is in the way of `output`, or it is inside the source.
        RecipeError: there is no such recipe, or it does not suit the model.
        CheckpointError: the source is incomplete or malformed, or has a tokenizer file that cannot
            go into the artifact.
        ConfigError: its config.json cannot be read.
        CalibrationError: see `load_token_blocks`.
    """
    check_directory(output)
    check_apart(output, model, "the source checkpoint")
    if isinstance(recipe, str):
        recipe = load_recipe(recipe)
    source = CheckpointReader(model)
    read_copied(source.directory)  # what cannot be copied is refused now, not after the last layer
    schemes = recipe.resolve(source.config)
    recipe.check_rules(source.config)
    for layer in range(source.config.num_hidden_layers):
        scaled_groups(source.config, schemes, layer)
    settings = recipe.calibration
    blocks = load_token_blocks(calibration, model, settings.num_blocks, settings.block_tokens)
    return Job(source, recipe, blocks, output, device)


def finished(job: Job, *, whole: bool = False) -> Manifest | None:
    """The manifest of a finished output of the same job; None where work is left, which includes
    making lost files again (`restore.py`). Deletes the job's folder where a kill left it.

    Every file is compared with the manifest: tensor files by size and header, and byte by byte if
    `whole` or if the artifact is small.

    Raises:
        ArtifactError: the output is finished and belongs to another job, its manifest is damaged,
            or it has lost what cannot be made again.
    """
    if not (job.output / MANIFEST_FILE).exists():
        return None
    try:
        manifest = read_manifest(job.output)
    except ArtifactError as error:
        raise ArtifactError(f"{error}; to quantize anew, delete {job.output} first") from error
    stored = {
        "source checkpoint": manifest.source.fingerprint,
        "recipe": manifest.recipe.model_dump(mode="json"),
        "calibration text": _digest(manifest.calibration),
        "device": manifest.tools.get("device", "cpu"),
        "tools": {name: manifest.tools[name] for name in manifest.tools if name != "device"},
    }
    check_same_run(job.output, stored, job.fingerprint)
    if lost_files(job.output, manifest, whole=whole):
        lost_maxima(job.output, manifest)  # refused here, before anything is written
        return None
    if (job.output / FOLDER).exists():  # killed after the manifest was written
        JobFolder(job.output, job.fingerprint).remove()
    return manifest


def tools() -> dict[str, str]:
    """Package versions that the output's bytes may depend on."""
    return {name: importlib.metadata.version(name) for name in _TOOLS}


def _digest(calibration: CalibrationRecord | None) -> str | None:
    """SHA-256 in hex of all that the manifest says about the calibration data."""
    if calibration is None:
        return None
    return hashlib.sha256(canonical_json(calibration.model_dump(mode="json"))).hexdigest()
