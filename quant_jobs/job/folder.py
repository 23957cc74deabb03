"""The state of an unfinished job on disk, from which the next run of the same command resumes.

    OUTPUT/.job/lock                                     flock: released when its driver dies
    OUTPUT/.job/job.json                                 fingerprint of the job's inputs
    OUTPUT/.job/part-00003.json                          layer 3 is published: its PublishedFile
    OUTPUT/.job/boundary-00004/worker-*.safetensors      inputs of layer 4, by calibration block

A layer counts as published when its part-*.json exists, which is written after the layer's own
file. A boundary is complete when it has all blocks; boundary 0 is the embedding and is never
stored. The driver deletes a boundary once a later layer is published, and .job itself after
intserve.json is written. Workers write the boundaries (`workers/boundary.py`).

Disk space beside the output: one boundary, two while the next is being written; B*T*D*4 bytes each
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
#: Attempts to delete a folder into which a worker may still write.
_REMOVALS = 10


class PublishedFile(BaseModel):
    """One published tensor file, and what the manifest will record about its layer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    record: LayerRecord
    coverage: tuple[int, ...] = ()
    fallbacks: tuple[Fallback, ...] = ()
    kv_latent_amax: float | None = None


class JobFolder:
    """OUTPUT/.job of one running job. Opening it takes the lock; `release` or `remove` frees it.

    Raises on opening:
        ArtifactError: another process writes this output, or it belongs to another job.
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
        """Release the lock. The files stay for the next run."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def remove(self) -> None:
        """Delete the folder of a finished job, the lock file last, and release the lock."""
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
        """Every published file that still exists, verified by its digest. The layer of a deleted
        file is forgotten, and so quantized again.

        Raises:
            ArtifactError: a file has other bytes than were published; names it and the tensor.
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
        """The folder with the inputs of this layer."""
        return self.path / f"boundary-{layer:05d}"

    def last_boundary(self, num_blocks: int, at_most: int) -> int:
        """The last layer up to `at_most` whose boundary is complete; that of layer 0, the
        embedding, always is.

        Raises:
            ArtifactError: a boundary file is damaged.
        """
        required = {block_name(block) for block in range(num_blocks)}
        for layer in range(at_most, 0, -1):
            if required <= stored_blocks(self.boundary(layer)):
                return layer
        return 0

    def delete_boundaries(self, *, before: int) -> None:
        for path in sorted(self.path.glob("boundary-*")):
            if path.name < self.boundary(before).name:
                _remove_folder(path)

    # --- ownership ---

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
        current = json.loads(json.dumps(fingerprint))
        if not path.exists():
            write_json(path, current)
            return
        try:
            stored = json.loads(path.read_bytes())
        except ValueError as error:
            raise ArtifactError(f"{path} is damaged; delete {self.output}") from error
        check_same_run(self.output, stored, current)


def check_same_run(output: Path, stored: dict[str, Any], current: dict[str, Any]) -> None:
    """Compare the fingerprint stored with `output` with the current job's. Keys are words for the
    error sentence.

    Raises:
        ArtifactError: they differ; the sentence names the input that does.
    """
    for key in sorted(stored.keys() | current.keys()):
        theirs, ours = stored.get(key), current.get(key)
        if theirs == ours:
            continue
        name = f"recipe {_recipe_name(stored)}"
        if key == "recipe" and _recipe_name(stored) != _recipe_name(current):
            difference = f"not {_recipe_name(current)}"
        elif key == "recipe":
            difference = "whose rules or settings have changed since"
        else:
            difference = f"with another {key} ({_short(theirs)}, now {_short(ours)})"
        raise ArtifactError(
            f"{output} holds a run of {name}, {difference}; choose another --output or delete it"
        )


def _remove_folder(path: Path) -> None:
    """Delete a boundary, even while a worker that counts as dead still writes into it: one whose
    node lost its network link finishes its last call."""
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
