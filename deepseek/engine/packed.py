"""The embedded engine's directory, verified and mapped into memory.

    engine.json            the manifest (`EngineManifest`) with `EmbeddedFields`
    rank-0.safetensors     every tensor in the layout of the native kernels (native_layout.py),
                           which is the same for every CPU, mapped into memory as it is
    config.json, tokenizer files, and intserve.json of the artifact that it was built from

`quant_jobs/targets/embedded.py` writes it. `gate.json` joins the directory later and is not part
of the engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deepseek.artifact.documents import document_object
from deepseek.artifact.engine_manifest import (
    ENGINE_FILE,
    EngineManifest,
    RankLayout,
    read_documents,
    read_engine_manifest,
)
from deepseek.config import ModelConfig
from deepseek.engine.pages import check_page_tokens
from deepseek.errors import ArtifactError, DeployError, first_problem
from deepseek.inventory import linears
from deepseek.tensor_files import ALIGNMENT, DamagedFileError, read_header, tensor_digest

TARGET = "embedded"
RANKS = RankLayout(tp=1, ep=1)
TENSOR_FILE = "rank-0.safetensors"
#: Name of the layout of the tensors; it changes whenever their order or type in memory does.
LAYOUT = "native-2"


class EmbeddedFields(BaseModel):
    """`target_fields` of an embedded engine: what its loader alone reads.

    `layout` names how the tensors lie in memory. `page_tokens` is the size of a KV page in tokens.
    `mtp` is "skipped" where the model has an MTP layer, which the engine leaves
    out. `header_sha256` covers the header of the tensor file and `tensor_digests` each tensor
    (BLAKE2b-128 in hex), so that the loader names a damaged tensor and reads no byte twice.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layout: Literal["native-2"]
    page_tokens: int
    mtp: Literal["skipped", "absent"]
    header_sha256: str
    tensor_digests: dict[str, str]


@dataclass(frozen=True, slots=True)
class PackedEngine:
    """A verified engine: its manifest, its own fields, the model's config, the tensors by name,
    mapped from the file, and the documents as they were verified."""

    manifest: EngineManifest
    fields: EmbeddedFields
    config: ModelConfig
    tensors: dict[str, Tensor]
    documents: dict[str, bytes]


def load_packed(directory: Path | str) -> PackedEngine:
    """Read an engine directory and verify every document and every tensor against its digest.

    Raises:
        ArtifactError: incomplete, damaged or edited, naming the file or tensor; built for another
            target, or by a version with another layout of tensors.
        ConfigError: config.json cannot be read.
    """
    directory = Path(directory)
    manifest = read_engine_manifest(directory)
    fields = _read_fields(directory, manifest)
    documents = read_documents(directory, manifest)
    config = ModelConfig.from_dict(document_object(directory, documents, "config.json"))
    _check_schemes(directory, manifest, config)
    tensors = _load_tensors(
        directory / TENSOR_FILE, fields, planned_bytes=manifest.plan.rank_weight_bytes[0]
    )
    return PackedEngine(manifest, fields, config, tensors, documents)


def _read_fields(directory: Path, manifest: EngineManifest) -> EmbeddedFields:
    """The embedded engine's own part of a manifest.

    Raises:
        ArtifactError: the engine is another target's, or a field is unknown, absent or wrong.
    """
    path = directory / ENGINE_FILE
    if manifest.target != TARGET:
        raise ArtifactError(
            f"{directory} is an engine for {manifest.target}, which the embedded engine cannot "
            "load; build again with --target embedded"
        )
    if manifest.ranks != RANKS or manifest.tensor_files.keys() != {TENSOR_FILE}:
        raise ArtifactError(
            f"{path} must describe one rank and the tensor file {TENSOR_FILE}; build again"
        )
    if manifest.target_fields.get("layout") != LAYOUT:
        raise ArtifactError(
            f"{directory} was built by a version whose tensors lie in another order in memory; "
            "delete it and build the engine again"
        )
    try:
        fields = EmbeddedFields.model_validate(manifest.target_fields)
        check_page_tokens(fields.page_tokens)
    except ValidationError as error:
        raise ArtifactError(
            f"{path}: target_fields.{first_problem(error)}; build the engine again"
        ) from error
    except DeployError as error:
        raise ArtifactError(f"{path}: {error}; build the engine again") from error
    return fields


def _check_schemes(directory: Path, manifest: EngineManifest, config: ModelConfig) -> None:
    """Check that every linear of the model has a scheme, those of MTP layers excepted."""
    for layer in range(config.num_hidden_layers):
        for spec in linears(config, layer):
            if spec.module not in manifest.schemes:
                raise ArtifactError(
                    f"{directory / ENGINE_FILE} has no scheme for {spec.module}, which config.json "
                    "describes; build the engine again"
                )


def _load_tensors(path: Path, fields: EmbeddedFields, planned_bytes: int) -> dict[str, Tensor]:
    digests = fields.tensor_digests
    try:
        header = read_header(path)
        if header.sha256 != fields.header_sha256 or header.tensors.keys() != digests.keys():
            raise DamagedFileError("has a header other than the one that was built")
        num_bytes = sum(entry.num_bytes for entry in header.tensors.values())
        if num_bytes != planned_bytes:
            raise DamagedFileError(
                f"holds {num_bytes} bytes of weights where {ENGINE_FILE} plans {planned_bytes}"
            )
        with safe_open(path, framework="pt") as file:
            tensors = {name: _aligned(file.get_tensor(name)) for name in sorted(header.tensors)}
    except (DamagedFileError, SafetensorError) as error:
        raise ArtifactError(f"{path} {error}; build the engine again") from error
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read ({error.strerror}); build again") from error
    for name, tensor in tensors.items():
        if tensor_digest(tensor) != digests[name]:
            raise ArtifactError(
                f"tensor {name} in {path} is damaged: its bytes are not those that were built; "
                "build the engine again"
            )
    return tensors


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, copied where it does not begin at a cache line.

    A native kernel reads whole lines. `save_tensors` aligns every tensor that fills whole lines, so
    only small tensors are copied.
    """
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()
