"""Build an engine directory that is a Hugging Face checkpoint: a tensor file per decoder layer, one
for the rest, documents beside them, and engine.json last, whose presence means that it is complete.

A target decides everything first (`LayeredBuild`) and brings the maker
of its files, which calls `write_layer` for one file at a time. One file is one task (`sharded.py`),
on Ray or in this process. The bytes do not depend on the number of workers, and a killed build goes
on with the files that are missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek.artifact.engine_manifest import (
    ENGINE_FILE,
    EngineManifest,
    TensorFile,
    read_engine_manifest,
    write_engine_manifest,
)
from deepseek.artifact.layout import StoredTensor
from deepseek.artifact.manifest import MANIFEST_FILE, LayerKey
from deepseek.artifact.reader import ArtifactReader
from deepseek.artifact.tensors import layer_file
from deepseek.engine.packing import Source
from deepseek.errors import ArtifactError
from deepseek.files import write_atomic
from deepseek.outputs import check_apart, check_space, check_writable
from deepseek.source.checkpoint import CheckpointReader, scale_name
from deepseek.tensor_files import DTYPES, saved_bytes, stream_tensors
from quant_jobs.targets.sharded import (
    BuildFolder,
    BuiltFile,
    FileMaker,
    Note,
    Progress,
    build_files,
    check_same_inputs,
)

#: Reads one tensor of the checkpoint by its name in an artifact.
Read = Callable[[str], Tensor]
#: Makes one tensor of a linear from those of the checkpoint that hold the same linear.
Make = Callable[[StoredTensor, Read], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayeredBuild:
    """One engine to be built, decided before a byte is written.

    `layers` are the files, in order. `documents` are all files beside the tensors but engine.json,
    by name. `manifest` is engine.json without its tensor files. `warnings` are for people.
    """

    source: Source
    layers: tuple[LayerKey, ...]
    documents: Mapping[str, bytes]
    manifest: EngineManifest
    warnings: tuple[str, ...] = ()

    @property
    def keys(self) -> list[str]:
        """The keys of the tasks: one per file."""
        return [str(layer) for layer in self.layers]


def build_layered(
    build: LayeredBuild,
    maker: FileMaker,
    layout: Callable[[LayerKey], Mapping[str, StoredTensor]],
    output: Path,
    workers: int,
    progress: Progress,
    *,
    named: Sequence[str] = (),
    launch_file: str | None = None,
    note: Note = lambda line: None,
) -> tuple[EngineManifest, dict[str, BuiltFile]]:
    """Build the engine directory, or what it lacks, on `workers` Ray workers (0: in this process).
    Returns its manifest and the record of every tensor file by key.

    An output that holds this very engine is verified; a file that it has lost is made again.
    `layout` says what a file holds. `named` are fields of `target_fields` that a user chooses and
    `launch_file` the document of the engine's arguments: a sentence about a difference names these.

    Raises:
        ArtifactError: the output holds another engine or other files, or the checkpoint is damaged.
        OutputError: the disk is too small, or a file cannot be written.
    """

    def inputs(manifest: EngineManifest) -> dict[str, Any]:
        """What decides the bytes of an output; keys are words for the error sentence, the plainest
        first, because arguments follow from the others too."""
        launch = {} if launch_file is None else {launch_file: manifest.files.get(launch_file)}
        return {
            "target": manifest.target,
            "checkpoint": manifest.artifact_digest,
            **{name: manifest.target_fields.get(name) for name in named},
            "ranks": f"tp {manifest.ranks.tp}, ep {manifest.ranks.ep}",
            "kv_cache": manifest.kv_cache,
            "versions": manifest.versions,
            **launch,
        }

    check_apart(output, build.source.directory, "the checkpoint")
    known = _known_files(output, build.manifest, inputs)
    check_writable(output.parent)
    with BuildFolder(output, inputs(build.manifest)) as folder:
        done = known.keys() | folder.records().keys()
        todo = (layer for layer in build.layers if str(layer) not in done)
        num_bytes = sum(_file_bytes(layout(layer)) for layer in todo)
        check_space(output, num_bytes, "choose another --output")
        built = build_files(folder, build.keys, maker, workers, progress, known, note=note)
        for name, data in build.documents.items():
            write_atomic(output / name, data)
        files = {
            file.file: TensorFile(num_bytes=file.num_bytes, sha256=file.sha256)
            for file in built.values()
        }
        manifest = build.manifest.model_copy(update={"tensor_files": files})
        write_engine_manifest(output, manifest)
        folder.remove()
    return manifest, built


# --- one file ---


def write_layer(
    directory: Path, source: Source, key: str, tensors: Mapping[str, StoredTensor], make: Make
) -> BuiltFile:
    """Write the tensor file of one key into the directory, atomically.

    Every tensor of the checkpoint is read when the tensor that is made of it is written, and
    verified as it is read. `make` makes those of linears; others are taken over bit for bit.

    Raises:
        ArtifactError, CheckpointError: the checkpoint is damaged; the sentence names the tensor.
        OutputError: the file cannot be written.
    """
    layer = layer_of_key(key)
    bytes_read = 0
    with _opened(source, layer) as (read, dtype_of):
        layout = {
            name: (_dtype(tensor, dtype_of), tensor.shape) for name, tensor in tensors.items()
        }

        def counted(name: str) -> Tensor:
            nonlocal bytes_read
            tensor = read(name)
            bytes_read += tensor.nbytes
            return tensor

        def made(name: str) -> Iterator[Tensor]:
            tensor = tensors[name]
            if tensor.is_linear:
                yield make(tensor, counted)
            else:
                yield counted(tensor.spec.name)

        name = layer_file(layer)
        sha256, num_bytes = stream_tensors(directory / name, layout, made, {"format": "pt"})
    return BuiltFile(key=key, file=name, num_bytes=num_bytes, sha256=sha256, bytes_read=bytes_read)


@lru_cache(maxsize=1)
def open_planned(checkpoint: Path, digest: str) -> Source:
    """The checkpoint of a build, opened once per process, which must be the one that was planned.

    Raises:
        ArtifactError, CheckpointError: it is another one here.
    """
    source: Source
    if (checkpoint / MANIFEST_FILE).exists():
        source = ArtifactReader(checkpoint)
        found = source.digest
    else:
        source = CheckpointReader(checkpoint, warn=False)
        found = source.fingerprint
    if found != digest:
        raise ArtifactError(
            f"{checkpoint} is another checkpoint on this node, or has changed; --checkpoint must "
            "be on storage that all nodes share"
        )
    return source


def layer_of_key(key: str) -> LayerKey:
    """The layer whose file has this key."""
    return "globals" if key == "globals" else int(key)


@contextmanager
def _opened(source: Source, layer: LayerKey) -> Iterator[tuple[Read, Callable[[str], torch.dtype]]]:
    """How the tensors of one layer are read by their artifact's names, and the type of one that is
    no linear. A source has the names of the release; its reader checks the values."""
    if isinstance(source, ArtifactReader):
        with source.open_file(layer) as file:
            yield file.read, lambda name: file.header.tensors[name].dtype
        return

    def read(name: str) -> Tensor:
        if name.endswith(".weight_scale"):
            return source.load_tensor(scale_name(name.removesuffix("_scale")))
        return source.load_tensor(name)

    yield read, source.dtype_of


def _dtype(tensor: StoredTensor, dtype_of: Callable[[str], torch.dtype]) -> torch.dtype:
    if tensor.is_linear:
        return DTYPES[tensor.dtype]
    return dtype_of(tensor.spec.name)


def _file_bytes(tensors: Mapping[str, StoredTensor]) -> int:
    """Size of one tensor file; types as the release has them."""
    layout = {name: (DTYPES[tensor.dtype], tensor.shape) for name, tensor in tensors.items()}
    return saved_bytes(layout, {"format": "pt"})


# --- an output that is there already ---


def _known_files(
    output: Path, manifest: EngineManifest, inputs: Callable[[EngineManifest], dict[str, Any]]
) -> dict[str, BuiltFile]:
    """The tensor files of a finished output by key; empty where none is finished.

    Raises:
        ArtifactError: the output holds another engine; the sentence names the first difference.
    """
    if not (output / ENGINE_FILE).exists():
        return {}
    try:
        existing = read_engine_manifest(output)
    except ArtifactError as error:
        raise ArtifactError(f"{error}; delete {output} first") from error
    check_same_inputs(output, "an engine", inputs(existing), inputs(manifest))
    for field in sorted(type(manifest).model_fields.keys() - {"tensor_files"}):
        if getattr(existing, field) != getattr(manifest, field):
            raise ArtifactError(
                f"{output} holds another engine than the one to be built ({field} of {ENGINE_FILE} "
                "differ); choose another --output or delete it"
            )
    return {
        _key(name): BuiltFile(
            key=_key(name), file=name, num_bytes=file.num_bytes, sha256=file.sha256, bytes_read=0
        )
        for name, file in existing.tensor_files.items()
    }


def _key(name: str) -> str:
    """The key of a tensor file by its name: `model-layer-00003.safetensors` -> `3`."""
    stem = name.removesuffix(".safetensors").rpartition("-")[2]
    return stem if stem == "globals" else str(int(stem))
