"""Only an artifact whose accuracy gate passed is served; the override exists, and it is loud.

Called twice: by the command before anything starts, for one clear sentence, and by the replica that
loads the engine, which is where the rule is enforced on a cluster.
"""

from __future__ import annotations

import logging
from pathlib import Path

from deepseek.errors import ArtifactError

log = logging.getLogger("ray.serve")


def check_gate(directory: Path, *, allow_ungated: bool) -> bool:
    """Whether the gate passed for exactly this engine.

    Raises:
        ArtifactError: the directory is no engine, or its gate is missing, failed or judged another
            engine, and `allow_ungated` does not override that.
    """
    from deepseek.artifact.engine_manifest import read_engine_manifest
    from deepseek.artifact.verdict import require_passed

    manifest = read_engine_manifest(directory)
    try:
        require_passed(
            directory, engine_digest=manifest.digest, artifact_digest=manifest.artifact_digest
        )
    except ArtifactError as error:
        if not allow_ungated:
            raise ArtifactError(
                f"{error}; or accept unknown quality with --allow-ungated"
            ) from error
        log.warning("SERVING AN UNGATED ARTIFACT, its quality is unknown: %s", error)
        return False
    return True
