"""All pools of a service serve the same model to its clients, each from an engine of its own.

Their engines may be quantized in different ways and run on other KV pages; what a client sees of
the model, its tokens and its chat template, must not depend on where a request runs.
"""

from __future__ import annotations

from collections.abc import Mapping

from deepseek.artifact.documents import COPIED_FILES
from deepseek.errors import ArtifactError
from serve_app.config import PoolSection, ServeConfig
from serve_app.engine_sections import DIRECTORY_KINDS
from serve_app.gating import Admitted, Depth, admit


def admit_pools(config: ServeConfig, depth: Depth = "documents") -> dict[str, Admitted]:
    """Check the engine directory of each pool at its own KV format (`gating.admit`), and that all
    were made from the same model. Empty where no pool has a directory.

    Raises:
        ArtifactError: one is not admitted, or two do not serve the same.
        DeployError: its loader would not load it.
    """
    admitted: dict[str, Admitted] = {}
    for name, pool in config.pools.items():
        if pool.directory is None:
            continue
        admitted[name] = admit(
            pool.directory,
            kv_cache=pool.kv_cache,
            allow_ungated=pool.gate.allow_ungated,
            require_signature=pool.gate.require_signature,
            depth=depth,
        )
        check_kind(name, pool, admitted[name])
    check_same(admitted)
    return admitted


def check_kind(name: str, pool: PoolSection, admitted: Admitted) -> None:
    """Raises ArtifactError unless the directory was built for the kind of engine that the pool
    has."""
    kind, target = pool.engine.kind, admitted.arithmetic
    if kind != target:
        served = target in DIRECTORY_KINDS
        remedy = f"write kind: {target}, or build" if served else "build"
        raise ArtifactError(
            f"pools.{name}.engine: {pool.directory} was built for {target}, and the kind is "
            f"{kind}; {remedy} with --target {kind}"
        )


def check_same(admitted: Mapping[str, Admitted]) -> None:
    """Raises ArtifactError, in one sentence, unless these pools serve one model."""
    names = list(admitted)
    for name in names[1:]:
        first, other = admitted[names[0]], admitted[name]
        if first.source_fingerprint != other.source_fingerprint:
            raise ArtifactError(
                f"pools {names[0]} and {name} serve different models: their engines were built "
                "from other source checkpoints; build both from the same"
            )
        for document in COPIED_FILES:
            if first.documents.get(document) != other.documents.get(document):
                raise ArtifactError(
                    f"pools {names[0]} and {name} serve different models: {document} of their "
                    "engines is not the same; build both from the same checkpoint"
                )
