"""The door: only an engine whose accuracy gate passed is served, and it is served as it was judged:
to its target, in the same arithmetic, on KV pages of the same format. The override exists and is
loud.

`EngineReplica` opens it before it makes an engine, and the ingress before it loads a tokenizer, so
the rule holds for every adapter on every cluster and for every file of the engine that a process
uses; no adapter knows of it. `python -m serve_app` calls it too, before it starts Ray, so that a
user reads one sentence at once. What a verdict must say is in deepseek/artifact/verdict.py;
`quant_jobs gate` writes it.

The embedded engine verifies every tensor that it loads. Other targets' loaders verify none, so
their directories are checked here as `build --check` does (deepseek/target_engine.py): by names,
types and shapes before Ray starts, and every byte in the replica before its engine is made.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from deepseek.artifact.engine_manifest import read_documents, read_engine_manifest
from deepseek.artifact.verdict import require_passed
from deepseek.errors import ArtifactError

log = logging.getLogger("ray.serve")

#: The target whose engine verifies every tensor whenever it loads.
EMBEDDED = "embedded"
#: How far an engine directory is read: its documents; names, types and shapes too; every byte.
Depth = Literal["documents", "headers", "bytes"]


@dataclass(frozen=True, slots=True)
class Admitted:
    """An engine directory that may be served: its digest, the arithmetic (the name of a target) and
    the KV format that it may be served with, whether its gate passed for them, and its documents as
    they were verified against that digest. `source_fingerprint` names the model that it was made
    from. `emulated`: its figures were computed in the target's
    arithmetic, by another engine than the target's own."""

    engine_digest: str
    arithmetic: str
    kv_cache: str
    gated: bool
    documents: Mapping[str, bytes]
    source_fingerprint: str
    emulated: bool = False

    def check_started(
        self, engine_dir: Path, *, engine_digest: str | None, arithmetic: str, kv_cache: str | None
    ) -> None:
        """Check that an engine started as it was admitted. `engine_digest` None: the adapter loads
        no engine directory (echo), so there is nothing to compare.

        Raises:
            ArtifactError: it loaded another engine, or computes otherwise, or on other KV pages.
        """
        if engine_digest is None:
            return
        for what, admitted, started in (
            ("engine", self.engine_digest, engine_digest),
            ("arithmetic", self.arithmetic, arithmetic),
            ("KV format", self.kv_cache, kv_cache or "unknown"),
        ):
            if started != admitted:
                raise ArtifactError(
                    f"{engine_dir} was not loaded as it was admitted: {what} {started[:16]} where "
                    f"{admitted[:16]} was; start again"
                )


def check_tensors(
    engine_dir: Path,
    target: str,
    *,
    digests: bool,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Read the tensors of a directory whose loader does not verify them itself; raises as `admit`
    does. The embedded engine's does, so nothing is imported for it."""
    if target == EMBEDDED:
        return
    from deepseek.target_engine import check_directory  # brings torch, which an ingress has not

    told: dict[str, Callable[[int, int], None]] = {} if progress is None else {"progress": progress}
    check_directory(engine_dir, target, digests=digests, **told)


def admit(
    engine_dir: Path,
    *,
    kv_cache: str | None,
    allow_ungated: bool = False,
    require_signature: Path | None = None,
    depth: Depth = "documents",
    progress: Callable[[int, int], None] | None = None,
) -> Admitted:
    """Check that the gate passed for exactly this engine, on KV pages of the format `kv_cache`
    (None: as it was built), and that the directory holds this engine and nothing else.
    `require_signature` is the PEM file of the public key that the verdict must be signed with.
    `depth` is how far the tensors of a loader are read that does not verify them itself, and
    `progress` gets the bytes that were read, and those in all.

    Raises:
        ArtifactError: the directory is no engine, or a file in it is not the engine's; or its gate
            is missing, failed, unsigned, or judged another engine, target, arithmetic or KV format,
            and `allow_ungated` does not override that.
        DeployError: its loader would not load it, or would load something else.
    """
    manifest = read_engine_manifest(engine_dir)
    if depth != "documents":
        check_tensors(engine_dir, manifest.target, digests=depth == "bytes", progress=progress)
    admitted = Admitted(
        engine_digest=manifest.digest,
        arithmetic=manifest.target,  # each target's engines are computed by that target
        kv_cache=kv_cache or manifest.kv_cache,
        gated=True,
        documents=read_documents(engine_dir, manifest),
        source_fingerprint=manifest.source_fingerprint,
    )
    try:
        verdict = require_passed(
            engine_dir,
            engine_digest=manifest.digest,
            artifact_digest=manifest.artifact_digest,
            target=manifest.target,
            arithmetic=admitted.arithmetic,
            kv_cache=admitted.kv_cache,
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
        return replace(admitted, gated=False)
    if verdict.is_emulated:
        log.info(
            "%s was judged by an emulation: %s computed its figures in the arithmetic of %s",
            engine_dir,
            verdict.executed_by,
            verdict.arithmetic,
        )
    return replace(admitted, emulated=verdict.is_emulated)
