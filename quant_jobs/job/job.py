"""A checked job: what its output is made of."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek.artifact.manifest import (
    MANIFEST_FILE,
    CalibrationFile,
    CalibrationRecord,
    Manifest,
    read_manifest,
)
from deepseek.files import canonical_json
from deepseek.recipe import Recipe, load_recipe
from deepseek.source.checkpoint import CheckpointReader
from quant_jobs.algorithms.folding import scaled_groups
from quant_jobs.calibration.token_blocks import CalibrationSource, TokenBlocks, load_token_blocks
from quant_jobs.job.folder import FOLDER, JobFolder, check_same_run
from quant_jobs.workers.devices import Device

#: A file of text, or several with weights.
Calibration = Path | Sequence[CalibrationSource]

#: Libraries whose version can change the bytes.
_TOOLS = ("intserve", "nvidia-modelopt", "torch", "transformers", "tokenizers")


@dataclass(frozen=True, slots=True)
class Job:
    """A checked job: everything that its output is made of."""

    source: CheckpointReader
    recipe: Recipe
    blocks: TokenBlocks
    output: Path
    device: Device = "cpu"

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for a rerun to continue; keys are words for the error sentence."""
        return {
            "source checkpoint": self.source.fingerprint,
            "recipe": self.recipe.model_dump(mode="json"),
            "calibration text": _digest(self.calibration),
            "device": self.device,
            "tools": tools(),
        }

    @property
    def calibration(self) -> CalibrationRecord:
        """The calibration data for the manifest: its files by digest, no paths."""
        num_blocks, block_tokens = self.blocks.ids.shape
        return CalibrationRecord(
            digest=self.blocks.digest,
            num_tokens=self.blocks.num_tokens,
            num_blocks=num_blocks,
            block_tokens=block_tokens,
            files=tuple(
                CalibrationFile(
                    sha256=one.sha256, weight=one.weight, blocks=one.blocks, tokens=one.tokens
                )
                for one in self.blocks.sources
            ),
        )


def plan_job(
    model: Path,
    recipe: Recipe | str,
    calibration: Calibration,
    output: Path,
    device: Device = "cpu",
) -> Job:
    """Check all inputs; reads headers and the text, no weights, and writes nothing."""
    if isinstance(recipe, str):
        recipe = load_recipe(recipe)
    source = CheckpointReader(model)
    schemes = recipe.resolve(source.config)
    for layer in range(source.config.num_hidden_layers):
        scaled_groups(source.config, schemes, layer)
    settings = recipe.calibration
    blocks = load_token_blocks(calibration, model, settings.num_blocks, settings.block_tokens)
    return Job(source, recipe, blocks, output, device)


def finished(job: Job) -> Manifest | None:
    """The manifest of a finished output of this very job; None where there is work to do.

    Raises:
        ArtifactError: the output is finished, but another run's.
    """
    if not (job.output / MANIFEST_FILE).exists():
        return None
    manifest = read_manifest(job.output)
    found = {
        "source checkpoint": manifest.source.fingerprint,
        "recipe": manifest.recipe.model_dump(mode="json"),
        "calibration text": _digest(manifest.calibration),
        "device": manifest.tools.get("device", "cpu"),
        "tools": {name: manifest.tools[name] for name in manifest.tools if name != "device"},
    }
    check_same_run(job.output, found, job.fingerprint)
    if (job.output / FOLDER).exists():  # killed between the manifest and the end
        JobFolder(job.output, job.fingerprint).remove()
    return manifest


def tools() -> dict[str, str]:
    """Versions that the output's bytes may depend on."""
    return {name: importlib.metadata.version(name) for name in _TOOLS}


def _digest(calibration: CalibrationRecord | None) -> str | None:
    """SHA-256 in hex of all that the manifest says about the calibration data."""
    if calibration is None:
        return None
    return hashlib.sha256(canonical_json(calibration.model_dump(mode="json"))).hexdigest()
