"""Bytes by group of tensors: in BF16, as the source and as the artifact store them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from deepseek.artifact.built_engine import BuiltEngine
from deepseek.config import ModelConfig
from deepseek.engine.packed_layout import source_schemes
from deepseek.errors import ArtifactError
from deepseek.formats import stored_bytes
from deepseek.inventory import Group, tensors
from deepseek.limits import LARGEST
from deepseek.recipe import Scheme
from deepseek.source.checkpoint import scale_name
from quant_jobs.evaluation.record import GroupBytes


def group_sizes(
    config: ModelConfig, source_bytes: Mapping[str, int], schemes: Mapping[str, Scheme]
) -> tuple[GroupBytes, ...]:
    """Bytes by group of tensors. `source_bytes` and `schemes` are keyed by tensor and by module. A
    tensor without a scheme (norms, router, embeddings, a head that no rule names) is stored as in
    the source."""
    rows: dict[Group, list[int]] = {}
    for spec in tensors(config):
        source = source_bytes[spec.name] + source_bytes.get(scale_name(spec.name), 0)
        artifact = source
        scheme = schemes.get(spec.module)
        if scheme is not None and scheme.is_quantized:
            artifact = stored_bytes(scheme, spec.shape[0], spec.shape[1])
        row = rows.setdefault(spec.group, [0, 0, 0, 0])
        for column, value in enumerate((spec.numel, 2 * spec.numel, source, artifact)):
            row[column] += value
    return tuple(
        GroupBytes(
            group=group,
            parameters=parameters,
            bf16_bytes=bf16,
            source_bytes=source,
            artifact_bytes=artifact,
        )
        for group, (parameters, bf16, source, artifact) in rows.items()
    )


def source_config(built: BuiltEngine, num_tensors: int) -> ModelConfig:
    """The config of the source that has so many tensors: the engine's own, with the MTP layers that
    the engine may have left out.

    Raises:
        ArtifactError: no number of MTP layers makes up so many.
    """
    own = built.config.num_nextn_predict_layers
    most, _ = LARGEST["num_nextn_predict_layers"]
    for count in range(own, int(most) + 1):
        config = replace(built.config, num_nextn_predict_layers=count)
        found = len(list(tensors(config)))
        if found == num_tensors:
            return config
        if found > num_tensors:
            break
    raise ArtifactError(
        f"the stored reference counts {num_tensors} tensors of its source, which the engine's "
        "model has not with any number of MTP layers; make the reference again"
    )


def artifact_schemes(built: BuiltEngine, config: ModelConfig) -> Mapping[str, Scheme]:
    """The schemes of the quantized checkpoint, or of the source itself, MTP layers included."""
    if built.manifest is None:
        return source_schemes(config)
    return built.manifest.recipe.resolve(config)


def bytes_by_name(config: ModelConfig, tensor_bytes: Tensor) -> Mapping[str, int]:
    """Stored bytes by name of the source's tensors, scales counted with their weights."""
    names = [spec.name for spec in tensors(config)]
    return dict(zip(names, tensor_bytes.tolist(), strict=True))
