"""The state of an unfinished job on disk, from which the next run of the same command resumes.

    OUTPUT/.job/lock                                     flock: released when its driver dies
    OUTPUT/.job/job.json                                 fingerprint of the job's inputs
    OUTPUT/.job/part-00003.json                          layer 3 is published: its PublishedFile
    OUTPUT/.job/source-00003.json                        digests of what layer 3 was first read as
    OUTPUT/.job/source-embedding.json                    the same of the embedding, where the head
                                                         is quantized, so that the globals come last
    OUTPUT/.job/boundary-00004/worker-*.safetensors      inputs of layer 4, by calibration block

A layer counts as published when its part-*.json exists, which is written after the layer's own
file. A boundary is complete when it has all blocks; boundary 0 is the embedding and is never
stored. The digests of a layer's source tensors are recorded before the layer is published, so that
a run that reads it again notices a source that has changed (`source_watch.py`). The driver deletes
a boundary once a later layer is published, and .job itself after intserve.json is written. Workers
write the boundaries (`workers/boundary.py`).

Disk space beside the output: one boundary, two while the next is being written; B*T*D*4 bytes each
(float32: 2.1 M tokens of DeepSeek-V3 are 60 GB).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open

from deepseek.artifact.input_maxima import LayerMaxima
from deepseek.artifact.manifest import MANIFEST_FILE, Fallback, LayerKey, LayerRecord
from deepseek.artifact.tensors import layer_file
from deepseek.errors import ArtifactError
from deepseek.files import canonical_json, remove_scraps, sha256_file, write_json
from deepseek.outputs import check_directory, make_directory, writing
from deepseek.recipe import Recipe
from deepseek.tensor_files import tensor_digest
from deepseek.untrusted import UnusableFileError, read_json_object
from quant_jobs.run_folder import (
    FolderLock,
    delete_tree,
    pin_inputs,
    refuse_foreign_files,
    short,
)
from quant_jobs.workers.boundary import block_name, stored_blocks

FOLDER = ".job"


class PublishedFile(BaseModel):
    """One published tensor file, and what the manifest will record about its layer. `input_maxima`
    are those of its routed experts; None where it has none, or where an earlier version, which did
    not keep them, has published it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    record: LayerRecord
    coverage: tuple[int, ...] = ()
    fallbacks: tuple[Fallback, ...] = ()
    kv_latent_amax: float | None = None
    input_maxima: LayerMaxima | None = None


class JobFolder:
    """OUTPUT/.job of one running job. Opening it takes the lock; `release` or `remove` frees it.

    Raises on opening:
        ArtifactError: another process writes this output, or it belongs to another job.
        OutputError: it cannot be written, here and in every method that writes or deletes.
    """

    def __init__(self, output: Path, fingerprint: dict[str, Any]) -> None:
        self.output = output
        self.path = output / FOLDER
        check_directory(output)
        refuse_foreign_files(output, self.path, MANIFEST_FILE, "quantize")
        make_directory(self.path)
        self._lock = FolderLock(self.path, output, "quantize")
        try:
            self._pin(fingerprint)
            self._remove_scraps()
        except BaseException:
            self.release()
            raise

    def __enter__(self) -> JobFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Release the lock. The files stay for the next run."""
        self._lock.release()

    def remove(self) -> None:
        """Delete the folder of a finished job, the lock file last, and release the lock."""
        self._lock.remove_folder()

    # --- published files ---

    def save_published(self, file: PublishedFile) -> None:
        """Record a file as published; it must be on disk already."""
        content = file.model_dump(mode="json")
        digest = hashlib.sha256(canonical_json(content)).hexdigest()
        write_json(self._record_path(file.record.layer), content | {"digest": digest})

    def load_published(self, *, forget_damaged: bool = False) -> dict[LayerKey, PublishedFile]:
        """Every published file that still exists, verified by its digest. The layer of a deleted
        file is forgotten, and so quantized again; with `forget_damaged` that of a damaged one too.

        Raises:
            ArtifactError: a record is damaged, or a file has other bytes than were published; names
                it and the tensor.
        """
        published: dict[LayerKey, PublishedFile] = {}
        for record_path in sorted(self.path.glob("part-*.json")):
            file = self._read_published(record_path)
            path = self.output / file.record.file
            intact = path.exists() and _digest(path) == file.record.sha256
            if not intact and (forget_damaged or not path.exists()):
                with writing(record_path):
                    record_path.unlink()
                continue
            if not intact:
                raise ArtifactError(
                    f"{path} is damaged: {_damaged_tensor(path, file.record)} not as it was "
                    "published; delete that file and run again, which makes it anew"
                )
            published[file.record.layer] = file
        return published

    def _read_published(self, path: Path) -> PublishedFile:
        """One record, which must be about the file that its own name stands for."""
        try:
            raw = read_json_object(path)
            # A record of a job that an earlier version began has no digest.
            digest = raw.pop("digest", None)
            written = hashlib.sha256(canonical_json(raw)).hexdigest()
            file = PublishedFile.model_validate(raw)
        except (UnusableFileError, ValidationError) as error:
            reason = "is damaged" if isinstance(error, ValidationError) else str(error)
            raise ArtifactError(f"{path} {reason}; delete it and run again") from error
        if digest not in (None, written):
            raise ArtifactError(
                f"{path} is damaged: it was changed after it was written; delete it and run again"
            )
        layer = file.record.layer
        if self._record_path(layer) != path or file.record.file != layer_file(layer):
            raise ArtifactError(
                f"{path} is damaged: it names layer {layer} and the file {file.record.file!r}; "
                "delete it and run again"
            )
        return file

    def _record_path(self, layer: LayerKey) -> Path:
        return self.path / f"part-{layer if layer == 'globals' else f'{layer:05d}'}.json"

    # --- the source ---

    def record_source(
        self, layer: int | Literal["embedding"], digests: Mapping[str, str]
    ) -> str | None:
        """Record the digests of the source tensors (by name) that this layer is made from, or that
        of the embedding; where they are recorded already, compare. Returns the first tensor that
        differs, or None.

        Raises:
            ArtifactError: the record is damaged.
        """
        name = layer if layer == "embedding" else f"{layer:05d}"
        path = self.path / f"source-{name}.json"
        if not path.exists():
            write_json(path, dict(digests))
            return None
        try:
            recorded = read_json_object(path)
        except UnusableFileError as error:
            raise ArtifactError(f"{path} {error}; delete it and run again") from error
        differing = sorted(
            name
            for name in recorded.keys() | digests.keys()
            if recorded.get(name) != digests.get(name)
        )
        return differing[0] if differing else None

    # --- boundaries ---

    def boundary(self, layer: int) -> Path:
        """The folder with the inputs of this layer."""
        return self.path / f"boundary-{layer:05d}"

    def make_boundary(self, layer: int) -> Path:
        """Make that folder, unless it is there."""
        path = self.boundary(layer)
        with writing(path):
            path.mkdir(exist_ok=True)
        return path

    @property
    def boundary_bytes(self) -> int:
        """Bytes of all boundary files."""
        return sum(path.stat().st_size for path in self.path.glob("boundary-*/*") if path.is_file())

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
                with writing(path):
                    delete_tree(path)

    # --- ownership ---

    def _pin(self, fingerprint: dict[str, Any]) -> None:
        stored, current = pin_inputs(self.path / "job.json", fingerprint, self.output)
        stored["recipe"] = _with_defaults(stored.get("recipe"))
        check_same_run(self.output, stored, current)

    def _remove_scraps(self) -> None:
        """Delete what killed writers left, so that it takes no space beside the output."""
        for folder in (self.output, self.path, *self.path.glob("boundary-*")):
            remove_scraps(folder)


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
            difference = f"with another {key} ({short(theirs)}, now {short(ours)})"
        raise ArtifactError(
            f"{output} holds a run of {name}, {difference}; choose another --output or delete it"
        )


def _damaged_tensor(file: Path, record: LayerRecord) -> str:
    """`tensor a is`, for the first tensor whose bytes differ from the record's."""
    try:
        with safe_open(file, framework="pt") as opened:
            for name, digest in record.tensors.items():
                if tensor_digest(opened.get_tensor(name)) != digest:
                    return f"tensor {name} is"
    except (OSError, SafetensorError):
        pass
    return "its header is"


def _with_defaults(recipe: Any) -> Any:
    """A stored recipe, of which an earlier version may not have known every field, with the
    defaults of what it lacks; as it is where it is none."""
    try:
        return Recipe.model_validate(recipe).model_dump(mode="json")
    except ValidationError:
        return recipe


def _recipe_name(fingerprint: dict[str, Any]) -> str:
    recipe = fingerprint.get("recipe")
    return str(recipe.get("name")) if isinstance(recipe, dict) else "None"


def _digest(path: Path) -> str | None:
    """SHA-256 of a published file; None where it is no regular file."""
    try:
        return sha256_file(path) if path.is_file() else None
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be read ({error.strerror}); see the state of the disk or mount, then "
            "run again"
        ) from error
