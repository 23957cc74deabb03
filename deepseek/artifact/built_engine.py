"""An engine as the steps after `build` see it: its manifest, and that of its quantized checkpoint.

`build` copies config.json and intserve.json into the engine directory, so that `evaluate`, `gate`
and `report` need no other folder. Only documents are read here, no tensors; this file imports no
torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from deepseek.artifact.documents import document_object
from deepseek.artifact.engine_manifest import (
    UNQUANTIZED,
    EngineManifest,
    read_documents,
    read_engine_manifest,
)
from deepseek.artifact.manifest import (
    MANIFEST_FILE,
    Manifest,
    check_figures,
    parse_manifest,
)
from deepseek.config import ModelConfig
from deepseek.errors import ArtifactError
from deepseek.recipe import Scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """The documents of one engine directory.

    `config` is the source's, FP8 blocks included. `manifest` is the quantized checkpoint's, None
    for an engine of an unquantized source. `target` names its loader. `num_bytes` counts the
    engine's tensor files. `documents` are the engine's files beside the tensors, as verified
    against engine.json. `static_input_layers` are the layers whose INT4 experts the engine gives
    static FP8 inputs, whatever the recipe says of them: those with `input_scales` in engine.json.
    """

    directory: Path
    digest: str
    target: str
    artifact_digest: str
    source_fingerprint: str
    recipe: str
    kv_cache: str
    num_bytes: int
    config: ModelConfig
    schemes: Mapping[str, Scheme]
    manifest: Manifest | None
    documents: Mapping[str, bytes]
    static_input_layers: frozenset[int] = frozenset()


def read_engine(directory: Path) -> BuiltEngine:
    """Read the documents of an engine directory.

    Raises:
        ArtifactError: engine.json or a document is absent, edited or of another engine, or the
            directory holds what is not the engine's.
        ConfigError: config.json holds what is not implemented.
    """
    engine = read_engine_manifest(directory)
    documents = read_documents(directory, engine)
    config = ModelConfig.from_dict(document_object(directory, documents, "config.json"))
    manifest = None
    if engine.recipe != UNQUANTIZED:
        raw = document_object(directory, documents, MANIFEST_FILE)
        manifest = parse_manifest(raw, directory / MANIFEST_FILE)
        if manifest.digest != engine.artifact_digest:
            raise ArtifactError(
                f"{directory / MANIFEST_FILE} is of artifact {manifest.digest[:16]}, but the "
                f"engine was built from {engine.artifact_digest[:16]}; build again"
            )
        config = replace(config, weight_block_size=manifest.source.weight_block_size)
        check_figures(manifest, config, directory / MANIFEST_FILE)
    return BuiltEngine(
        directory=directory,
        digest=engine.digest,
        target=engine.target,
        artifact_digest=engine.artifact_digest,
        source_fingerprint=engine.source_fingerprint,
        recipe=engine.recipe,
        kv_cache=engine.kv_cache,
        num_bytes=engine.num_bytes,
        config=config,
        schemes=engine.schemes,
        manifest=manifest,
        documents=documents,
        static_input_layers=_static_input_layers(engine),
    )


def _static_input_layers(engine: EngineManifest) -> frozenset[int]:
    """The layers that `input_scales` of the target's own fields names; the target's loader checks
    what else is there."""
    scales = engine.target_fields.get("input_scales")
    layers = scales if isinstance(scales, dict) else {}
    return frozenset(int(layer) for layer in layers if layer.isdecimal() and len(layer) < 9)
