"""The door: only an engine whose accuracy gate passed is served. The override exists and is loud.

`EngineReplica` opens it before it makes an engine, and the ingress before it loads a tokenizer, so
the rule holds for every adapter on every cluster and for every file of the engine that a process
uses; no adapter knows of it. `python -m serve_app` calls it too, before it starts Ray, so that a
user reads one sentence at once. What a verdict must say is in deepseek/artifact/verdict.py;
`quant_jobs gate` writes it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from deepseek.artifact.engine_manifest import read_documents, read_engine_manifest
from deepseek.artifact.verdict import require_passed
from deepseek.errors import ArtifactError

log = logging.getLogger("ray.serve")


@dataclass(frozen=True, slots=True)
class Admitted:
    """An engine directory that may be served: the digest that was judged, whether its gate passed,
    and its documents as they were verified against that digest."""

    engine_digest: str
    gated: bool
    documents: Mapping[str, bytes]


def admit(
    engine_dir: Path, *, allow_ungated: bool = False, require_signature: Path | None = None
) -> Admitted:
    """Check that the gate passed for exactly this engine, and that the directory holds this engine
    and nothing else. `require_signature` is the PEM file of the public key that the verdict must be
    signed with.

    Raises:
        ArtifactError: the directory is no engine, or a file in it is not the engine's; or its gate
            is missing, failed, unsigned or judged another engine, and `allow_ungated` does not
            override that.
    """
    manifest = read_engine_manifest(engine_dir)
    documents = read_documents(engine_dir, manifest)
    try:
        require_passed(
            engine_dir,
            engine_digest=manifest.digest,
            artifact_digest=manifest.artifact_digest,
            signed_by=require_signature,
        )
    except ArtifactError as error:
        if require_signature is not None:
            raise
        if not allow_ungated:
            raise ArtifactError(
                f"{error}; or accept unknown quality with --allow-ungated"
            ) from error
        log.warning("SERVING AN UNGATED ARTIFACT, its quality is unknown: %s", error)
        return Admitted(manifest.digest, gated=False, documents=documents)
    return Admitted(manifest.digest, gated=True, documents=documents)
