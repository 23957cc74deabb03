"""`build --check DIR`: whether an engine directory is what vLLM has to load.

Of a quantized model vLLM does not check that its parameters were filled, and it takes tensors of
other types and shapes without a word. Everything that is known to pass there is refused here, each
by a sentence that names the tensor or the file. The steps:

    documents   engine.json and what it lists, nothing else in the directory
    config      config.json against engine.json, vllm.yaml against both
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
    Origin,
    Original,
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
from deepseek.vllm.fields import LOADER, TARGET, VllmFields
from deepseek.vllm.launch import KV_DTYPES, LAUNCH_FILE, Launch, faults, launch_of
from deepseek.vllm.layout import stored_schemes, stored_tensors
from deepseek.vllm.loadable import check_loadable
from deepseek.vllm.loader import LoaderModel
from deepseek.vllm.loader_decode import Decoder
from deepseek.vllm.quant_config import vllm_quantization_config


def check_engine(
    directory: Path,
    *,
    artifact: ArtifactReader | None = None,
    digests: bool = True,
    progress: ByteProgress = untold,
) -> CheckReport:
    """Check an engine directory that was built for vLLM.

    `digests` False reads documents and headers only, not the tensors. `artifact` is the quantized
    checkpoint that it was built from. Memory: one layer at a time with `artifact`, else single
    tensors.

    Raises:
        ArtifactError, DeployError, ConfigError: it is not what it should be, or vLLM would not load
            it, or would load something else; one sentence says what.
    """
    directory = Path(directory)
    engine, fields = read_target_manifest(directory, TARGET, LOADER, VllmFields)
    check_listing(directory, engine, LOADER)
    built = read_engine(directory)
    mtp, released = fields.mtp == "kept", fields.form == "released"
    stored = check_config(directory, built, engine, fields)
    model = LoaderModel(directory, engine.ranks, values=False, mtp=mtp)
    check_loading(model)
    check_headers(
        model.checkpoint,
        stored_layers(model.config, mtp=mtp),
        lambda layer: stored_tensors(model.config, stored, layer, released=released),
        index_needed=True,
    )
    check_launch(directory, built, model.config, engine, mtp=mtp)
    hashed = verified = compared = 0
    if digests:
        mapped = model.checkpoint.with_values()
        schemes = built.manifest.recipe.resolve(built.config) if built.manifest else {}
        hashed, verified = check_digests(
            mapped, built, engine, _origins(schemes), progress=progress
        )
    if artifact is not None:
        check_same_config(directory, built, artifact)
        reference = artifact_layers(directory, engine, artifact)
        compared = compare(LoaderModel(directory, engine.ranks, mtp=mtp), reference, Decoder())
    return CheckReport(
        directory=directory,
        target=TARGET,
        loader=LOADER,
        engine_digest=engine.digest,
        dialect=None,
        engine_version=fields.engine_version,
        ranks=tuple(model.loads[rank] for rank in range(engine.ranks.tp)),
        tensors=len(list(model.checkpoint)),
        reads=model.reads.total(),
        hashed_bytes=hashed,
        verified=verified,
        compared=compared,
    )


def check_config(
    directory: Path, built: BuiltEngine, engine: EngineManifest, fields: VllmFields
) -> dict[str, Scheme]:
    """Check config.json against engine.json; how the directory stores every linear.

    Raises:
        ArtifactError, DeployError: they disagree, or vLLM cannot load what they say.
    """
    path = directory / "config.json"
    raw = document_object(directory, built.documents, "config.json")
    if "auto_map" in raw:
        raise ArtifactError(f"{path} has auto_map, which names code to run; build again")
    config = ModelConfig.from_dict(raw)
    check_mtp(directory, config, fields.mtp)
    mtp = fields.mtp == "kept"
    check_schemes(directory, built, built.config, engine, mtp=mtp)
    if (built.manifest is None) != (fields.form == "released"):
        raise ArtifactError(
            f"{directory / ENGINE_FILE} says that the form is {fields.form}, which is not that of "
            "what it was built from; build again"
        )
    if built.kv_cache not in KV_DTYPES:
        raise DeployError(
            f"{directory / ENGINE_FILE} asks for a KV cache in {built.kv_cache}, which vLLM has "
            f"not for this model; build with {' or '.join(KV_DTYPES)}"
        )
    stored = stored_schemes(config, engine.schemes, mtp=mtp)
    check_loadable(built.config, stored, engine.ranks, mtp=mtp)
    if fields.form == "compressed-tensors":
        wanted = vllm_quantization_config(built.config, stored, mtp=mtp)
        check_quantization_config(path, raw.get("quantization_config"), wanted)
    return stored


def check_launch(
    directory: Path,
    built: BuiltEngine,
    config: ModelConfig,
    engine: EngineManifest,
    *,
    mtp: bool,
) -> Launch:
    """Read vllm.yaml and check it against engine.json.

    Raises:
        ArtifactError, DeployError: it is absent, is no file of arguments, or has those of another
            engine.
    """
    path = directory / LAUNCH_FILE
    if LAUNCH_FILE not in built.documents:
        raise ArtifactError(f"{directory} has no {LAUNCH_FILE}; build again")
    launch = launch_of(built.documents[LAUNCH_FILE], where=str(path))
    for fault in faults(
        launch,
        engine.ranks,
        kv_cache=built.kv_cache,
        mtp=mtp,
        context=config.max_position_embeddings,
    ):
        raise DeployError(f"{path}: {fault}")
    return launch


def _origins(schemes: Mapping[str, Scheme]) -> Origin:
    """What every key was in the artifact; scales that were rounded cannot be turned back and are
    covered by the SHA-256 of the files only."""

    def origin(key: str) -> Original | None:
        module, _, suffix = key.rpartition(".")
        scheme = schemes.get(module)
        rounded = (
            scheme is not None
            and suffix == "weight_scale"
            and scheme.weights in ("int8", "int8-asym")
            and scheme.activations == "none"
        )
        return None if rounded else Original(key)

    return origin
