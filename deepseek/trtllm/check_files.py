"""The documents and headers of an engine directory for TensorRT-LLM, checked without values."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from deepseek import untrusted
from deepseek.artifact.built_engine import BuiltEngine
from deepseek.artifact.documents import document_object
from deepseek.artifact.engine_manifest import ENGINE_FILE, EngineManifest, read_engine_manifest
from deepseek.artifact.layout import stored_layers
from deepseek.artifact.manifest import MANIFEST_FILE
from deepseek.artifact.reader import ArtifactReader
from deepseek.artifact.tensors import layer_file
from deepseek.config import ModelConfig
from deepseek.errors import ArtifactError, DeployError, first_problem
from deepseek.inventory import expert_of, linears
from deepseek.recipe import Scheme
from deepseek.source.index import INDEX_FILE
from deepseek.tensor_files import DTYPE_NAMES
from deepseek.trtllm.fields import TARGET, TrtllmFields
from deepseek.trtllm.findings import ExpertFormat
from deepseek.trtllm.layout import TILE, stored_schemes, stored_tensors
from deepseek.trtllm.lint import lint
from deepseek.trtllm.llm_args import LLM_ARGS_FILE, llm_args_of
from deepseek.trtllm.loader_config import QuantConfig, read_quant_config
from deepseek.trtllm.loader_files import Checkpoint
from deepseek.trtllm.quant_config import HF_QUANT_CONFIG_FILE, KV_ALGOS, QUANT_CFG_FILE

EXPERT_FORMATS: tuple[ExpertFormat, ...] = get_args(ExpertFormat)
#: What TensorRT-LLM, or a tool beside it, loads by its ending wherever it lies in the directory.
_WEIGHT_ENDINGS = (".safetensors", ".bin", ".pth", ".pt")

_SHARDS = re.compile(r"model-(layer-\d{5}|globals)[.]safetensors", re.ASCII)


def read_trtllm_manifest(directory: Path) -> tuple[EngineManifest, TrtllmFields]:
    """engine.json, and what it says for this target.

    Raises:
        ArtifactError: absent, edited, or not of this target.
    """
    engine = read_engine_manifest(directory)
    path = directory / ENGINE_FILE
    if engine.target != TARGET:
        raise ArtifactError(
            f"{directory} is an engine for {engine.target}, not for TensorRT-LLM; build one with "
            "--target trtllm"
        )
    try:
        return engine, TrtllmFields.model_validate(engine.target_fields)
    except ValidationError as error:
        raise ArtifactError(
            f"{path}: target_fields.{first_problem(error)}; build the engine again"
        ) from error


def check_listing(directory: Path, engine: EngineManifest, fields: TrtllmFields) -> None:
    """Check which weight files and quantization files lie in the directory, before any is read.

    Raises:
        ArtifactError: a weight file is not the engine's, though it would be loaded, or a file that
            the dialect needs is absent, or one is there that it must not have.
    """
    try:
        names = set(os.listdir(directory))
    except OSError as error:
        raise ArtifactError(f"{directory} cannot be listed ({error.strerror})") from error
    for name in sorted(names):
        if name.endswith(_WEIGHT_ENDINGS) and name not in engine.tensor_files:
            raise ArtifactError(
                f"{directory / name} is no file of this engine, but TensorRT-LLM loads every "
                "weight file that it finds, and a tensor that is in two files from either; "
                "remove it"
            )
    for name in engine.tensor_files:
        if not _SHARDS.fullmatch(name):
            raise ArtifactError(
                f"{directory / ENGINE_FILE} lists the tensor file {untrusted.show_name(name)}, "
                "which IntServe does not write; build again"
            )
    has = {HF_QUANT_CONFIG_FILE: fields.dialect != "released"}
    has[QUANT_CFG_FILE] = fields.dialect == "mixed"
    for name, needed in has.items():
        if needed and name not in names:
            raise ArtifactError(
                f"{directory} has no {name}, without which TensorRT-LLM {fields.engine_version} "
                f"does not know how the dialect {fields.dialect} is stored; build again"
            )
        if not needed and name in names:
            raise ArtifactError(
                f"{directory / name} does not belong to the dialect {fields.dialect}, and "
                "TensorRT-LLM would believe it; remove it"
            )


def check_config(
    directory: Path, built: BuiltEngine, engine: EngineManifest, fields: TrtllmFields
) -> dict[str, Scheme]:
    """Check config.json and the quantization files against engine.json; how the directory stores
    every linear.

    Raises:
        ArtifactError, DeployError: they disagree, or config.json says what it must not.
    """
    path = directory / "config.json"
    raw = document_object(directory, built.documents, "config.json")
    native = raw.get("quantization_config")
    if native is not None and fields.dialect != "released":
        raise ArtifactError(
            f"{path} still has quantization_config beside {HF_QUANT_CONFIG_FILE}, which versions "
            "of TensorRT-LLM weigh differently; remove it and build again"
        )
    if native is None and fields.dialect == "released" and built.config.weight_block_size:
        raise ArtifactError(f"{path} has no quantization_config; build again")
    if "auto_map" in raw:
        raise ArtifactError(f"{path} has auto_map, which names code to run; build again")
    config = ModelConfig.from_dict(raw)
    kept = config.num_nextn_predict_layers > 0
    if kept != (fields.mtp == "kept"):
        raise ArtifactError(
            f"{path} has num_nextn_predict_layers {config.num_nextn_predict_layers}, but "
            f"{ENGINE_FILE} says that the MTP layers are {fields.mtp}; build again"
        )
    if built.kv_cache not in KV_ALGOS:
        raise DeployError(
            f"{directory / ENGINE_FILE} asks for a KV cache in {built.kv_cache}, which "
            f"TensorRT-LLM has not for MLA on Hopper; build with {' or '.join(KV_ALGOS)}"
        )
    quant = read_quant_config(directory, fields.engine_version)
    if fields.dialect != "released" and quant.kv_algo != KV_ALGOS[built.kv_cache]:
        raise ArtifactError(
            f"{directory / HF_QUANT_CONFIG_FILE} has kv_cache_quant_algo {quant.kv_algo}, but the "
            f"engine was built for a KV cache in {built.kv_cache}; build again"
        )
    _check_quant_files(directory, quant, fields)
    return _stored_schemes(directory, built, config, engine, fields)


def check_same_config(directory: Path, built: BuiltEngine, artifact: ArtifactReader) -> None:
    """Check that config.json is the artifact's but for what a build changes in it.

    Raises:
        ArtifactError: another key differs; the sentence names it.
    """
    changed = ("quantization_config", "auto_map", "num_nextn_predict_layers")
    own = document_object(directory, built.documents, "config.json")
    whole = document_object(artifact.directory, artifact.documents, "config.json")
    for key in sorted((own.keys() | whole.keys()) - set(changed)):
        if own.get(key) != whole.get(key):
            raise ArtifactError(
                f"{directory / 'config.json'} has {untrusted.show_name(key)} "
                f"{untrusted.show(own.get(key))}, where {artifact.directory} has "
                f"{untrusted.show(whole.get(key))}; build again"
            )


def check_args(
    directory: Path,
    built: BuiltEngine,
    config: ModelConfig,
    engine: EngineManifest,
    stored: Mapping[str, Scheme],
    fields: TrtllmFields,
) -> tuple[str, ...]:
    """Check llm_args.yaml against the engine, and for what is known to hang, crash or answer
    wrongly; what it is only warned of.

    Raises:
        ArtifactError: it is absent.
        DeployError: it is not what this version takes, or the linter refuses it.
    """
    path = directory / LLM_ARGS_FILE
    if LLM_ARGS_FILE not in built.documents:
        raise ArtifactError(f"{directory} has no {LLM_ARGS_FILE}; build again")
    args = llm_args_of(built.documents[LLM_ARGS_FILE], fields.engine_version, where=str(path))
    formats: set[ExpertFormat] = set()
    for module, scheme in stored.items():
        if expert_of(module) is not None:
            formats |= {weights for weights in EXPERT_FORMATS if weights == scheme.weights}
    found = lint(
        args,
        fields.engine_version,
        dialect=fields.dialect,
        config=config,
        kv_cache=engine.kv_cache,
        experts=formats,
        ranks=engine.ranks,
    )
    for finding in found:
        if finding.severity == "refuse":
            raise DeployError(f"{path}: {finding.sentence}")
    return tuple(finding.sentence for finding in found)


def check_headers(
    checkpoint: Checkpoint, config: ModelConfig, stored: Mapping[str, Scheme], *, mtp: bool
) -> None:
    """Check types, shapes and files of all tensors against what was to be built, and the index.

    TensorRT-LLM converts many types and never reads the index; other tools do.

    Raises:
        ArtifactError: a tensor is missing, of another type or shape, or in another file.
    """
    directory = checkpoint.directory
    index = _index(directory)
    for key in checkpoint:
        if index is not None and index.get(key) != checkpoint.file(key).name:
            raise ArtifactError(
                f"{directory / INDEX_FILE} does not place {key} in {checkpoint.file(key).name}; "
                "build again"
            )
    if index is not None and (extra := sorted(index.keys() - set(checkpoint))):
        raise ArtifactError(
            f"{directory / INDEX_FILE} lists {untrusted.show_name(extra[0])}, which no file holds; "
            "build again"
        )
    for layer in stored_layers(config, mtp=mtp):
        for key, tensor in stored_tensors(config, stored, layer).items():
            if key not in checkpoint:
                raise ArtifactError(f"{directory} lacks the tensor {key}; build again")
            entry, path = checkpoint.entry(key), checkpoint.file(key)
            if path.name != layer_file(layer):
                raise ArtifactError(f"{path} holds {key}, which belongs into {layer_file(layer)}")
            dtype = DTYPE_NAMES[entry.dtype]
            if tensor.spec.kind == "linear" and dtype != tensor.dtype:
                raise ArtifactError(
                    f"tensor {key} in {path} is {dtype}, not {tensor.dtype}; build again"
                )
            if entry.shape != tensor.shape:
                raise ArtifactError(
                    f"tensor {key} in {path} has the shape {list(entry.shape)}, not "
                    f"{list(tensor.shape)}; build again"
                )


def _check_quant_files(directory: Path, quant: QuantConfig, fields: TrtllmFields) -> None:
    """Check what is of no effect in one version of the loader and of some in another.

    Raises:
        ArtifactError: the two lists of modules differ, or the single algorithm has another group
            size or reaches embedding and head.
    """
    path = directory / HF_QUANT_CONFIG_FILE
    if fields.dialect == "mixed":
        inline = _object(path)["quantization"].get("quantized_layers")
        listed = _object(directory / QUANT_CFG_FILE).get("quantized_layers")
        if not isinstance(inline, dict) or not isinstance(listed, dict):
            raise ArtifactError(f"{directory}: {path.name} or {QUANT_CFG_FILE} lists no modules")
        if inline != listed:
            differing = sorted(inline.keys() ^ listed.keys())
            differing += [name for name in inline if inline[name] != listed.get(name)]
            raise ArtifactError(
                f"{path} and {QUANT_CFG_FILE} do not list the same for "
                f"{untrusted.show_name(differing[0])}, and versions of TensorRT-LLM read one "
                "or the other; build again"
            )
    elif fields.dialect == "single":
        if quant.default.algo == "W4A8_AWQ" and quant.default.group_size != TILE:
            raise ArtifactError(
                f"{path} has group_size {quant.default.group_size} for W4A8_AWQ, not {TILE}; build "
                "again"
            )
        for name in ("lm_head", "model.embed_tokens"):
            if not quant.excludes(name):
                raise ArtifactError(
                    f"{path} does not exclude {name}, which is stored in BF16; build again"
                )


def _object(path: Path) -> dict[str, Any]:
    try:
        return untrusted.read_json_object(path, root=path.parent)
    except untrusted.UnusableFileError as error:
        raise ArtifactError(f"{path} {error}; build again") from error


def _stored_schemes(
    directory: Path,
    built: BuiltEngine,
    config: ModelConfig,
    engine: EngineManifest,
    fields: TrtllmFields,
) -> dict[str, Scheme]:
    """How the directory stores every linear, by its dialect.

    Raises:
        ArtifactError: engine.json does not have the schemes of the artifact's recipe.
    """
    mtp = fields.mtp == "kept"
    modules = {
        spec.module
        for layer in stored_layers(config, mtp=mtp)
        if layer != "globals"
        for spec in linears(config, layer)
    }
    path = directory / ENGINE_FILE
    if different := sorted(modules ^ engine.schemes.keys()):
        state = "lacks" if different[0] in modules else "has the unknown"
        raise ArtifactError(
            f"{path} {state} linear {untrusted.show_name(different[0])} for the model of "
            "config.json; build again"
        )
    if built.manifest is not None:
        recipe: Mapping[str, Scheme] = built.manifest.recipe.resolve(built.config)
        for module, scheme in engine.schemes.items():
            if recipe[module].weights != scheme.weights:
                raise ArtifactError(
                    f"{path} has {module} in {scheme.weights}, the recipe of {MANIFEST_FILE} in "
                    f"{recipe[module].weights}; build again"
                )
    schemes = stored_schemes(config, engine.schemes, fields.dialect, mtp=mtp)
    for module, scheme in schemes.items():
        group = scheme.group_size or 128
        if scheme.weights not in ("int4", "int8", "fp8-block", "bf16") or group != 128:
            raise DeployError(
                f"{path} has {module} in {scheme.label}, which TensorRT-LLM cannot load; build "
                "again"
            )
    return schemes


def _index(directory: Path) -> dict[str, str] | None:
    path = directory / INDEX_FILE
    if not path.exists():
        return None
    weight_map = _object(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ArtifactError(f"{path} has no weight_map; build again")
    return weight_map
