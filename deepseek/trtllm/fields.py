"""`target_fields` of engine.json for target trtllm: what was chosen when the engine was built.

The common part of engine.json (`deepseek/artifact/engine_manifest.py`) has ranks, digests, recipe
and KV format. `input_scales` are the static scales that the directory's INT4 experts have, by MoE
layer.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from deepseek.artifact.input_scales import LayerInputScales
from deepseek.trtllm.layout import Dialect
from deepseek.trtllm.versions import EngineVersion

__all__ = ["TARGET", "LayerInputScales", "Mtp", "TrtllmFields"]

TARGET = "trtllm"
#: What became of the MTP layers: the model has none, they were left out, or they are there.
Mtp = Literal["absent", "left out", "kept"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TrtllmFields(_Record):
    """The whole of `target_fields`."""

    dialect: Dialect
    engine_version: EngineVersion
    mtp: Mtp
    input_scales: dict[int, LayerInputScales] = {}
