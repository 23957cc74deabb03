"""`build --check DIR`: whether an engine directory is what SGLang has to load.

Of a quantized model SGLang does not check that its parameters were filled, and it takes tensors of
other types and shapes without a word. Everything that is known to pass there is refused here, each
by a sentence that names the tensor or the file. The steps:

    documents   engine.json and what it lists, nothing else in the directory
    config      config.json against engine.json, sglang.yaml against both
    loading     the loader's model over all ranks, without values (`loader.py`)
    headers     names, types and shapes, against what was to be built
    values      digests against engine.json and intserve.json
    artifact    if it is given: every value that a rank holds, decoded (`loader_decode.py`)

What is the same for every target is `deepseek/artifact/engine_checks.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from deepseek.artifact.built_engine import BuiltEngine, read_engine
from deepseek.artifact.documents import document_object
from deepseek.artifact.engine_checks import (
    ByteProgress,
    CheckReport,
    artifact_layers,
    check_digests,
    check_headers,
    check_listing,
    check_mtp,
    check_quantization_config,
    check_same_config,
    check_schemes,
    read_target_manifest,
    untold,
)
from deepseek.artifact.engine_manifest import ENGINE_FILE, EngineManifest
from deepseek.artifact.layout import stored_layers
from deepseek.artifact.reader import ArtifactReader
from deepseek.config import ModelConfig
from deepseek.errors import ArtifactError, DeployError
from deepseek.fused_loader.decode import compare
from deepseek.fused_loader.loading import check_loading
from deepseek.recipe import Scheme
from deepseek.sglang.check_values import check_input_scales, origins, reference_values
from deepseek.sglang.fields import LOADER, TARGET, SglangFields
from deepseek.sglang.launch import (
    KV_DTYPES,
    LAUNCH_FILE,
    Launch,
    faults,
    keeps_shared_experts_apart,
    launch_of,
)
from deepseek.sglang.layout import stored_schemes, stored_tensors
from deepseek.sglang.loadable import check_loadable
from deepseek.sglang.loader import LoaderModel
from deepseek.sglang.loader_decode import Decoder
from deepseek.sglang.quant_config import sglang_quantization_config


def check_engine(
    directory: Path,
    *,
    artifact: ArtifactReader | None = None,
    digests: bool = True,
    progress: ByteProgress = untold,
) -> CheckReport:
    """Check an engine directory that was built for SGLang.

    `digests` False reads documents and headers only, not the tensors. `artifact` is the quantized
    checkpoint that it was built from. Memory: one layer at a time with `artifact`, else single
    tensors.

    Raises:
        ArtifactError, DeployError, ConfigError: it is not what it should be, or SGLang would not
            load it, or would load something else; one sentence says what.
    """
    directory = Path(directory)
    engine, fields = read_target_manifest(directory, TARGET, LOADER, SglangFields)
    check_listing(directory, engine, LOADER)
    built = read_engine(directory)
    mtp, dialect = fields.mtp == "kept", fields.dialect
    stored = check_config(directory, built, engine, fields)
    launch = _read_launch(directory, built)

    def loader(*, values: bool) -> LoaderModel:
        return LoaderModel(
            directory, engine.ranks, quantization=launch.quantization, values=values, mtp=mtp
        )

    model = loader(values=False)
    check_loading(model)
    check_headers(
        model.checkpoint,
        stored_layers(model.config, mtp=mtp),
        lambda layer: stored_tensors(model.config, stored, layer, dialect),
        index_needed=True,
    )
    _check_launch(directory / LAUNCH_FILE, launch, built, engine, fields, stored)
    mapped = model.checkpoint.with_values()
    check_input_scales(mapped, stored, fields)
    hashed = verified = compared = 0
    if digests:
        schemes = built.manifest.recipe.resolve(built.config) if built.manifest else {}
        hashed, verified = check_digests(
            mapped, built, engine, origins(schemes, stored), progress=progress
        )
    if artifact is not None:
        check_same_config(directory, built, artifact)
        layers = artifact_layers(directory, engine, artifact)
        compared = compare(
            loader(values=True),
            lambda layer: reference_values(layers(layer), artifact, stored, fields, layer),
            Decoder(),
        )
    return CheckReport(
        directory=directory,
        target=TARGET,
        loader=LOADER,
        engine_digest=engine.digest,
        dialect=dialect,
        engine_version=fields.engine_version,
        ranks=tuple(model.loads[rank] for rank in range(engine.ranks.tp)),
        tensors=len(list(model.checkpoint)),
        reads=model.reads.total(),
        hashed_bytes=hashed,
        verified=verified,
        compared=compared,
    )


def check_config(
    directory: Path, built: BuiltEngine, engine: EngineManifest, fields: SglangFields
) -> dict[str, Scheme]:
    """Check config.json against engine.json; how the directory stores every linear.

    Raises:
        ArtifactError, DeployError: they disagree, or SGLang cannot load what they say.
    """
    path = directory / "config.json"
    raw = document_object(directory, built.documents, "config.json")
    if "auto_map" in raw:
        raise ArtifactError(f"{path} has auto_map, which names code to run; build again")
    config = ModelConfig.from_dict(raw)
    check_mtp(directory, config, fields.mtp)
    mtp = fields.mtp == "kept"
    check_schemes(directory, built, built.config, engine, mtp=mtp)
    if (built.manifest is None) != (fields.dialect == "released"):
        raise ArtifactError(
            f"{directory / ENGINE_FILE} says that the dialect is {fields.dialect}, which is not "
            "that of what it was built from; build again"
        )
    if built.kv_cache not in KV_DTYPES:
        raise DeployError(
            f"{directory / ENGINE_FILE} asks for a KV cache in {built.kv_cache}, which SGLang has "
            f"not for this model; build with {' or '.join(KV_DTYPES)}"
        )
    check_loadable(built.config, engine.schemes, fields.dialect, engine.ranks, mtp=mtp)
    stored = stored_schemes(config, engine.schemes, fields.dialect, mtp=mtp)
    if fields.dialect != "released":
        wanted = sglang_quantization_config(built.config, stored, fields.dialect)
        check_quantization_config(path, raw.get("quantization_config"), wanted)
    return stored


def _read_launch(directory: Path, built: BuiltEngine) -> Launch:
    if LAUNCH_FILE not in built.documents:
        raise ArtifactError(f"{directory} has no {LAUNCH_FILE}; build again")
    return launch_of(built.documents[LAUNCH_FILE], where=str(directory / LAUNCH_FILE))


def _check_launch(
    path: Path,
    launch: Launch,
    built: BuiltEngine,
    engine: EngineManifest,
    fields: SglangFields,
    stored: Mapping[str, Scheme],
) -> None:
    for fault in faults(
        launch,
        engine.ranks,
        fields.dialect,
        kv_cache=built.kv_cache,
        mtp=fields.mtp == "kept",
        context=built.config.max_position_embeddings,
        shared_apart=keeps_shared_experts_apart(stored),
    ):
        raise DeployError(f"{path}: {fault}")
