"""What a killed job leaves behind, and how the next run of the same command takes it up.

    OUTPUT/.job/lock                                     held by flock: dies with its driver
    OUTPUT/.job/job.json                                 what the output is made of
    OUTPUT/.job/part-00003.json                          layer 3 is published: what is known of it
    OUTPUT/.job/boundary-00004/worker-*.safetensors      what goes into layer 4, by block

A layer counts as published when its part file exists, which is written after the layer's own file.
A boundary counts when it has all blocks; boundary 0 is the embedding and is never stored. Old
boundaries go once the next is complete, and all of .job goes last of all, after intserve.json.

On disk beside the output: one boundary, two while the next is being written; B*T*D*4 bytes each
(float32: 2.1 M tokens of DeepSeek-V3 are 60 GB).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open

from deepseek.artifact.manifest import MANIFEST_FILE, Fallback, LayerKey, LayerRecord
from deepseek.errors import ArtifactError
from deepseek.files import sha256_file, write_json
from deepseek.tensor_files import tensor_digest
from quant_jobs.workers.boundary import block_name, stored_blocks

FOLDER = ".job"
#: Times that a folder is deleted before that which keeps appearing in it is an error.
_REMOVALS = 10


class PublishedFile(BaseModel):
    """One published tensor file, and what was learned on the way, as the manifest will need it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    record: LayerRecord
    coverage: tuple[int, ...] = ()
    fallbacks: tuple[Fallback, ...] = ()
    kv_latent_amax: float | None = None


class JobFolder:
    """OUTPUT/.job of one running job; opening it takes the lock.

    Raises on opening:
        ArtifactError: another process writes this output, or it holds another run's work.
    """

    def __init__(self, output: Path, fingerprint: dict[str, Any]) -> None:
        self.output = output
        self.path = output / FOLDER
        self._refuse_foreign_files()
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock: int | None = self._take_lock()
        try:
            self._pin(fingerprint)
        except BaseException:
            self.release()
            raise

    def __enter__(self) -> JobFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give up the lock; everything else stays for the next run."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def remove(self) -> None:
        """The job is done: delete the folder, the lock last of all."""
        for path in sorted(self.path.iterdir()):
            if path.name != "lock":
                _remove_folder(path) if path.is_dir() else path.unlink()
        (self.path / "lock").unlink()
        self.path.rmdir()
        self.release()

    # --- published files ---

    def save_published(self, file: PublishedFile) -> None:
        """Record a file as published; it must be on disk already."""
        write_json(self._record_path(file.record.layer), file.model_dump(mode="json"))

    def load_published(self) -> dict[LayerKey, PublishedFile]:
        """Every published file that is still there, verified byte by byte.

        A file that was deleted is simply made again.

        Raises:
            ArtifactError: a file is not the one that was published; names it and the tensor.
        """
        published: dict[LayerKey, PublishedFile] = {}
        for record_path in sorted(self.path.glob("part-*.json")):
            try:
                file = PublishedFile.model_validate_json(record_path.read_bytes())
            except ValidationError as error:
                raise ArtifactError(f"{record_path} is damaged; delete it and run again") from error
            path = self.output / file.record.file
            if not path.exists():
                record_path.unlink()
                continue
            if sha256_file(path) != file.record.sha256:
                raise ArtifactError(
                    f"{path} is damaged: {_damaged_tensor(path, file.record)} not as it was "
                    "published; delete that file and run again, which makes it anew"
                )
            published[file.record.layer] = file
        return published

    def _record_path(self, layer: LayerKey) -> Path:
        return self.path / f"part-{layer if layer == 'globals' else f'{layer:05d}'}.json"

    # --- boundaries ---

    def boundary(self, layer: int) -> Path:
        """Folder of what goes into this layer."""
        return self.path / f"boundary-{layer:05d}"

    def last_boundary(self, num_blocks: int, at_most: int) -> int:
        """The last complete boundary up to layer `at_most`; 0, the embedding, is always there."""
        wanted = {block_name(block) for block in range(num_blocks)}
        for layer in range(at_most, 0, -1):
            if wanted <= stored_blocks(self.boundary(layer)):
                return layer
        return 0

    def delete_boundaries(self, *, before: int) -> None:
        for path in sorted(self.path.glob("boundary-*")):
            if path.name < self.boundary(before).name:
                _remove_folder(path)

    # --- whose folder is it? ---

    def _refuse_foreign_files(self) -> None:
        if not self.output.is_dir() or self.path.is_dir():
            return
        if (self.output / MANIFEST_FILE).exists():
            return
        foreign = sorted(path.name for path in self.output.iterdir())
        if foreign:
            raise ArtifactError(
                f"{self.output} is not empty ({foreign[0]}) and not an output of quantize; "
                "choose another --output"
            )

    def _take_lock(self) -> int:
        path = self.path / "lock"
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.pread(handle, 32, 0).decode(errors="replace").strip()
                os.close(handle)
                raise ArtifactError(
                    f"{self.output} is being written by another quantize (process {owner}); wait "
                    "for it or choose another --output"
                ) from None
            # The file may have been deleted, by a job that ended, between opening and locking.
            if path.exists() and os.fstat(handle).st_ino == path.stat().st_ino:
                break
            os.close(handle)
            self.path.mkdir(exist_ok=True)
        os.truncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        return handle

    def _pin(self, fingerprint: dict[str, Any]) -> None:
        path = self.path / "job.json"
        wanted = json.loads(json.dumps(fingerprint))
        if not path.exists():
            write_json(path, wanted)
            return
        try:
            found = json.loads(path.read_bytes())
        except ValueError as error:
            raise ArtifactError(f"{path} is damaged; delete {self.output}") from error
        check_same_run(self.output, found, wanted)


def check_same_run(output: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Hold the fingerprint of the run in `output` against this run's; keys are what they name.

    Raises:
        ArtifactError: they differ; the sentence says in what.
    """
    for what in sorted(found.keys() | wanted.keys()):
        theirs, ours = found.get(what), wanted.get(what)
        if theirs == ours:
            continue
        name = f"recipe {_recipe_name(found)}"
        if what == "recipe" and _recipe_name(found) != _recipe_name(wanted):
            difference = f"not {_recipe_name(wanted)}"
        elif what == "recipe":
            difference = "whose rules or settings have changed since"
        else:
            difference = f"with another {what} ({_short(theirs)}, now {_short(ours)})"
        raise ArtifactError(
            f"{output} holds a run of {name}, {difference}; choose another --output or delete it"
        )


def _remove_folder(path: Path) -> None:
    """Delete a boundary, also while a worker that was given up for dead still writes into it: on a
    node that lost its link, one ends its last call."""
    for _ in range(_REMOVALS):
        with contextlib.suppress(OSError):  # not empty after all
            shutil.rmtree(path)
            return
    shutil.rmtree(path)


def _damaged_tensor(file: Path, record: LayerRecord) -> str:
    """`tensor a is`, for the first tensor whose bytes differ from the record's."""
    try:
        with safe_open(file, framework="pt") as opened:
            for name, digest in record.tensors.items():
                if tensor_digest(opened.get_tensor(name)) != digest:
                    return f"tensor {name} is"
    except SafetensorError:
        pass
    return "its header is"


def _recipe_name(fingerprint: dict[str, Any]) -> str:
    return str((fingerprint.get("recipe") or {}).get("name"))


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text[:12] if len(text) == 64 else text
