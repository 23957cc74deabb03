"""The engine directory: what `build --target embedded` writes and the engine loads.

    engine.json            the manifest below; its digest is the engine's digest
    rank-0.safetensors     every tensor in the kernels' own layout, mapped into memory as it is
    config.json, tokenizer files, and intserve.json of the artifact that it was built from

The directory appears whole or not at all. Building is deterministic: the same artifact, KV format
and CPU layout give the same bytes. `gate.json` joins the directory later and is not part of it.

INT4 weights lie in the tile order of one instruction set (torch packs 64 outputs per tile for
AVX-512 and 32 for AVX2), so an engine that has them says which, and another CPU refuses it rather
than computing nonsense.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deepseek import __version__
from deepseek.artifact.manifest import MANIFEST_FILE
from deepseek.artifact.reader import ArtifactReader
from deepseek.artifact.writer import COPIED_FILES
from deepseek.config import ModelConfig
from deepseek.engine.kv_cache import CacheFormat, check_cache_format
from deepseek.engine.packing import Progress, Source, pack_tensors, schemes_of
from deepseek.errors import ArtifactError, DeployError, first_problem
from deepseek.files import canonical_json, read_json_object, sha256_file, write_atomic, write_json
from deepseek.recipe import Scheme
from deepseek.tensor_files import (
    ALIGNMENT,
    DamagedFileError,
    SavedFile,
    read_header,
    save_tensors,
    tensor_digest,
)

ENGINE_FILE = "engine.json"
TENSOR_FILE = "rank-0.safetensors"
#: The recipe's name in an engine that was built from a source checkpoint as it is.
UNQUANTIZED = "unquantized"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TensorFile(_Record):
    """The packed file: size, digests of file and header, and the digest of each tensor."""

    num_bytes: int
    sha256: str
    header_sha256: str
    tensors: dict[str, str]


class EngineManifest(_Record):
    """The whole of engine.json. No times, no paths.

    `artifact_digest` is that of the quantized checkpoint, or the source's fingerprint where nothing
    was quantized. `cpu_layout` is set where the tensors suit one instruction set only. `files` maps
    each copied file to its SHA-256.
    """

    format_version: Literal[1] = 1
    target: Literal["embedded"] = "embedded"
    tp: Literal[1] = 1
    dtype: Literal["float32"] = "float32"
    kv_cache: CacheFormat
    page_tokens: int
    recipe: str
    artifact_digest: str
    source_fingerprint: str
    mtp: Literal["skipped", "absent"]
    cpu_layout: str | None
    schemes: dict[str, Scheme]
    tensor_file: TensorFile
    files: dict[str, str]
    tools: dict[str, str]

    @property
    def digest(self) -> str:
        """SHA-256 in hex of the manifest's canonical JSON: the engine's digest."""
        return hashlib.sha256(canonical_json(_dump(self))).hexdigest()


@dataclass(frozen=True, slots=True)
class PackedEngine:
    """A verified engine: manifest, model config, and the tensors, mapped from the file."""

    manifest: EngineManifest
    config: ModelConfig
    tensors: dict[str, Tensor]


def pack_engine(
    source: Source,
    output: Path | str,
    *,
    kv_cache: str | None = None,
    page_tokens: int = 16,
    tp: int = 1,
    progress: Progress | None = None,
) -> EngineManifest:
    """Build the engine directory; `kv_cache` None takes the recipe's format (bf16 without one).

    An output that already holds this very engine is verified and kept.

    Raises:
        ArtifactError: the output holds something else, or the input is damaged.
        CheckpointError: the source checkpoint is damaged.
        DeployError: the engine cannot compute a format, or more than one rank was asked for.
    """
    output = Path(output)
    if tp != 1:
        raise DeployError(f"the embedded engine runs on one rank; --tp {tp} must be 1")
    wanted = _identity(source, kv_cache, page_tokens)
    if (existing := _existing(output, wanted)) is not None:
        return existing
    tensors = pack_tensors(source, progress)
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    shutil.rmtree(staging, ignore_errors=True)  # of an earlier process with our number
    try:
        staging.mkdir()
        saved = save_tensors(staging / TENSOR_FILE, tensors, {"format": "pt"})
        manifest = EngineManifest(
            **wanted, tensor_file=_tensor_file(saved), files=_copy_files(source, staging)
        )
        write_json(staging / ENGINE_FILE, _dump(manifest) | {"digest": manifest.digest})
        os.replace(staging, output)  # whole or absent; an empty directory in the way is fine
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return manifest


def load_packed(directory: Path | str, *, cpu_layout: str | None = None) -> PackedEngine:
    """Read and verify an engine directory; every tensor's bytes are held against its digest.

    `cpu_layout` stands in for this CPU's (torch's capability name).

    Raises:
        ArtifactError: incomplete, damaged or edited, naming the file or tensor; or built for a CPU
            with another instruction set.
    """
    directory = Path(directory)
    manifest = read_engine_manifest(directory)
    here = cpu_layout or torch.backends.cpu.get_cpu_capability()
    if manifest.cpu_layout not in (None, here):
        raise ArtifactError(
            f"{directory} was built for {manifest.cpu_layout} CPUs and this one is {here}; build "
            "the engine on this machine"
        )
    for name, sha256 in manifest.files.items():
        path = directory / name
        if Path(name).name != name or not path.is_file() or sha256_file(path) != sha256:
            raise ArtifactError(
                f"{path} is absent or differs from what {ENGINE_FILE} records; build again"
            )
    tensors = _load_tensors(directory / TENSOR_FILE, manifest.tensor_file)
    return PackedEngine(manifest, ModelConfig.from_directory(directory), tensors)


def read_engine_manifest(directory: Path | str) -> EngineManifest:
    """Read engine.json and check it against its own digest; reads no tensors.

    Raises:
        ArtifactError: absent, not JSON, an unknown field or version, or edited.
    """
    path = Path(directory) / ENGINE_FILE
    raw = read_json_object(
        path, f"{directory} is not an engine: make one with `python -m quant_jobs build`"
    )
    recorded = raw.pop("digest", None)
    try:
        manifest = EngineManifest.model_validate(raw)
    except ValidationError as error:
        raise ArtifactError(f"{path}: {first_problem(error)}; build the engine again") from error
    if manifest.digest != recorded:
        raise ArtifactError(f"{path} was changed after it was written; build the engine again")
    return manifest


def _identity(source: Source, kv_cache: str | None, page_tokens: int) -> dict[str, Any]:
    """The manifest's fields that are known before anything is packed."""
    quantized = isinstance(source, ArtifactReader)
    schemes = schemes_of(source)
    int4 = any(scheme.weights in ("int4", "int4-asym") for scheme in schemes.values())
    recipe_kv = source.manifest.kv_cache if isinstance(source, ArtifactReader) else "bf16"
    if not 1 <= page_tokens <= 256 or 256 % page_tokens:
        raise DeployError(f"page_tokens must divide 256, which {page_tokens} does not")
    return {
        "kv_cache": check_cache_format(kv_cache or recipe_kv),
        "page_tokens": page_tokens,
        "recipe": source.recipe.name if isinstance(source, ArtifactReader) else UNQUANTIZED,
        "artifact_digest": (
            source.digest if isinstance(source, ArtifactReader) else source.fingerprint
        ),
        "source_fingerprint": (
            source.manifest.source.fingerprint
            if isinstance(source, ArtifactReader)
            else source.fingerprint
        ),
        "mtp": "skipped" if source.config.num_nextn_predict_layers else "absent",
        "cpu_layout": torch.backends.cpu.get_cpu_capability() if quantized and int4 else None,
        "schemes": schemes,
        "tools": {"intserve": __version__, "torch": str(torch.__version__)},
    }


def _existing(output: Path, wanted: Mapping[str, Any]) -> EngineManifest | None:
    """The engine that the output already holds, if it is the wanted one; None where it is free."""
    if not output.exists():
        return None
    if not output.is_dir():
        raise ArtifactError(f"{output} is a file; --output must name a directory")
    if not any(output.iterdir()):
        return None
    if not (output / ENGINE_FILE).exists():
        raise ArtifactError(
            f"{output} holds files of something else and no {ENGINE_FILE}; choose another --output"
        )
    manifest = read_engine_manifest(output)
    for field, value in wanted.items():
        if getattr(manifest, field) != value:
            raise ArtifactError(
                f"{output} holds an engine whose {field} differs from the one to be built; choose "
                "another --output or delete it"
            )
    load_packed(output)
    return manifest


def _copy_files(source: Source, directory: Path) -> dict[str, str]:
    copied = {}
    for name in ("config.json", MANIFEST_FILE, *COPIED_FILES):
        if (source.directory / name).is_file():
            write_atomic(directory / name, (source.directory / name).read_bytes())
            copied[name] = sha256_file(directory / name)
    return dict(sorted(copied.items()))


def _tensor_file(saved: SavedFile) -> TensorFile:
    return TensorFile(
        num_bytes=saved.num_bytes,
        sha256=saved.sha256,
        header_sha256=saved.header_sha256,
        tensors=saved.tensors,
    )


def _load_tensors(path: Path, record: TensorFile) -> dict[str, Tensor]:
    try:
        header = read_header(path)
        if header.sha256 != record.header_sha256 or header.tensors.keys() != record.tensors.keys():
            raise DamagedFileError("has a header other than the one that was built")
        with safe_open(path, framework="pt") as file:
            tensors = {name: _aligned(file.get_tensor(name)) for name in sorted(header.tensors)}
    except (DamagedFileError, SafetensorError) as error:
        raise ArtifactError(f"{path} {error}; build the engine again") from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}); build again") from error
    for name, tensor in tensors.items():
        if tensor_digest(tensor) != record.tensors[name]:
            raise ArtifactError(
                f"tensor {name} in {path} is damaged: its bytes are not those that were built; "
                "build the engine again"
            )
    return tensors


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied where it does not begin at a cache line.

    Below 16 bytes `_weight_int8pack_mm` crashes on AVX-512 and MKL's FP32 products round
    differently. `save_tensors` aligns every tensor that fills whole lines, so what is copied is
    small.
    """
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def _dump(manifest: EngineManifest) -> dict[str, Any]:
    """JSON form; a scheme's defaults are left out, for there is one scheme per linear."""
    content = manifest.model_dump(mode="json")
    content["schemes"] = {
        module: scheme.model_dump(mode="json", exclude_defaults=True)
        for module, scheme in sorted(manifest.schemes.items())
    }
    return content
