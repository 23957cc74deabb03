"""What an engine of any target takes over from the checkpoint that it is built from."""

from __future__ import annotations

from typing import TypedDict

from deepseek import untrusted
from deepseek.artifact.engine_manifest import UNQUANTIZED
from deepseek.artifact.manifest import MANIFEST_FILE
from deepseek.artifact.reader import ArtifactReader
from deepseek.engine.packing import Source
from deepseek.errors import ArtifactError
from deepseek.untrusted import UnusableFileError


class Origin(TypedDict):
    """The fields of `EngineManifest` that name the checkpoint."""

    recipe: str
    artifact_digest: str
    source_fingerprint: str


def origin_of(source: Source) -> Origin:
    """What the engine is built from; of a source checkpoint both digests are its fingerprint."""
    if isinstance(source, ArtifactReader):
        return Origin(
            recipe=source.recipe.name,
            artifact_digest=source.digest,
            source_fingerprint=source.manifest.source.fingerprint,
        )
    return Origin(
        recipe=UNQUANTIZED,
        artifact_digest=source.fingerprint,
        source_fingerprint=source.fingerprint,
    )


def manifest_bytes(source: ArtifactReader) -> bytes:
    """The artifact's intserve.json as it is.

    Raises:
        ArtifactError: it cannot be read.
    """
    path = source.directory / MANIFEST_FILE
    try:
        return untrusted.read_bytes(path, root=source.directory)
    except UnusableFileError as error:
        raise ArtifactError(f"{path} {error}") from error
