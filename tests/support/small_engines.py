"""A directory with the form of an engine and files of random bytes: what copies are made of."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

from deepseek.artifact.engine_manifest import (
    EngineManifest,
    EnginePlan,
    RankLayout,
    TensorFile,
    write_engine_manifest,
)

DOCUMENTS = {"config.json": b"{}\n", "tokenizer.json": b'{"a": 1}\n'}


def make_small_engine(
    directory: Path, *, files: int = 5, file_bytes: int = 100_000, seed: int = 0
) -> EngineManifest:
    """Tensor files of about `file_bytes` each."""
    directory.mkdir(parents=True)
    source = random.Random(seed)
    tensor_files = {}
    for number in range(files):
        data = source.randbytes(file_bytes + number)
        name = f"model-layer-{number:05d}.safetensors"
        (directory / name).write_bytes(data)
        tensor_files[name] = TensorFile(
            num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest()
        )
    for name, data in DOCUMENTS.items():
        (directory / name).write_bytes(data)
    manifest = EngineManifest(
        target="trtllm",
        ranks=RankLayout(tp=1, ep=1),
        recipe="int4",
        artifact_digest=f"{seed:064d}",
        source_fingerprint="0" * 64,
        kv_cache="bf16",
        schemes={},
        versions={},
        plan=EnginePlan(rank_weight_bytes=(1,)),
        files={name: hashlib.sha256(data).hexdigest() for name, data in DOCUMENTS.items()},
        tensor_files=tensor_files,
        target_fields={},
    )
    write_engine_manifest(directory, manifest)
    return manifest


def whole(directory: Path) -> dict[str, bytes]:
    """Every file of a directory, hidden ones too."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}
