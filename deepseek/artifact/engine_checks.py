"""What `build --check` checks of a directory of layer files, whatever its target.

A target's own check (`deepseek/trtllm/check.py`, ...) calls these beside its model of the loader:

    listing    engine.json and what it lists, nothing else that a loader would take
    config     config.json is the artifact's but for what the build changes in it
    schemes    engine.json has a scheme for every linear, and those of the recipe
    headers    names, types, shapes and files of all tensors, and the index, against a layout
    digests    files against engine.json, tensors against intserve.json

Every one raises at the first fault, one sentence that names the file or the tensor.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from deepseek import untrusted
from deepseek.artifact.built_engine import BuiltEngine
from deepseek.artifact.documents import document_object
from deepseek.artifact.engine_manifest import ENGINE_FILE, EngineManifest, read_engine_manifest
from deepseek.artifact.layout import StoredTensor, stored_layers
from deepseek.artifact.loader_files import Checkpoint
from deepseek.artifact.manifest import MANIFEST_FILE, LayerKey
from deepseek.artifact.reader import ArtifactReader
from deepseek.artifact.tensors import layer_file
from deepseek.config import ModelConfig
from deepseek.errors import ArtifactError, first_problem
from deepseek.inventory import HEAD, linears
from deepseek.recipe import Scheme
from deepseek.source.index import INDEX_FILE
from deepseek.tensor_files import DTYPE_NAMES, tensor_digest

#: What a loader, or a tool beside it, takes by its ending wherever it lies in the directory.
_WEIGHT_ENDINGS = (".safetensors", ".bin", ".pth", ".pt")
_SHARDS = re.compile(r"model-(layer-\d{5}|globals)[.]safetensors", re.ASCII)
#: Files that are read at one time.
_THREADS = min(8, os.cpu_count() or 1)
_READ_BYTES = 1 << 20

Fields = TypeVar("Fields", bound=BaseModel)
#: Gets the bytes that are done, and those in all. Called from threads, one at a time.
ByteProgress = Callable[[int, int], None]


def untold(done: int, total: int) -> None:
    """A `ByteProgress` for nobody."""


@dataclass(frozen=True, slots=True)
class RankLoad:
    """What one rank read from the files, and what its parameters hold, in bytes. A tensor that is
    cut counts with the part that is taken."""

    read_bytes: int
    held_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """What was checked of an engine directory that passed.

    `loader` names the target's loader and `dialect` its choice among several forms, None where it
    has one. `ranks` says by rank what the loader reads of the files and what its parameters hold.
    `tensors` is the number of keys in the files, `reads` how often all ranks together read one.
    `hashed_bytes` were compared with engine.json, `verified` tensors with intserve.json, `compared`
    tensors with the artifact, value by value on every rank. `warnings` are of the launch file.
    """

    directory: Path
    target: str
    loader: str
    engine_digest: str
    dialect: str | None
    engine_version: str
    ranks: tuple[RankLoad, ...]
    tensors: int
    reads: int
    hashed_bytes: int = 0
    verified: int = 0
    compared: int = 0
    warnings: tuple[str, ...] = ()


# --- documents ---


def read_target_manifest(
    directory: Path, target: str, loader: str, fields: type[Fields]
) -> tuple[EngineManifest, Fields]:
    """engine.json, and what it says for this target.

    Raises:
        ArtifactError: absent, edited, or not of this target.
    """
    engine = read_engine_manifest(directory)
    if engine.target != target:
        raise ArtifactError(
            f"{directory} is an engine for {engine.target}, not for {loader}; build one with "
            f"--target {target}"
        )
    try:
        return engine, fields.model_validate(engine.target_fields)
    except ValidationError as error:
        raise ArtifactError(
            f"{directory / ENGINE_FILE}: target_fields.{first_problem(error)}; build the engine "
            "again"
        ) from error


def check_listing(directory: Path, engine: EngineManifest, loader: str) -> frozenset[str]:
    """Check which weight files lie in the directory, before any is read; the names of all files.

    Raises:
        ArtifactError: a weight file is not the engine's, though the loader would take it.
    """
    try:
        names = frozenset(os.listdir(directory))
    except OSError as error:
        raise ArtifactError(f"{directory} cannot be listed ({error.strerror})") from error
    for name in sorted(names):
        if name.endswith(_WEIGHT_ENDINGS) and name not in engine.tensor_files:
            raise ArtifactError(
                f"{directory / name} is no file of this engine, but {loader} loads every weight "
                "file that it finds, and a tensor that is in two files from either; remove it"
            )
    for name in engine.tensor_files:
        if not _SHARDS.fullmatch(name):
            raise ArtifactError(
                f"{directory / ENGINE_FILE} lists the tensor file {untrusted.show_name(name)}, "
                "which IntServe does not write; build again"
            )
    return names


def check_quantization_config(path: Path, found: object, wanted: object) -> None:
    """Check `quantization_config` before any pattern of it is matched.

    Raises:
        ArtifactError: it is not the one that the linears' schemes ask for; the sentence names the
            first key, or group, that differs.
    """
    if found == wanted:
        return
    where = "quantization_config"
    while isinstance(found, Mapping) and isinstance(wanted, Mapping):
        key = next(
            key
            for key in sorted(found.keys() | wanted.keys(), key=str)
            if key not in found or key not in wanted or found[key] != wanted[key]
        )
        found, wanted, where = found.get(key), wanted.get(key), f"{where}.{key}"
    raise ArtifactError(
        f"{path} has another {where} than the formats of {ENGINE_FILE} ask for; build again"
    )


def check_same_config(
    directory: Path,
    built: BuiltEngine,
    artifact: ArtifactReader,
    *,
    changed: Collection[str] = ("quantization_config", "auto_map", "num_nextn_predict_layers"),
) -> None:
    """Check that config.json is the artifact's but for the keys that a build changes in it.

    Raises:
        ArtifactError: another key differs; the sentence names it.
    """
    own = document_object(directory, built.documents, "config.json")
    whole = document_object(artifact.directory, artifact.documents, "config.json")
    for key in sorted((own.keys() | whole.keys()) - set(changed)):
        if own.get(key) != whole.get(key):
            raise ArtifactError(
                f"{directory / 'config.json'} has {untrusted.show_name(key)} "
                f"{untrusted.show(own.get(key))}, where {artifact.directory} has "
                f"{untrusted.show(whole.get(key))}; build again"
            )


def check_mtp(directory: Path, config: ModelConfig, mtp: str) -> None:
    """Check that config.json has MTP layers where engine.json says that they are `kept`, and only
    there.

    Raises:
        ArtifactError: they disagree.
    """
    if (config.num_nextn_predict_layers > 0) != (mtp == "kept"):
        raise ArtifactError(
            f"{directory / 'config.json'} has num_nextn_predict_layers "
            f"{config.num_nextn_predict_layers}, but {ENGINE_FILE} says that the MTP layers are "
            f"{mtp}; build again"
        )


def check_schemes(
    directory: Path, built: BuiltEngine, config: ModelConfig, engine: EngineManifest, *, mtp: bool
) -> None:
    """Check that engine.json has a scheme for every linear of the model, the recipe's where the
    engine was built from an artifact.

    Raises:
        ArtifactError: it has not; the sentence names the linear.
    """
    modules = {
        spec.module
        for layer in stored_layers(config, mtp=mtp)
        if layer != "globals"
        for spec in linears(config, layer)
    }
    path = directory / ENGINE_FILE
    recipe: Mapping[str, Scheme] = {}
    if built.manifest is not None:
        recipe = built.manifest.recipe.resolve(built.config)
    if HEAD in recipe:
        modules.add(HEAD)
    if different := sorted(modules ^ engine.schemes.keys()):
        state = "lacks" if different[0] in modules else "has the unknown"
        raise ArtifactError(
            f"{path} {state} linear {untrusted.show_name(different[0])} for the model of "
            "config.json; build again"
        )
    if recipe:
        for module, scheme in engine.schemes.items():
            if recipe[module].weights != scheme.weights:
                raise ArtifactError(
                    f"{path} has {module} in {scheme.weights}, the recipe of {MANIFEST_FILE} in "
                    f"{recipe[module].weights}; build again"
                )


def read_document(path: Path) -> dict[str, Any]:
    """The JSON object of a file of the directory.

    Raises:
        ArtifactError: it holds none.
    """
    try:
        return untrusted.read_json_object(path, root=path.parent)
    except untrusted.UnusableFileError as error:
        raise ArtifactError(f"{path} {error}; build again") from error


# --- headers ---


def check_headers(
    checkpoint: Checkpoint,
    layers: Sequence[LayerKey],
    layout: Callable[[LayerKey], Mapping[str, StoredTensor]],
    *,
    index_needed: bool = False,
) -> None:
    """Check types, shapes and files of all tensors against the layout of each layer, and the index.

    Loaders convert many types and some never read the index; other tools do. The type of what is no
    linear is the source's own.

    Raises:
        ArtifactError: a tensor is missing, of another type or shape, or in another file.
    """
    directory = checkpoint.directory
    index = _index(directory)
    if index is None and index_needed:
        raise ArtifactError(f"{directory} has no {INDEX_FILE}; build again")
    for key in checkpoint:
        if index is not None and index.get(key) != checkpoint.file(key).name:
            raise ArtifactError(
                f"{directory / INDEX_FILE} does not place {key} in {checkpoint.file(key).name}; "
                "build again"
            )
    if index is not None and (extra := sorted(index.keys() - set(checkpoint))):
        raise ArtifactError(
            f"{directory / INDEX_FILE} lists {untrusted.show_name(extra[0])}, which no file holds; "
            "build again"
        )
    for layer in layers:
        for key, tensor in layout(layer).items():
            if key not in checkpoint:
                raise ArtifactError(f"{directory} lacks the tensor {key}; build again")
            entry, path = checkpoint.entry(key), checkpoint.file(key)
            if path.name != layer_file(layer):
                raise ArtifactError(f"{path} holds {key}, which belongs into {layer_file(layer)}")
            dtype = DTYPE_NAMES[entry.dtype]
            if tensor.is_linear and dtype != tensor.dtype:
                raise ArtifactError(
                    f"tensor {key} in {path} is {dtype}, not {tensor.dtype}; build again"
                )
            if entry.shape != tensor.shape:
                raise ArtifactError(
                    f"tensor {key} in {path} has the shape {list(entry.shape)}, not "
                    f"{list(tensor.shape)}; build again"
                )


def _index(directory: Path) -> dict[str, str] | None:
    path = directory / INDEX_FILE
    if not path.exists():
        return None
    weight_map = read_document(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ArtifactError(f"{path} has no weight_map; build again")
    return weight_map


# --- values ---


@dataclass(frozen=True, slots=True)
class Original:
    """How a stored tensor is turned back into the artifact's: its name there, and what is done to
    the values, None where nothing is."""

    name: str
    convert: Callable[[Tensor], Tensor] | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """The artifact's tensor."""
        return tensor if self.convert is None else self.convert(tensor)


#: The original of a key, None where it cannot be turned back exactly.
Origin = Callable[[str], Original | None]
#: What was done to a stored tensor whose digest differs from the one expected, "" where it cannot
#: be told; the last argument has all digests of the artifact by name.
Diagnosis = Callable[[Tensor, Original, str, Mapping[str, str]], str]


def offset_bytes(offset: int) -> Callable[[Tensor], Tensor]:
    """The conversion of two's complement codes, as bytes, into the artifact's offset-binary int32
    words: XOR with 0x88 for two codes in a byte, with 0x80 for one."""

    def convert(tensor: Tensor) -> Tensor:
        return (tensor.contiguous().view(torch.uint8) ^ offset).view(torch.int32)

    return convert


def check_digests(
    checkpoint: Checkpoint,
    built: BuiltEngine,
    engine: EngineManifest,
    origin: Origin,
    diagnose: Diagnosis = lambda tensor, original, expected, artifact: "",
    progress: ByteProgress = untold,
) -> tuple[int, int]:
    """Verify every tensor that can be verified against intserve.json, and every file against
    engine.json; the bytes that were hashed and the number of tensors. `progress` gets the bytes of
    the files that are done, and of all.

    Raises:
        ArtifactError: one differs; the sentence names the tensor, and what was done to it where
            that can be told, or the file.
    """
    artifact: dict[str, str] = {}
    if built.manifest is not None:
        for record in built.manifest.layers:
            artifact |= record.tensors
    keys: dict[str, list[str]] = {name: [] for name in engine.tensor_files}
    for key in checkpoint:
        keys[checkpoint.file(key).name].append(key)

    def check_file(name: str) -> tuple[int, int]:
        verified = 0
        for key in keys[name] if artifact else ():
            original = origin(key)
            if original is not None:
                _verify(checkpoint, key, original, artifact, diagnose)
                verified += 1
        path, file = checkpoint.directory / name, engine.tensor_files[name]
        if _sha256(path) != file.sha256:
            raise ArtifactError(
                f"{path} was edited after the engine was built: its SHA-256 is not that of "
                f"{ENGINE_FILE}; restore it or build again"
            )
        return file.num_bytes, verified

    hashed = verified = 0
    progress(0, engine.num_bytes)
    with ThreadPoolExecutor(_THREADS) as pool:
        for done in as_completed([pool.submit(check_file, name) for name in sorted(keys)]):
            size, count = done.result()
            hashed, verified = hashed + size, verified + count
            progress(hashed, engine.num_bytes)
    return hashed, verified


def artifact_layers(
    directory: Path, engine: EngineManifest, artifact: ArtifactReader
) -> Callable[[LayerKey], Mapping[str, Tensor]]:
    """What the values of a directory are compared with: the tensors of one layer of the quantized
    checkpoint that it was built from, by the artifact's names.

    Raises:
        ArtifactError: it was built from another.
    """
    if artifact.digest != engine.artifact_digest:
        raise ArtifactError(
            f"{directory} was built from the artifact {engine.artifact_digest[:16]}, but "
            f"{artifact.directory} is {artifact.digest[:16]}; give the artifact that it was built "
            "from"
        )

    def reference(layer: LayerKey) -> Mapping[str, Tensor]:
        return artifact.read_globals() if layer == "globals" else artifact.read_layer(layer)

    return reference


def _verify(
    checkpoint: Checkpoint,
    key: str,
    original: Original,
    artifact: Mapping[str, str],
    diagnose: Diagnosis,
) -> None:
    expected = artifact.get(original.name)
    where = f"tensor {key} in {checkpoint.file(key)}"
    if expected is None:
        raise ArtifactError(
            f"{where} was made from {original.name}, which {MANIFEST_FILE} does not list; build "
            "again"
        )
    tensor = checkpoint.peek(key)
    digest = tensor_digest(original.of(tensor))
    if digest == expected:
        return
    what = diagnose(tensor, original, expected, artifact)
    if not what:
        other = next((name for name, value in artifact.items() if value == digest), None)
        what = f"holds the values of {other}" if other else "was changed"
    raise ArtifactError(
        f"{where} {what}; its values are not those that {MANIFEST_FILE} records: build again"
    )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_READ_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror})") from error
    return digest.hexdigest()
