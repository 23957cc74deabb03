"""`quantization_config` of a vLLM engine's config.json.

A quantized checkpoint's groups are written for the layers that the directory has: those of
compressed-tensors, which vLLM reads as the artifact says them (`deepseek/artifact/
compressed_tensors.py`). A source keeps its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from deepseek.artifact.compressed_tensors import quantization_config
from deepseek.config import ModelConfig
from deepseek.recipe import Scheme


def vllm_quantization_config(
    config: ModelConfig, stored: Mapping[str, Scheme], *, mtp: bool
) -> dict[str, Any] | None:
    """The value of `quantization_config`, None where every linear is BF16. `stored` are the schemes
    of the linears that the directory has."""
    kept = config if mtp else replace(config, num_nextn_predict_layers=0)
    return quantization_config(kept, stored)
