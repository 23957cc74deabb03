"""Build the embedded engine: the directory that `deepseek/engine/packed.py` loads.

The directory appears whole or not at all. The same artifact, KV format and page size give the same
bytes, on any CPU.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from deepseek import __version__
from deepseek.artifact.documents import read_copied
from deepseek.artifact.engine_manifest import (
    ENGINE_FILE,
    EngineManifest,
    EnginePlan,
    TensorFile,
    read_engine_manifest,
    write_engine_manifest,
)
from deepseek.artifact.manifest import MANIFEST_FILE
from deepseek.artifact.reader import ArtifactReader
from deepseek.config import CONFIG_FILE
from deepseek.engine.kv_cache import check_cache_format
from deepseek.engine.packed import (
    LAYOUT,
    RANKS,
    TARGET,
    TENSOR_FILE,
    EmbeddedFields,
    load_packed,
)
from deepseek.engine.packed_layout import packed_tensors
from deepseek.engine.packing import Progress, Source, pack_tensors, schemes_of
from deepseek.engine.pages import check_page_tokens
from deepseek.errors import ArtifactError, DeployError
from deepseek.files import json_bytes, write_atomic
from deepseek.outputs import (
    check_apart,
    check_directory,
    check_space,
    check_writable,
    make_directory,
    writing,
)
from deepseek.source.index import INDEX_FILE
from deepseek.tensor_files import save_tensors
from quant_jobs.targets.origin import manifest_bytes, origin_of


def pack_engine(
    source: Source,
    output: Path | str,
    *,
    kv_cache: str | None = None,
    page_tokens: int = 16,
    tp: int = 1,
    progress: Progress | None = None,
) -> EngineManifest:
    """Build the engine directory and return its manifest.

    `kv_cache` None takes the recipe's format (bf16 for an unquantized source). An output that
    already holds this very engine is verified and kept; what it has lost is built again.

    Raises:
        ArtifactError: the output holds something else, or the input is damaged.
        CheckpointError: the source checkpoint is damaged.
        DeployError: the engine cannot compute a format, or more than one rank was asked for.
        OutputError: the disk is too small, or the output cannot be written.
    """
    output = Path(output)
    if tp != RANKS.tp:
        raise DeployError(f"the embedded engine runs on one rank; --tp {tp} must be 1")
    common = _common_fields(source, kv_cache)
    own = _own_fields(source, page_tokens)
    check_apart(output, source.directory, "the checkpoint")
    existing = _read_existing(output, common | own)
    if existing is not None and _is_intact(output):
        return existing
    documents = _documents(source)
    check_writable(output.parent)
    check_space(output, _num_bytes(source), "choose another --output")
    tensors = pack_tensors(source, progress)
    make_directory(output.parent)
    staging = output.with_name(f".{output.name[:40]}.{os.getpid()}.tmp")
    shutil.rmtree(staging, ignore_errors=True)  # an earlier process may have had our number
    try:
        with writing(staging):
            staging.mkdir()
        saved = save_tensors(staging / TENSOR_FILE, tensors, {"format": "pt"})
        fields = EmbeddedFields(
            **own, header_sha256=saved.header_sha256, tensor_digests=saved.tensors
        )
        manifest = EngineManifest(
            **common,
            plan=EnginePlan(rank_weight_bytes=(sum(t.nbytes for t in tensors.values()),)),
            files=_write_documents(documents, staging),
            tensor_files={TENSOR_FILE: TensorFile(num_bytes=saved.num_bytes, sha256=saved.sha256)},
            target_fields=fields.model_dump(mode="json"),
        )
        write_engine_manifest(staging, manifest)
        if existing is not None:
            _restore(output, existing, staging, manifest)
        else:
            with writing(output):
                os.replace(staging, output)  # whole or absent; an empty directory is fine
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return manifest


def _common_fields(source: Source, kv_cache: str | None) -> dict[str, Any]:
    """The fields of `EngineManifest` that are known before anything is packed."""
    recipe_kv = source.manifest.kv_cache if isinstance(source, ArtifactReader) else "bf16"
    return {
        **origin_of(source),
        "target": TARGET,
        "ranks": RANKS,
        "kv_cache": check_cache_format(kv_cache or recipe_kv),
        "schemes": schemes_of(source),
        "versions": {"intserve": __version__, "torch": str(torch.__version__)},
    }


def _own_fields(source: Source, page_tokens: int) -> dict[str, Any]:
    """The fields of `EmbeddedFields` that are known before anything is packed."""
    check_page_tokens(page_tokens)
    return {
        "layout": LAYOUT,
        "page_tokens": page_tokens,
        "mtp": "skipped" if source.config.num_nextn_predict_layers else "absent",
    }


def _num_bytes(source: Source) -> int:
    """Size of the engine's tensor file, its header apart."""
    expected = packed_tensors(source.config, schemes_of(source))
    return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in expected.values())


def _is_intact(output: Path) -> bool:
    """Whether every byte of the engine in `output` is as it was built."""
    try:
        load_packed(output)
    except ArtifactError:
        return False
    return True


def _restore(
    output: Path, existing: EngineManifest, staging: Path, manifest: EngineManifest
) -> None:
    """Put the files of an engine that was built again in the place of those that `output` has lost.
    A verdict beside them stays.

    Raises:
        ArtifactError: the engine that was built again is another one.
    """
    if manifest != existing:
        raise ArtifactError(
            f"{output} has lost files, and the engine built again is not the one that "
            f"{ENGINE_FILE} describes; delete {output} and run again"
        )
    for name in (*manifest.files, *manifest.tensor_files):
        with writing(output / name):
            os.replace(staging / name, output / name)


def _read_existing(output: Path, requested: Mapping[str, Any]) -> EngineManifest | None:
    """The manifest of the engine that the output already holds; None where the output is free.

    Raises:
        ArtifactError: the output holds an engine that differs in a requested field, or other files,
            or its manifest is damaged.
        OutputError: the output cannot be a directory.
    """
    check_directory(output)
    with writing(output):
        if not output.is_dir() or not any(output.iterdir()):
            return None
    if not (output / ENGINE_FILE).exists():
        raise ArtifactError(
            f"{output} holds files of something else and no {ENGINE_FILE}; choose another --output"
        )
    try:
        manifest = read_engine_manifest(output)
    except ArtifactError as error:
        raise ArtifactError(f"{error}; delete {output} first") from error
    recorded = dict(manifest) | manifest.target_fields
    for field, value in requested.items():
        if recorded.get(field) != value:
            raise ArtifactError(
                f"{output} holds an engine whose {field} differs from the one to be built; choose "
                "another --output or delete it"
            )
    return manifest


def _documents(source: Source) -> dict[str, bytes]:
    """Config, manifest and tokenizer of the source, for the engine: name -> content. Of a quantized
    checkpoint they are those that its reader has verified.

    Raises:
        ArtifactError, CheckpointError: one cannot be copied; the sentence names it.
    """
    if not isinstance(source, ArtifactReader):
        content = source.config_bytes or json_bytes(source.config_content)
        return read_copied(source.directory) | {CONFIG_FILE: content}
    documents = dict(source.documents)
    documents.pop(INDEX_FILE, None)  # of the checkpoint's shards, which the engine has not
    documents[MANIFEST_FILE] = manifest_bytes(source)
    return documents


def _write_documents(documents: Mapping[str, bytes], directory: Path) -> dict[str, str]:
    """Write the documents into the engine; name -> SHA-256."""
    for name, data in documents.items():
        write_atomic(directory / name, data)
    return {name: hashlib.sha256(data).hexdigest() for name, data in sorted(documents.items())}
