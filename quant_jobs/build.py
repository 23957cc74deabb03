"""Step 5, build: the engine of one target, from a quantized checkpoint or from a source.

Which target is the one choice made here; the layout itself belongs to the target
(`deepseek/engine/packed.py` for the embedded engine). What a target could never load is refused
with the deployability matrix's reason before a byte is written. The manifest of the quantized
checkpoint goes along into the engine's folder, so that evaluate, gate and report need no other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from deepseek.artifact import ArtifactReader
from deepseek.checkpoint import CheckpointReader
from deepseek.config import ModelConfig
from deepseek.engine.packed import pack_engine, read_engine_manifest
from deepseek.errors import ArtifactError, DeployError
from deepseek.files import write_atomic
from deepseek.manifest import MANIFEST_FILE, Manifest, read_manifest
from deepseek.recipe import Scheme

TARGETS = ("embedded", "trtllm", "vllm", "sglang")


class BuildResult(BaseModel):
    """What `build --json` prints. `artifact_digest` and `recipe` are None for a baseline engine;
    `bytes` counts all files of the engine."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    output: str
    target: str
    tp: int
    recipe: str | None
    engine_digest: str
    artifact_digest: str | None
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """An engine directory as the later steps see it. `manifest` is None for an engine of an
    unquantized source; `config` is the source's, FP8 blocks included."""

    directory: Path
    digest: str
    kv_cache: str
    source_fingerprint: str
    config: ModelConfig
    manifest: Manifest | None

    @property
    def artifact_digest(self) -> str | None:
        return self.manifest.digest if self.manifest else None

    @property
    def schemes(self) -> Mapping[str, Scheme] | None:
        """Scheme of every linear, None when unquantized."""
        return self.manifest.recipe.resolve(self.config) if self.manifest else None
