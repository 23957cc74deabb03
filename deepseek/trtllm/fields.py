"""`target_fields` of engine.json for target trtllm: what was chosen when the engine was built.

The common part of engine.json (`deepseek/artifact/engine_manifest.py`) has ranks, digests, recipe
and KV format. `input_scales` are the static scales that the directory's INT4 experts have, by MoE
layer.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from deepseek.trtllm.layout import Dialect
from deepseek.trtllm.versions import EngineVersion

TARGET = "trtllm"
#: What became of the MTP layers: the model has none, they were left out, or they are there.
Mtp = Literal["absent", "left out", "kept"]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LayerInputScales(_Record):
    """Static input scales of one layer's experts, shared by all of them: of gate and up, and of
    down. `needed_*` are amax / 448 of the calibrated inputs, which the scales are at least."""

    gate_up: float = Field(gt=0)
    down: float = Field(gt=0)
    needed_gate_up: float = Field(gt=0)
    needed_down: float = Field(gt=0)


class TrtllmFields(_Record):
    """The whole of `target_fields`."""

    dialect: Dialect
    engine_version: EngineVersion
    mtp: Mtp
    input_scales: dict[int, LayerInputScales] = {}
