"""Which directory a replica loads: the copy on its own node, where it is the same engine, whole.

`build --stage DIR` copies an engine to a disk of every node; `engine.staged: DIR` in the
configuration names the same place, `{node}` in it included. The gate's verdict is always read from
the directory that all nodes share, because a copy may be older than it. A copy that is missing, of
another engine or damaged is no fault: the log says so, and the shared directory is loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepseek.artifact.engine_manifest import read_documents, read_engine_manifest
from deepseek.errors import ArtifactError, IntServeError, first_line
from deepseek.files import is_intact
from serve_app.engine_sections import DirectoryOptions
from serve_app.engines.protocol import Engine, LoadProgress
from serve_app.gating import Admitted, admit, check_tensors

log = logging.getLogger("ray.serve")

#: Stands for Ray's id of the node, as in `build --stage`.
NODE = "{node}"


@dataclass(frozen=True, slots=True)
class EngineOf:
    """An engine factory that knows its directory, so that a copy may take its place. It is
    pickled."""

    make: Callable[[Any], Engine]
    options: DirectoryOptions

    def __call__(self) -> Engine:
        return self.make(self.options)

    def at(self, directory: Path) -> EngineOf:
        """The same with another directory."""
        return EngineOf(self.make, self.options.model_copy(update={"directory": directory}))


def engine_at(make_engine: Callable[[], Engine], directory: Path) -> Callable[[], Engine]:
    """The factory for this directory, where it is one that has a directory."""
    return make_engine.at(directory) if isinstance(make_engine, EngineOf) else make_engine


def copy_on(staged: Path, node: str) -> Path:
    """The place of a node's copy; `node` is Ray's id of it."""
    return Path(str(staged).replace(NODE, node))


def admit_for_loading(
    engine_dir: Path,
    staged: Path | None,
    *,
    node: str,
    kv_cache: str | None,
    allow_ungated: bool,
    require_signature: Path | None,
    progress: Callable[[LoadProgress], None],
) -> tuple[Admitted, Path]:
    """Admit the engine (`gating.admit`), and verify every byte of the directory that is to be
    loaded, which is returned: the node's copy where it can be used, else `engine_dir`.

    Raises:
        ArtifactError, DeployError: as `gating.admit`.
    """

    def told(what: str) -> Callable[[int, int], None]:
        return lambda done, total: progress(LoadProgress(f"verifying {what}", done, total))

    if staged is not None:
        admitted = admit(
            engine_dir,
            kv_cache=kv_cache,
            allow_ungated=allow_ungated,
            require_signature=require_signature,
        )
        local = copy_on(staged, node)
        try:
            _check_copy(local, admitted, told("the copy on this node"))
        except IntServeError as error:
            log.warning("not loading the copy on this node, but %s: %s", engine_dir, error)
        except OSError as error:
            log.warning("not loading %s, but %s: %s", local, engine_dir, first_line(error))
        else:
            log.info("loading the copy on this node, %s", local)
            return admitted, local
    admitted = admit(
        engine_dir,
        kv_cache=kv_cache,
        allow_ungated=allow_ungated,
        require_signature=require_signature,
        depth="bytes",
        progress=told("the engine's files"),
    )
    return admitted, engine_dir


def _check_copy(local: Path, admitted: Admitted, progress: Callable[[int, int], None]) -> None:
    """Raises an IntServeError or OSError unless `local` is a whole copy of the admitted engine."""
    manifest = read_engine_manifest(local)
    if manifest.digest != admitted.engine_digest:
        raise ArtifactError(
            f"{local} is another engine ({manifest.digest[:12]}, not "
            f"{admitted.engine_digest[:12]}); run `build --stage` again"
        )
    read_documents(local, manifest)
    if manifest.target != "embedded":
        check_tensors(local, manifest.target, digests=True, progress=progress)
        return
    # That engine verifies what it loads, but then it is too late to load the other directory.
    done = 0
    for name, file in manifest.tensor_files.items():
        progress(done, manifest.num_bytes)
        if not is_intact(local / name, file.num_bytes, file.sha256):
            raise ArtifactError(f"{local / name} is damaged; run `build --stage` again")
        done += file.num_bytes
