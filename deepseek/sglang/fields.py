"""`target_fields` of engine.json for target sglang: what was chosen when the engine was built.

`input_scales` are the static scales that the directory's INT4 experts have, by MoE layer.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from deepseek.artifact.input_scales import LayerInputScales
from deepseek.sglang.layout import Dialect
from deepseek.sglang.versions import EngineVersion

TARGET = "sglang"
#: The name for people.
LOADER = "SGLang"
#: What became of the MTP layers: the model has none, they were left out, or they are there.
Mtp = Literal["absent", "left out", "kept"]


class SglangFields(BaseModel):
    """The whole of `target_fields`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    dialect: Dialect
    engine_version: EngineVersion
    mtp: Mtp
    input_scales: dict[int, LayerInputScales] = {}
