"""Build the embedded engine: the directory that `deepseek/engine/packed.py` loads.

The directory appears whole or not at all. The same artifact, KV format, page size and CPU layout
give the same bytes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from deepseek import __version__
from deepseek.artifact.engine_manifest import (
    ENGINE_FILE,
    UNQUANTIZED,
    EngineManifest,
    EnginePlan,
    TensorFile,
    read_engine_manifest,
    write_engine_manifest,
)
from deepseek.artifact.manifest import MANIFEST_FILE
from deepseek.artifact.reader import ArtifactReader
from deepseek.artifact.writer import COPIED_FILES
from deepseek.config import CONFIG_FILE
from deepseek.engine.kv_cache import check_cache_format
from deepseek.engine.packed import RANKS, TARGET, TENSOR_FILE, EmbeddedFields, load_packed
from deepseek.engine.packing import Progress, Source, pack_tensors, schemes_of
from deepseek.engine.pages import check_page_tokens
from deepseek.errors import ArtifactError, DeployError
from deepseek.files import sha256_file, write_atomic, write_json
from deepseek.source.checkpoint import CheckpointReader
from deepseek.tensor_files import save_tensors


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
    already holds this very engine is verified and kept.

    Raises:
        ArtifactError: the output holds something else, or the input is damaged.
        CheckpointError: the source checkpoint is damaged.
        DeployError: the engine cannot compute a format, or more than one rank was asked for.
    """
    output = Path(output)
    if tp != RANKS.tp:
        raise DeployError(f"the embedded engine runs on one rank; --tp {tp} must be 1")
    common = _common_fields(source, kv_cache)
    own = _own_fields(source, page_tokens)
    if (existing := _read_existing(output, common | own)) is not None:
        return existing
    tensors = pack_tensors(source, progress)
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    shutil.rmtree(staging, ignore_errors=True)  # an earlier process may have had our number
    try:
        staging.mkdir()
        saved = save_tensors(staging / TENSOR_FILE, tensors, {"format": "pt"})
        fields = EmbeddedFields(
            **own, header_sha256=saved.header_sha256, tensor_digests=saved.tensors
        )
        manifest = EngineManifest(
            **common,
            plan=EnginePlan(rank_weight_bytes=(sum(t.nbytes for t in tensors.values()),)),
            files=_copy_files(source, staging),
            tensor_files={TENSOR_FILE: TensorFile(num_bytes=saved.num_bytes, sha256=saved.sha256)},
            target_fields=fields.model_dump(mode="json"),
        )
        write_engine_manifest(staging, manifest)
        os.replace(staging, output)  # whole or absent; an empty directory in the way is fine
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return manifest


def _common_fields(source: Source, kv_cache: str | None) -> dict[str, Any]:
    """The fields of `EngineManifest` that are known before anything is packed."""
    if isinstance(source, ArtifactReader):
        recipe, digest = source.recipe.name, source.digest
        fingerprint, recipe_kv = source.manifest.source.fingerprint, source.manifest.kv_cache
    else:
        recipe, digest = UNQUANTIZED, source.fingerprint
        fingerprint, recipe_kv = source.fingerprint, "bf16"
    return {
        "target": TARGET,
        "ranks": RANKS,
        "recipe": recipe,
        "artifact_digest": digest,
        "source_fingerprint": fingerprint,
        "kv_cache": check_cache_format(kv_cache or recipe_kv),
        "schemes": schemes_of(source),
        "versions": {"intserve": __version__, "torch": str(torch.__version__)},
    }


def _own_fields(source: Source, page_tokens: int) -> dict[str, Any]:
    """The fields of `EmbeddedFields` that are known before anything is packed."""
    check_page_tokens(page_tokens)
    int4 = any(scheme.weights in ("int4", "int4-asym") for scheme in schemes_of(source).values())
    return {
        "dtype": "float32",
        "page_tokens": page_tokens,
        "cpu_layout": torch.backends.cpu.get_cpu_capability() if int4 else None,
        "mtp": "skipped" if source.config.num_nextn_predict_layers else "absent",
    }


def _read_existing(output: Path, requested: Mapping[str, Any]) -> EngineManifest | None:
    """The engine that the output already holds, verified; None where the output is free.

    Raises:
        ArtifactError: the output holds an engine that differs in a requested field, or other files.
    """
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
    recorded = dict(manifest) | manifest.target_fields
    for field, value in requested.items():
        if recorded.get(field) != value:
            raise ArtifactError(
                f"{output} holds an engine whose {field} differs from the one to be built; choose "
                "another --output or delete it"
            )
    load_packed(output)
    return manifest


def _copy_files(source: Source, directory: Path) -> dict[str, str]:
    """Copy config, manifest and tokenizer into the engine; name -> SHA-256."""
    copied = {}
    for name in (CONFIG_FILE, MANIFEST_FILE, *COPIED_FILES):
        if name == CONFIG_FILE and isinstance(source, CheckpointReader):
            _write_config(source, directory / name)
        elif (source.directory / name).is_file():
            write_atomic(directory / name, (source.directory / name).read_bytes())
        else:
            continue
        copied[name] = sha256_file(directory / name)
    return dict(sorted(copied.items()))


def _write_config(source: CheckpointReader, path: Path) -> None:
    """The source's config.json as it is, or made true of a copy that it does not describe."""
    if source.config_bytes is not None:
        write_atomic(path, source.config_bytes)
    else:
        write_json(path, source.config_content)
