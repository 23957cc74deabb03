"""What a transformers directory is to be, decided before a byte is written: the form of every
linear, config.json, and every document beside the tensors. `transformers.py` builds it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from deepseek import __version__
from deepseek.artifact.documents import document_object, read_copied
from deepseek.artifact.engine_manifest import EngineManifest, EnginePlan, RankLayout
from deepseek.artifact.layout import stored_layers
from deepseek.artifact.manifest import MANIFEST_FILE
from deepseek.artifact.reader import ArtifactReader
from deepseek.artifact.tensors import layer_file
from deepseek.config import CONFIG_FILE, ModelConfig
from deepseek.engine.packing import Source, schemes_of
from deepseek.files import json_bytes
from deepseek.hf.fields import TARGET, HfFields
from deepseek.hf.launch import LAUNCH_FILE, launch_bytes
from deepseek.hf.layout import Stored, choose, stored_tensors, total_bytes
from deepseek.hf.loadable import check_loadable, notes
from deepseek.hf.quant_config import quantization_config
from deepseek.hf.versions import EngineVersion
from deepseek.recipe import Scheme
from deepseek.source.index import INDEX_FILE
from quant_jobs.targets.layered import LayeredBuild
from quant_jobs.targets.origin import manifest_bytes, origin_of


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformersBuild(LayeredBuild):
    """One directory to be built. `schemes` are the checkpoint's, of the layers that it has."""

    schemes: Mapping[str, Scheme]
    stored: Stored


def plan_build(source: Source, kv_cache: str, version: EngineVersion) -> TransformersBuild:
    """Decide everything about the directory.

    Raises:
        ArtifactError, CheckpointError: the checkpoint is damaged.
        DeployError: transformers cannot load it; the sentence says what to change.
    """
    check_loadable(source.config, kv_cache)
    everything = schemes_of(source)
    config = replace(source.config, num_nextn_predict_layers=0)
    stored = choose(config, everything)
    schemes = {module: everything[module] for module in stored.forms}
    fields = HfFields(
        engine_version=version,
        method=stored.method,
        mtp="left out" if source.config.num_nextn_predict_layers else "absent",
    )
    documents = _documents(source, config, stored)
    manifest = EngineManifest(
        **origin_of(source),
        target=TARGET,
        ranks=RankLayout(tp=1, ep=1),
        kv_cache="bf16",
        schemes=schemes,
        versions={"intserve": __version__, "transformers": version},
        plan=EnginePlan(rank_weight_bytes=(total_bytes(config, stored),)),
        files={name: hashlib.sha256(data).hexdigest() for name, data in sorted(documents.items())},
        tensor_files={},
        target_fields=fields.model_dump(mode="json"),
    )
    return TransformersBuild(
        source=source,
        layers=tuple(stored_layers(config, mtp=False)),
        documents=documents,
        manifest=manifest,
        warnings=notes(config, schemes, stored),
        schemes=schemes,
        stored=stored,
    )


def _documents(source: Source, config: ModelConfig, stored: Stored) -> dict[str, bytes]:
    """Every file beside the tensors but engine.json, by name."""
    content: dict[str, Any]
    if isinstance(source, ArtifactReader):
        documents = dict(source.documents)
        content = document_object(source.directory, documents, CONFIG_FILE)
        documents[MANIFEST_FILE] = manifest_bytes(source)
    else:
        documents, content = dict(read_copied(source.directory)), source.config_content
    content.pop("auto_map", None)
    content.pop("quantization_config", None)
    # transformers knows Kimi-K2, whose structure is DeepSeek-V3's, under this name only.
    content |= {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
    content["num_nextn_predict_layers"] = 0
    if (quantization := quantization_config(config, stored)) is not None:
        content["quantization_config"] = quantization
    documents[CONFIG_FILE] = json_bytes(content)
    documents[LAUNCH_FILE] = launch_bytes()
    weight_map = {
        name: layer_file(layer)
        for layer in stored_layers(config, mtp=False)
        for name in stored_tensors(config, stored, layer)
    }
    total = {"total_size": total_bytes(config, stored)}
    documents[INDEX_FILE] = json_bytes({"metadata": total, "weight_map": weight_map})
    return documents
