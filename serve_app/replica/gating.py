"""The door: only an engine whose accuracy gate passed is served. The override exists and is loud.

`EngineReplica` calls this before it makes an engine, so the rule holds for every adapter on every
cluster, and no adapter knows of it. `python -m serve_app` calls it too, before it starts Ray, so
that a user reads one sentence at once. What a verdict must say is in deepseek/artifact/verdict.py;
`quant_jobs gate` writes it.
"""

from __future__ import annotations

import logging
from pathlib import Path

from deepseek.artifact.engine_manifest import read_engine_manifest
from deepseek.artifact.verdict import require_passed
from deepseek.errors import ArtifactError

log = logging.getLogger("ray.serve")


def check_gate(engine_dir: Path | None, *, allow_ungated: bool) -> bool:
    """Whether the gate passed for exactly this engine. None is an engine that serves no artifact
    (echo): it has nothing to gate, and passes.

    Raises:
        ArtifactError: the directory is no engine; or its gate is missing, failed or judged another
            engine, and `allow_ungated` does not override that.
    """
    if engine_dir is None:
        return True
    manifest = read_engine_manifest(engine_dir)
    try:
        require_passed(
            engine_dir, engine_digest=manifest.digest, artifact_digest=manifest.artifact_digest
        )
    except ArtifactError as error:
        if not allow_ungated:
            raise ArtifactError(
                f"{error}; or accept unknown quality with --allow-ungated"
            ) from error
        log.warning("SERVING AN UNGATED ARTIFACT, its quality is unknown: %s", error)
        return False
    return True
