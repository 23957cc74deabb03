"""`target_fields` of engine.json for target transformers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from deepseek.hf.layout import Method
from deepseek.hf.versions import EngineVersion

TARGET = "transformers"


class HfFields(BaseModel):
    """The whole of `target_fields`. `mtp` says what became of the MTP layers: the model has none,
    or they were left out, because `from_pretrained` does not read them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    engine_version: EngineVersion
    method: Method
    mtp: Literal["absent", "left out"]
