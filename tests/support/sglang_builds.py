"""Engines of target sglang from artifacts that are made without calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quant_jobs.build import run_build
from quant_jobs.build_options import BuildOptions, BuildResult

#: Recipe -> the dialect that fits it.
FITTING = {
    "w4a8": "w4afp8",
    "int8": "w8a8_int8",
    "int8-block": "blockwise_int8",
    "int4": "compressed-tensors",
    "int4-all": "compressed-tensors",
    "int8-weight-only": "compressed-tensors",
    "int8-experts": "compressed-tensors",
}


def build_sglang(checkpoint: Path, output: Path, **options: Any) -> BuildResult:
    """Build for SGLang, on four ranks with two groups of experts unless `options` say otherwise."""
    return run_build(checkpoint, "sglang", output, BuildOptions(**{"tp": 4, "ep": 2, **options}))
