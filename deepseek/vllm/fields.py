"""`target_fields` of engine.json for target vllm: what was chosen when the engine was built."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from deepseek.vllm.versions import EngineVersion

TARGET = "vllm"
#: The name for people.
LOADER = "vLLM"
#: How config.json says the formats: a quantized checkpoint's groups, or a release as it is.
Form = Literal["compressed-tensors", "released"]
#: What became of the MTP layers: the model has none, they were left out, or they are there.
Mtp = Literal["absent", "left out", "kept"]


class VllmFields(BaseModel):
    """The whole of `target_fields`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    form: Form
    engine_version: EngineVersion
    mtp: Mtp
