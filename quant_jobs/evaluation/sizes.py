"""Bytes by group of tensors: in BF16, as the source and as the artifact store them."""

from __future__ import annotations

from collections.abc import Mapping

from deepseek.config import ModelConfig
from deepseek.formats import stored_bytes
from deepseek.inventory import Group, tensors
from deepseek.recipe import Scheme
from deepseek.source.checkpoint import scale_name
from quant_jobs.evaluation.record import GroupBytes


def group_sizes(
    config: ModelConfig, source_bytes: Mapping[str, int], schemes: Mapping[str, Scheme]
) -> tuple[GroupBytes, ...]:
    """Bytes by group of tensors. `source_bytes` and `schemes` are keyed by tensor and by module. A
    tensor without a scheme (norms, router, embeddings, head) is stored as in the source."""
    rows: dict[Group, list[int]] = {}
    for spec in tensors(config):
        source = source_bytes[spec.name] + source_bytes.get(scale_name(spec.name), 0)
        artifact = source
        if spec.kind == "linear" and schemes[spec.module].is_quantized:
            artifact = stored_bytes(schemes[spec.module], *spec.shape)
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
