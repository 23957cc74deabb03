"""What a TensorRT-LLM engine is to be, decided before a byte is written: formats, input scales, MTP
layers, arguments, and every document beside the tensors. `trtllm.py` builds it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from deepseek import __version__
from deepseek.artifact.documents import document_object, read_copied
from deepseek.artifact.engine_manifest import (
    EngineManifest,
    EnginePlan,
    RankLayout,
)
from deepseek.artifact.layout import stored_layers
from deepseek.artifact.manifest import MANIFEST_FILE, LayerKey
from deepseek.artifact.reader import ArtifactReader
from deepseek.artifact.tensors import layer_file
from deepseek.config import CONFIG_FILE
from deepseek.engine.packing import Source, schemes_of
from deepseek.errors import DeployError
from deepseek.files import json_bytes
from deepseek.inventory import expert_of
from deepseek.recipe import Scheme
from deepseek.source.index import INDEX_FILE
from deepseek.trtllm.fields import TARGET, Mtp, TrtllmFields
from deepseek.trtllm.layout import (
    Dialect,
    rank_weight_bytes,
    stored_schemes,
    stored_tensors,
    total_bytes,
)
from deepseek.trtllm.lint import lint
from deepseek.trtllm.llm_args import LLM_ARGS_FILE, llm_args_yaml
from deepseek.trtllm.llm_schema import LlmArgs
from deepseek.trtllm.loadable import check_loadable
from deepseek.trtllm.quant_config import quant_config_files
from deepseek.trtllm.versions import EngineVersion
from quant_jobs.targets.expert_scales import expert_input_scales, outlier_warnings
from quant_jobs.targets.layered import LayeredBuild
from quant_jobs.targets.origin import manifest_bytes, origin_of

#: KV formats that the target has.
TrtllmKV = Literal["bf16", "fp8"]


@dataclass(frozen=True, slots=True)
class TrtllmOptions:
    """What a user chooses. `dialect` None is `mixed`; an unquantized source has no choice.
    `keep_mtp` keeps the MTP layers."""

    ranks: RankLayout
    kv_cache: TrtllmKV
    dialect: Literal["mixed", "single"] | None = None
    engine_version: EngineVersion = "1.2.1"
    keep_mtp: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TrtllmBuild(LayeredBuild):
    """One engine to be built.

    `schemes` are the checkpoint's, of the layers that the engine has; `stored` how the directory
    stores them. `warnings` are what the linter says of the arguments.
    """

    options: TrtllmOptions
    dialect: Dialect
    schemes: Mapping[str, Scheme]
    stored: Mapping[str, Scheme]


def plan_build(
    source: Source,
    options: TrtllmOptions,
    make_args: Callable[[Mapping[str, Scheme]], LlmArgs],
) -> TrtllmBuild:
    """Decide everything about the engine: format, scales, documents, bytes of each rank.

    `make_args` makes the arguments of `tensorrt_llm.LLM` from the schemes of the linears as the
    directory stores them.

    Raises:
        ArtifactError: the checkpoint is damaged, or has no maxima of its experts' inputs.
        DeployError: the target cannot load it; the sentence says what to change.
    """
    config, ranks = source.config, options.ranks
    is_quantized = isinstance(source, ArtifactReader)
    dialect: Dialect = "released" if not is_quantized else options.dialect or "mixed"
    mtp = options.keep_mtp and config.num_nextn_predict_layers > 0
    everything = schemes_of(source)
    check_loadable(config, everything, dialect, ranks, mtp=mtp, version=options.engine_version)
    stored = stored_schemes(config, everything, dialect, mtp=mtp)
    fields = TrtllmFields(
        dialect=dialect,
        engine_version=options.engine_version,
        mtp=_mtp(source, kept=mtp),
        input_scales=expert_input_scales(source, stored, "TensorRT-LLM"),
    )
    manifest = EngineManifest(
        **origin_of(source),
        target=TARGET,
        ranks=ranks,
        kv_cache=options.kv_cache,
        schemes={module: everything[module] for module in stored},
        versions={"intserve": __version__, "tensorrt_llm": options.engine_version},
        plan=EnginePlan(
            rank_weight_bytes=(rank_weight_bytes(config, stored, ranks, mtp=mtp),) * ranks.tp
        ),
        files={},
        tensor_files={},
        target_fields=fields.model_dump(mode="json"),
    )
    layers = tuple(stored_layers(config, mtp=mtp))
    documents = _documents(source, stored, dialect, layers, options.kv_cache, mtp=mtp)
    args = make_args(stored)
    warnings = _lint(args, source, stored, dialect, options, mtp=mtp)
    if fields.input_scales:
        warnings = (*outlier_warnings(source), *warnings)
    documents[LLM_ARGS_FILE] = llm_args_yaml(args, options.engine_version)
    digests = {name: hashlib.sha256(documents[name]).hexdigest() for name in sorted(documents)}
    return TrtllmBuild(
        source=source,
        options=options,
        dialect=dialect,
        schemes=everything,
        stored=stored,
        layers=layers,
        documents=documents,
        manifest=manifest.model_copy(update={"files": digests}),
        warnings=warnings,
    )


# --- the choice of formats ---


def kv_format(source: Source, asked: str | None) -> TrtllmKV:
    """The KV format of the engine: the one asked for, else the recipe's.

    Raises:
        DeployError: it is none that the target has.
    """
    recipe = source.recipe.kv_cache if isinstance(source, ArtifactReader) else "bf16"
    chosen = asked or recipe
    match chosen:
        case "bf16":
            return "bf16"
        case "fp8":
            return "fp8"
    raise DeployError(
        f"TensorRT-LLM has no {chosen} KV cache for this model; give --kv-cache fp8 or bf16"
    )


def _lint(
    args: LlmArgs,
    source: Source,
    stored: Mapping[str, Scheme],
    dialect: Dialect,
    options: TrtllmOptions,
    *,
    mtp: bool,
) -> tuple[str, ...]:
    """What the linter warns of.

    Raises:
        DeployError: it refuses the arguments; the sentence is its first finding.
    """
    experts = {stored[module].weights for module in stored if expert_of(module) is not None}
    config = source.config if mtp else replace(source.config, num_nextn_predict_layers=0)
    findings = lint(
        args,
        options.engine_version,
        dialect=dialect,
        config=config,
        kv_cache=options.kv_cache,
        experts=experts,  # type: ignore[arg-type]  # `check_loadable` has admitted the formats
        ranks=options.ranks,
    )
    for finding in findings:
        if finding.severity == "refuse":
            raise DeployError(finding.sentence)
    return tuple(finding.sentence for finding in findings)


def _mtp(source: Source, *, kept: bool) -> Mtp:
    if not source.config.num_nextn_predict_layers:
        return "absent"
    return "kept" if kept else "left out"


# --- documents ---


def _documents(
    source: Source,
    stored: Mapping[str, Scheme],
    dialect: Dialect,
    layers: Sequence[LayerKey],
    kv_cache: TrtllmKV,
    *,
    mtp: bool,
) -> dict[str, bytes]:
    """Every file beside the tensors but llm_args.yaml and engine.json, by name."""
    if isinstance(source, ArtifactReader):
        documents = dict(source.documents)
        content = document_object(source.directory, documents, CONFIG_FILE)
        content.pop("quantization_config", None)
        documents[MANIFEST_FILE] = manifest_bytes(source)
    else:
        documents, content = dict(read_copied(source.directory)), source.config_content
        content.pop("auto_map", None)
    if not mtp and content.get("num_nextn_predict_layers"):
        content["num_nextn_predict_layers"] = 0
    documents[CONFIG_FILE] = json_bytes(content)
    for name, value in quant_config_files(
        source.config, stored, dialect, kv_cache, mtp=mtp
    ).items():
        documents[name] = json_bytes(value)
    documents[INDEX_FILE] = _index(source, stored, layers)
    return documents


def _index(source: Source, stored: Mapping[str, Scheme], layers: Sequence[LayerKey]) -> bytes:
    weight_map = {
        name: layer_file(layer)
        for layer in layers
        for name in stored_tensors(source.config, stored, layer)
    }
    total = total_bytes(
        source.config, stored, mtp=len(layers) - 1 > source.config.num_hidden_layers
    )
    return json_bytes({"metadata": {"total_size": total}, "weight_map": weight_map})
