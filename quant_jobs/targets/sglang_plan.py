"""What an SGLang engine is to be, decided before a byte is written: dialect, input scales, MTP
layers, arguments, and every document beside the tensors. `sglang.py` builds it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from deepseek import __version__
from deepseek.artifact.documents import document_object, read_copied
from deepseek.artifact.engine_manifest import EngineManifest, EnginePlan, RankLayout
from deepseek.artifact.layout import stored_layers
from deepseek.artifact.manifest import MANIFEST_FILE, LayerKey
from deepseek.artifact.reader import ArtifactReader
from deepseek.artifact.tensors import layer_file
from deepseek.config import CONFIG_FILE
from deepseek.engine.packing import Source, schemes_of
from deepseek.errors import DeployError
from deepseek.files import json_bytes
from deepseek.recipe import Scheme
from deepseek.sglang.fields import TARGET, Mtp, SglangFields
from deepseek.sglang.launch import KV_DTYPES, LAUNCH_FILE, Launch, launch_yaml
from deepseek.sglang.layout import (
    Dialect,
    fitting_dialect,
    rank_weight_bytes,
    stored_schemes,
    stored_tensors,
    total_bytes,
)
from deepseek.sglang.loadable import check_loadable
from deepseek.sglang.quant_config import sglang_quantization_config
from deepseek.sglang.versions import EngineVersion
from deepseek.source.index import INDEX_FILE
from quant_jobs.targets.expert_scales import expert_input_scales, outlier_warnings
from quant_jobs.targets.layered import LayeredBuild
from quant_jobs.targets.origin import manifest_bytes, origin_of


@dataclass(frozen=True, slots=True)
class SglangOptions:
    """What a user chooses. `dialect` None is the one that fits; an unquantized source has no
    choice. `kv_cache` is of those that SGLang has (`kv_format`), `generation` the GPUs'; `keep_mtp`
    keeps the MTP layers."""

    ranks: RankLayout
    kv_cache: str
    dialect: Dialect | None = None
    engine_version: EngineVersion = "0.5.23"
    keep_mtp: bool = False
    generation: str = "sm90"


@dataclass(frozen=True, slots=True, kw_only=True)
class SglangBuild(LayeredBuild):
    """One engine to be built. `stored` is how the directory stores every linear."""

    options: SglangOptions
    dialect: Dialect
    stored: Mapping[str, Scheme]


def plan_build(
    source: Source,
    options: SglangOptions,
    make_launch: Callable[[Mapping[str, Scheme], Dialect], Launch],
) -> SglangBuild:
    """Decide everything about the engine: dialect, scales, documents, bytes of each rank.

    `make_launch` makes the arguments of SGLang's server from the schemes of the linears as the
    directory stores them, and the dialect.

    Raises:
        ArtifactError: the checkpoint is damaged, or has no maxima of its experts' inputs.
        DeployError: the target cannot load it; the sentence says what to change.
    """
    config, ranks = source.config, options.ranks
    mtp = options.keep_mtp and config.num_nextn_predict_layers > 0
    everything = schemes_of(source)
    dialect = choose_dialect(source, options.dialect)
    check_loadable(
        config, everything, dialect, ranks, mtp=options.keep_mtp, generation=options.generation
    )
    stored = stored_schemes(config, everything, dialect, mtp=mtp)
    fields = SglangFields(
        dialect=dialect,
        engine_version=options.engine_version,
        mtp=_mtp(source, kept=mtp),
        input_scales=expert_input_scales(source, stored, "SGLang") if dialect == "w4afp8" else {},
    )
    layers = tuple(stored_layers(config, mtp=mtp))
    documents = _documents(source, stored, layers, dialect, mtp=mtp)
    documents[LAUNCH_FILE] = launch_yaml(make_launch(stored, dialect), options.engine_version)
    manifest = EngineManifest(
        **origin_of(source),
        target=TARGET,
        ranks=ranks,
        kv_cache=options.kv_cache,  # type: ignore[arg-type]  # `kv_format` has admitted it
        schemes={module: everything[module] for module in stored},
        versions={"intserve": __version__, "sglang": options.engine_version},
        plan=EnginePlan(
            rank_weight_bytes=rank_weight_bytes(config, stored, ranks, dialect, mtp=mtp)
        ),
        files={name: hashlib.sha256(documents[name]).hexdigest() for name in sorted(documents)},
        tensor_files={},
        target_fields=fields.model_dump(mode="json"),
    )
    return SglangBuild(
        source=source,
        options=options,
        dialect=dialect,
        stored=stored,
        layers=layers,
        documents=documents,
        manifest=manifest,
        warnings=outlier_warnings(source) if fields.input_scales else (),
    )


# --- choices ---


def choose_dialect(source: Source, asked: Dialect | None) -> Dialect:
    """The dialect of the engine: the one asked for, else the one that fits the source.

    Raises:
        DeployError: one is asked of an unquantized source, which stays as released.
    """
    if isinstance(source, ArtifactReader):
        return asked or fitting_dialect(source.schemes)
    if asked is not None:
        raise DeployError(
            f"--dialect says how a quantized checkpoint is stored, and {source.directory} is a "
            "source, which stays as released; leave it out"
        )
    return "released"


def kv_format(source: Source, asked: str | None) -> str:
    """The KV format of the engine: the one asked for, else the recipe's.

    Raises:
        DeployError: it is none that the target has.
    """
    recipe = source.recipe.kv_cache if isinstance(source, ArtifactReader) else "bf16"
    chosen = asked or recipe
    if chosen not in KV_DTYPES:
        raise DeployError(
            f"SGLang has no {chosen} KV cache for this model; give --kv-cache fp8 or bf16"
        )
    return chosen


def _mtp(source: Source, *, kept: bool) -> Mtp:
    if not source.config.num_nextn_predict_layers:
        return "absent"
    return "kept" if kept else "left out"


# --- documents ---


def _documents(
    source: Source,
    stored: Mapping[str, Scheme],
    layers: Sequence[LayerKey],
    dialect: Dialect,
    *,
    mtp: bool,
) -> dict[str, bytes]:
    """Every file beside the tensors but sglang.yaml and engine.json, by name."""
    if isinstance(source, ArtifactReader):
        documents = dict(source.documents)
        content = document_object(source.directory, documents, CONFIG_FILE)
        content.pop("quantization_config", None)
        method = sglang_quantization_config(source.config, stored, dialect)
        if method is not None:
            content["quantization_config"] = method
        documents[MANIFEST_FILE] = manifest_bytes(source)
    else:
        documents, content = dict(read_copied(source.directory)), dict(source.config_content)
        content.pop("auto_map", None)
    if not mtp and content.get("num_nextn_predict_layers"):
        content["num_nextn_predict_layers"] = 0
    documents[CONFIG_FILE] = json_bytes(content)
    weight_map = {
        name: layer_file(layer)
        for layer in layers
        for name in stored_tensors(source.config, stored, layer, dialect)
    }
    total = total_bytes(source.config, stored, dialect, mtp=mtp)
    documents[INDEX_FILE] = json_bytes(
        {"metadata": {"total_size": total}, "weight_map": weight_map}
    )
    return documents
