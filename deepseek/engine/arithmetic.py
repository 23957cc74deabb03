"""The arithmetic in which the engine executes a model: its own, or an emulation of a target's.

The embedded engine computes in FP32 between its kernels. A GPU runtime does not: its tensors are
BF16, its FP8 linears quantize their inputs on the fly, its W4A8 experts multiply by a rounded
reciprocal. `Arithmetic` states these differences as data; model.py, attention.py and moe.py round
where a kernel of the target would store, and `make_linear` chooses the kernel.

This file imports no torch: whoever only names an arithmetic needs none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """How a target computes.

    `activations` is what every tensor between two kernels is rounded to: embedding, residual
    stream, norms, outputs of linears, rotary key and query, attention's output, SwiGLU's output,
    the experts' sum. `block_inputs` is "fp8" where a linear in FP8 tiles quantizes its input on
    the fly, per token and 128 channels.
    """

    name: str
    activations: Literal["float32", "bfloat16"]
    block_inputs: Literal["none", "fp8"]


EMBEDDED = Arithmetic(name="embedded", activations="float32", block_inputs="none")

_ALL = (
    EMBEDDED,
    Arithmetic(name="trtllm", activations="bfloat16", block_inputs="fp8"),
    Arithmetic(name="vllm", activations="bfloat16", block_inputs="fp8"),
    Arithmetic(name="sglang", activations="bfloat16", block_inputs="fp8"),
    Arithmetic(name="transformers", activations="bfloat16", block_inputs="none"),
)
#: By name of the target.
ARITHMETICS: Mapping[str, Arithmetic] = MappingProxyType({a.name: a for a in _ALL})
