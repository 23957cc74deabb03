"""Build a TensorRT-LLM engine: the directory that its PyTorch backend loads for DeepSeek on Hopper.

    config.json                  the source's, without quantization_config
    hf_quant_config.json         how every module is quantized, and quant_cfg.json the same where
                                 the dialect is `mixed`; neither for a release as it is
    llm_args.yaml                arguments of `tensorrt_llm.LLM`, from the plan
    model-layer-00003.safetensors one per decoder layer, and model-globals.safetensors
    model.safetensors.index.json for tools; its loader reads every *.safetensors that it finds
    tokenizer files, intserve.json
    engine.json                  written last: its presence means that the engine is complete

One file is one task (`sharded.py`), on Ray or in this process. The bytes do not depend on the
number of workers, and a killed build goes on with the files that are missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from deepseek.artifact.engine_manifest import (
    ENGINE_FILE,
    EngineManifest,
    TensorFile,
    read_engine_manifest,
    write_engine_manifest,
)
from deepseek.artifact.manifest import MANIFEST_FILE, LayerKey
from deepseek.artifact.reader import ArtifactReader
from deepseek.artifact.tensors import layer_file
from deepseek.engine.packing import Source, schemes_of
from deepseek.errors import ArtifactError
from deepseek.files import write_atomic
from deepseek.outputs import check_apart, check_space, check_writable
from deepseek.recipe import Scheme
from deepseek.source.checkpoint import CheckpointReader
from deepseek.tensor_files import DTYPES, saved_bytes
from deepseek.trtllm.fields import LayerInputScales, TrtllmFields
from deepseek.trtllm.layout import (
    Dialect,
    stored_schemes,
    stored_tensors,
)
from deepseek.trtllm.llm_args import LLM_ARGS_FILE
from quant_jobs.targets.sharded import (
    BuildFolder,
    BuiltFile,
    Note,
    Progress,
    build_files,
    check_same_inputs,
)
from quant_jobs.targets.trtllm_plan import TrtllmBuild
from quant_jobs.targets.trtllm_tensors import write_file


def build_trtllm(
    build: TrtllmBuild,
    output: Path,
    workers: int,
    progress: Progress,
    *,
    note: Note = lambda line: None,
) -> tuple[EngineManifest, dict[str, BuiltFile]]:
    """Build the engine directory, or what it lacks, on `workers` Ray workers (0: in this process).
    Returns its manifest and the record of every tensor file by key.

    An output that holds this very engine is verified; a file that it has lost is made again.

    Raises:
        ArtifactError: the output holds another engine or other files, or the checkpoint is damaged.
        OutputError: the disk is too small, or a file cannot be written.
    """
    check_apart(output, build.source.directory, "the checkpoint")
    known = _known_files(output, build.manifest)
    check_writable(output.parent)
    with BuildFolder(output, _inputs(build.manifest)) as folder:
        done = known.keys() | folder.records().keys()
        todo = (layer for layer in build.layers if str(layer) not in done)
        num_bytes = sum(_file_bytes(build, layer) for layer in todo)
        check_space(output, num_bytes, "choose another --output")
        built = build_files(folder, build.keys, _maker(build), workers, progress, known, note=note)
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


# --- files ---


@dataclass(frozen=True, slots=True)
class _Maker:
    """Makes one tensor file; travels to Ray's workers."""

    checkpoint: Path
    digest: str
    dialect: Dialect
    mtp: bool
    scales: tuple[tuple[int, LayerInputScales], ...]

    def make(self, key: str, directory: Path) -> BuiltFile:
        """Write the file of one layer into the directory."""
        source, schemes, stored = _open(self)
        layer: LayerKey = "globals" if key == "globals" else int(key)
        name = layer_file(layer)
        sha256, num_bytes, bytes_read = write_file(
            directory / name,
            source,
            schemes,
            stored,
            layer,
            dict(self.scales).get(layer),  # type: ignore[arg-type]
        )
        return BuiltFile(
            key=key, file=name, num_bytes=num_bytes, sha256=sha256, bytes_read=bytes_read
        )


@lru_cache(maxsize=1)
def _open(maker: _Maker) -> tuple[Source, Mapping[str, Scheme], Mapping[str, Scheme]]:
    """The checkpoint of a maker, opened once per process, which must be the one that was planned.

    Raises:
        ArtifactError, CheckpointError: it is another one here.
    """
    source: Source
    if (maker.checkpoint / MANIFEST_FILE).exists():
        source = ArtifactReader(maker.checkpoint)
        digest = source.digest
    else:
        source = CheckpointReader(maker.checkpoint, warn=False)
        digest = source.fingerprint
    if digest != maker.digest:
        raise ArtifactError(
            f"{maker.checkpoint} is another checkpoint on this node, or has changed; --checkpoint "
            "must be on storage that all nodes share"
        )
    schemes = schemes_of(source)
    return source, schemes, stored_schemes(source.config, schemes, maker.dialect, mtp=maker.mtp)


def _maker(build: TrtllmBuild) -> _Maker:
    fields = TrtllmFields.model_validate(build.manifest.target_fields)
    return _Maker(
        checkpoint=build.source.directory.resolve(),
        digest=build.manifest.artifact_digest,
        dialect=build.dialect,
        mtp=fields.mtp == "kept",
        scales=tuple(fields.input_scales.items()),
    )


def _file_bytes(build: TrtllmBuild, layer: LayerKey) -> int:
    """Size of one tensor file; types as the release has them."""
    tensors = stored_tensors(build.source.config, build.stored, layer)
    layout = {name: (DTYPES[tensor.dtype], tensor.shape) for name, tensor in tensors.items()}
    return saved_bytes(layout, {"format": "pt"})


# --- an output that is there already ---


def _inputs(manifest: EngineManifest) -> dict[str, Any]:
    """What decides the bytes of an output; keys are words for the error sentence, the plainest
    first, because arguments follow from the others too."""
    fields = manifest.target_fields
    return {
        "target": manifest.target,
        "checkpoint": manifest.artifact_digest,
        **{name: fields.get(name) for name in ("dialect", "engine_version", "mtp")},
        "ranks": f"tp {manifest.ranks.tp}, ep {manifest.ranks.ep}",
        "kv_cache": manifest.kv_cache,
        "versions": manifest.versions,
        LLM_ARGS_FILE: manifest.files.get(LLM_ARGS_FILE),
    }


def _known_files(output: Path, manifest: EngineManifest) -> dict[str, BuiltFile]:
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
    check_same_inputs(output, "an engine", _inputs(existing), _inputs(manifest))
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
