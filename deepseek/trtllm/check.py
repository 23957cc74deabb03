"""`build --check DIR`: whether an engine directory is what TensorRT-LLM has to load.

Its loader takes much without a word: a tensor in a file that nobody meant, codes in another order,
an FP8 linear that the config does not list. Everything that is known to pass there is refused here,
each by a sentence that names the tensor or the file. The steps:

    documents   engine.json and what it lists, nothing else in the directory (`check_files.py`)
    loading     the loader's model over all ranks, without values (`loader.py`)
    headers     names, types and shapes, against what was to be built
    values      input scales (`check_values.py`); digests against engine.json and intserve.json
    artifact    if it is given: every value that a rank holds, decoded (`loader_decode.py`)

What is the same for every target is `deepseek/artifact/engine_checks.py`.
"""

from __future__ import annotations

from pathlib import Path

from deepseek.artifact.built_engine import read_engine
from deepseek.artifact.engine_checks import (
    ByteProgress,
    CheckReport,
    artifact_layers,
    check_digests,
    check_headers,
    check_same_config,
    untold,
)
from deepseek.artifact.layout import stored_layers
from deepseek.artifact.reader import ArtifactReader
from deepseek.errors import ArtifactError
from deepseek.trtllm.check_files import (
    LOADER,
    check_args,
    check_config,
    check_names,
    read_trtllm_manifest,
)
from deepseek.trtllm.check_values import check_input_scales, diagnose, origins
from deepseek.trtllm.layout import stored_tensors
from deepseek.trtllm.loader import LoaderModel, LoaderRefusal
from deepseek.trtllm.loader_decode import compare


def check_engine(
    directory: Path,
    *,
    artifact: ArtifactReader | None = None,
    digests: bool = True,
    progress: ByteProgress = untold,
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
    check_names(directory, engine, fields)
    built = read_engine(directory)
    stored = check_config(directory, built, engine, fields)
    mtp = fields.mtp == "kept"
    model = LoaderModel(directory, engine.ranks, fields.engine_version, values=False, mtp=mtp)
    _check_loading(model)
    check_headers(
        model.checkpoint,
        stored_layers(model.config, mtp=mtp),
        lambda layer: stored_tensors(model.config, stored, layer),
    )
    warnings = check_args(directory, built, model.config, engine, stored, fields)
    mapped = model.checkpoint.with_values()
    check_input_scales(mapped, model.config, stored, fields)
    hashed = verified = compared = 0
    if digests:
        schemes = built.manifest.recipe.resolve(built.config) if built.manifest else {}
        hashed, verified = check_digests(
            mapped, built, engine, origins(schemes, stored), diagnose, progress=progress
        )
    if artifact is not None:
        check_same_config(directory, built, artifact)
        reference = artifact_layers(directory, engine, artifact)
        full = LoaderModel(directory, engine.ranks, fields.engine_version, mtp=mtp)
        compared = compare(full, reference)
    return CheckReport(
        directory=directory,
        target=engine.target,
        loader=LOADER,
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
