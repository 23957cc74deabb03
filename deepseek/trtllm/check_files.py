"""The documents of an engine directory for TensorRT-LLM, checked without tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import get_args

from deepseek import untrusted
from deepseek.artifact.built_engine import BuiltEngine
from deepseek.artifact.documents import document_object
from deepseek.artifact.engine_checks import (
    check_listing,
    check_mtp,
    check_schemes,
    read_document,
    read_target_manifest,
)
from deepseek.artifact.engine_manifest import ENGINE_FILE, EngineManifest
from deepseek.config import ModelConfig
from deepseek.errors import ArtifactError, DeployError
from deepseek.inventory import expert_of
from deepseek.recipe import Scheme
from deepseek.trtllm.fields import TARGET, TrtllmFields
from deepseek.trtllm.findings import ExpertFormat
from deepseek.trtllm.layout import TILE, stored_schemes
from deepseek.trtllm.lint import lint
from deepseek.trtllm.llm_args import LLM_ARGS_FILE, llm_args_of
from deepseek.trtllm.loader_config import QuantConfig, read_quant_config
from deepseek.trtllm.quant_config import HF_QUANT_CONFIG_FILE, KV_ALGOS, QUANT_CFG_FILE

LOADER = "TensorRT-LLM"
EXPERT_FORMATS: tuple[ExpertFormat, ...] = get_args(ExpertFormat)


def read_trtllm_manifest(directory: Path) -> tuple[EngineManifest, TrtllmFields]:
    """engine.json, and what it says for this target.

    Raises:
        ArtifactError: absent, edited, or not of this target.
    """
    return read_target_manifest(directory, TARGET, LOADER, TrtllmFields)


def check_names(directory: Path, engine: EngineManifest, fields: TrtllmFields) -> None:
    """Check which weight files and quantization files lie in the directory, before any is read.

    Raises:
        ArtifactError: a weight file is not the engine's, though it would be loaded, or a file that
            the dialect needs is absent, or one is there that it must not have.
    """
    names = check_listing(directory, engine, LOADER)
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
    check_mtp(directory, config, fields.mtp)
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


def _check_quant_files(directory: Path, quant: QuantConfig, fields: TrtllmFields) -> None:
    """Check what is of no effect in one version of the loader and of some in another.

    Raises:
        ArtifactError: the two lists of modules differ, or the single algorithm has another group
            size or reaches embedding and head.
    """
    path = directory / HF_QUANT_CONFIG_FILE
    if fields.dialect == "mixed":
        inline = read_document(path)["quantization"].get("quantized_layers")
        listed = read_document(directory / QUANT_CFG_FILE).get("quantized_layers")
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
    check_schemes(directory, built, config, engine, mtp=mtp)
    schemes = stored_schemes(config, engine.schemes, fields.dialect, mtp=mtp)
    for module, scheme in schemes.items():
        group = scheme.group_size or 128
        if scheme.weights not in ("int4", "int8", "fp8-block", "bf16") or group != 128:
            raise DeployError(
                f"{directory / ENGINE_FILE} has {module} in {scheme.label}, which TensorRT-LLM "
                "cannot load; build again"
            )
    return schemes
