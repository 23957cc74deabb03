"""What a vLLM engine is to be, decided before a byte is written: formats, MTP layers, arguments,
and every document beside the tensors. `vllm.py` builds it."""

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
from deepseek.source.index import INDEX_FILE
from deepseek.vllm.fields import TARGET, Mtp, VllmFields
from deepseek.vllm.launch import KV_DTYPES, LAUNCH_FILE, Launch, launch_yaml
from deepseek.vllm.layout import rank_weight_bytes, stored_schemes, stored_tensors, total_bytes
from deepseek.vllm.loadable import check_loadable
from deepseek.vllm.quant_config import vllm_quantization_config
from deepseek.vllm.versions import EngineVersion
from quant_jobs.targets.layered import LayeredBuild
from quant_jobs.targets.origin import manifest_bytes, origin_of


@dataclass(frozen=True, slots=True)
class VllmOptions:
    """What a user chooses. `kv_cache` is of those that vLLM has (`kv_format`), `generation` the
    GPUs'; `keep_mtp` keeps the MTP layers."""

    ranks: RankLayout
    kv_cache: str
    engine_version: EngineVersion = "0.32.0"
    keep_mtp: bool = False
    generation: str = "sm90"


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmBuild(LayeredBuild):
    """One engine to be built. `stored` is how the directory stores every linear; `released` says
    that it is a source as it is."""

    options: VllmOptions
    stored: Mapping[str, Scheme]
    released: bool


def plan_build(
    source: Source,
    options: VllmOptions,
    make_launch: Callable[[Mapping[str, Scheme]], Launch],
) -> VllmBuild:
    """Decide everything about the engine: formats, documents, bytes of each rank.

    `make_launch` makes the arguments of `vllm serve` from the schemes of the linears as the
    directory stores them.

    Raises:
        ArtifactError: the checkpoint is damaged.
        DeployError: the target cannot load it; the sentence says what to change.
    """
    config, ranks = source.config, options.ranks
    released = not isinstance(source, ArtifactReader)
    mtp = options.keep_mtp and config.num_nextn_predict_layers > 0
    everything = schemes_of(source)
    check_loadable(config, everything, ranks, mtp=options.keep_mtp, generation=options.generation)
    stored = stored_schemes(config, everything, mtp=mtp)
    fields = VllmFields(
        form="released" if released else "compressed-tensors",
        engine_version=options.engine_version,
        mtp=_mtp(source, kept=mtp),
    )
    layers = tuple(stored_layers(config, mtp=mtp))
    documents = _documents(source, stored, layers, mtp=mtp)
    has_tiles = any(scheme.weights == "fp8-block" for scheme in stored.values())
    documents[LAUNCH_FILE] = launch_yaml(
        make_launch(stored), options.engine_version, has_tiles=has_tiles
    )
    manifest = EngineManifest(
        **origin_of(source),
        target=TARGET,
        ranks=ranks,
        kv_cache=options.kv_cache,  # type: ignore[arg-type]  # `kv_format` has admitted it
        schemes=stored,
        versions={"intserve": __version__, "vllm": options.engine_version},
        plan=EnginePlan(rank_weight_bytes=rank_weight_bytes(config, stored, ranks, mtp=mtp)),
        files={name: hashlib.sha256(documents[name]).hexdigest() for name in sorted(documents)},
        tensor_files={},
        target_fields=fields.model_dump(mode="json"),
    )
    return VllmBuild(
        source=source,
        options=options,
        stored=stored,
        released=released,
        layers=layers,
        documents=documents,
        manifest=manifest,
    )


def kv_format(source: Source, asked: str | None) -> str:
    """The KV format of the engine: the one asked for, else the recipe's.

    Raises:
        DeployError: it is none that the target has.
    """
    recipe = source.recipe.kv_cache if isinstance(source, ArtifactReader) else "bf16"
    chosen = asked or recipe
    if chosen not in KV_DTYPES:
        raise DeployError(
            f"vLLM has no {chosen} KV cache for this model; give --kv-cache fp8 or bf16"
        )
    return chosen


def _mtp(source: Source, *, kept: bool) -> Mtp:
    if not source.config.num_nextn_predict_layers:
        return "absent"
    return "kept" if kept else "left out"


def _documents(
    source: Source, stored: Mapping[str, Scheme], layers: Sequence[LayerKey], *, mtp: bool
) -> dict[str, bytes]:
    """Every file beside the tensors but vllm.yaml and engine.json, by name."""
    released = not isinstance(source, ArtifactReader)
    if isinstance(source, ArtifactReader):
        documents = dict(source.documents)
        content = document_object(source.directory, documents, CONFIG_FILE)
        content.pop("quantization_config", None)
        if (groups := vllm_quantization_config(source.config, stored, mtp=mtp)) is not None:
            content["quantization_config"] = groups
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
        for name in stored_tensors(source.config, stored, layer, released=released)
    }
    total = total_bytes(source.config, stored, mtp=mtp)
    documents[INDEX_FILE] = json_bytes(
        {"metadata": {"total_size": total}, "weight_map": weight_map}
    )
    return documents
