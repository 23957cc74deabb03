"""`build --check DIR`: whether an engine directory is what TensorRT-LLM has to load.

Its loader takes much without a word: a tensor in a file that nobody meant, codes in another order,
an FP8 linear that the config does not list. Everything that is known to pass there is refused here,
each by a sentence that names the tensor or the file. The steps:

    documents   engine.json and what it lists, nothing else in the directory (`check_files.py`)
    headers     names, types and shapes, against what was to be built (`check_files.py`)
    loading     the loader's model over all ranks, without values (`loader.py`)
    values      input scales; digests against engine.json and intserve.json (`check_values.py`)
    artifact    if it is given: every value that a rank holds, decoded (`loader_decode.py`)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from deepseek.artifact.built_engine import read_engine
from deepseek.artifact.manifest import LayerKey
from deepseek.artifact.reader import ArtifactReader
from deepseek.errors import ArtifactError
from deepseek.trtllm.check_files import (
    check_args,
    check_config,
    check_headers,
    check_listing,
    check_same_config,
    read_trtllm_manifest,
)
from deepseek.trtllm.check_values import check_digests, check_input_scales
from deepseek.trtllm.fields import TrtllmFields
from deepseek.trtllm.layout import Dialect
from deepseek.trtllm.loader import LoaderModel, LoaderRefusal, RankLoad
from deepseek.trtllm.loader_decode import compare
from deepseek.trtllm.versions import EngineVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """What was checked of an engine directory that passed.

    `ranks` says by rank what the loader reads of the files and what its parameters hold, in bytes.
    `tensors` is the number of keys in the files, `reads` how often all ranks together read one.
    `hashed_bytes` were compared with engine.json, `verified` tensors with intserve.json, `compared`
    tensors with the artifact, value by value on every rank. `warnings` are the linter's of
    llm_args.yaml.
    """

    directory: Path
    engine_digest: str
    dialect: Dialect
    engine_version: EngineVersion
    ranks: tuple[RankLoad, ...]
    tensors: int
    reads: int
    hashed_bytes: int = 0
    verified: int = 0
    compared: int = 0
    warnings: tuple[str, ...] = ()


def check_engine(
    directory: Path, *, artifact: ArtifactReader | None = None, digests: bool = True
) -> CheckReport:
    """Check an engine directory that was built for TensorRT-LLM.

    `digests` False reads documents, headers and input scales only, not the tensors. `artifact` is
    the quantized checkpoint that it was built from. Memory: one layer at a time with `artifact`,
    else single tensors.

    Raises:
        ArtifactError, DeployError, ConfigError: it is not what it should be, or TensorRT-LLM would
            not load it, or would load something else; one sentence says what.
    """
    directory = Path(directory)
    engine, fields = read_trtllm_manifest(directory)
    check_listing(directory, engine, fields)
    built = read_engine(directory)
    stored = check_config(directory, built, engine, fields)
    mtp = fields.mtp == "kept"
    model = LoaderModel(directory, engine.ranks, fields.engine_version, values=False, mtp=mtp)
    _check_loading(model)
    check_headers(model.checkpoint, model.config, stored, mtp=mtp)
    warnings = check_args(directory, built, model.config, engine, stored, fields)
    mapped = model.checkpoint.with_values()
    check_input_scales(mapped, model.config, stored, fields)
    hashed = verified = compared = 0
    if digests:
        hashed, verified = check_digests(mapped, built, engine, stored)
    if artifact is not None:
        check_same_config(directory, built, artifact)
        compared = _compare(directory, artifact, engine.artifact_digest, model, fields)
    return CheckReport(
        directory=directory,
        engine_digest=engine.digest,
        dialect=fields.dialect,
        engine_version=fields.engine_version,
        ranks=tuple(model.loads[rank] for rank in range(engine.ranks.tp)),
        tensors=len(list(model.checkpoint)),
        reads=model.reads.total(),
        hashed_bytes=hashed,
        verified=verified,
        compared=compared,
        warnings=warnings,
    )


def _check_loading(model: LoaderModel) -> None:
    """Load every rank without values, and refuse what the loader would take without a word."""
    _refuse_silent(model)
    for rank in range(model.ranks.tp):
        for _ in model.load(rank):
            pass
    _refuse_silent(model)
    config = model.config
    for key in model.unread():
        parts = key.split(".")
        is_layer = parts[:2] == ["model", "layers"] and parts[2].isdigit()
        if is_layer and int(parts[2]) >= config.num_hidden_layers:
            if model.mtp and parts[-2] in ("embed_tokens", "head"):
                continue  # copies of embedding and head, which this loader shares
            raise ArtifactError(
                f"{model.checkpoint.file(key)} holds {key} of an MTP layer, which the engine was "
                "built without; remove it or build again"
            )
        if parts[-1] == "weight_shape":
            raise ArtifactError(
                f"{model.checkpoint.file(key)} holds {key}, which is a checkpoint's of "
                "compressed-tensors; TensorRT-LLM reads other packing: build again"
            )
        raise ArtifactError(
            f"{model.checkpoint.file(key)} holds {key}, which TensorRT-LLM never reads: either it "
            "is not the engine's, or a value is missing where it is meant to be used; build again"
        )


def _refuse_silent(model: LoaderModel) -> None:
    for key, what in sorted(model.silent.items()):
        raise LoaderRefusal(
            f"{model.directory}: tensor {key} {what}, and TensorRT-LLM would say nothing; build "
            "again"
        )


def _compare(
    directory: Path,
    artifact: ArtifactReader,
    digest: str,
    checked: LoaderModel,
    fields: TrtllmFields,
) -> int:
    if artifact.digest != digest:
        raise ArtifactError(
            f"{directory} was built from the artifact {digest[:16]}, but {artifact.directory} is "
            f"{artifact.digest[:16]}; give the artifact that it was built from"
        )

    def reference(layer: LayerKey) -> Mapping[str, Tensor]:
        return artifact.read_globals() if layer == "globals" else artifact.read_layer(layer)

    model = LoaderModel(directory, checked.ranks, fields.engine_version, mtp=checked.mtp)
    return compare(model, reference)
