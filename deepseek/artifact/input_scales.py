"""Static FP8 input scales of INT4 experts in an engine directory, whatever its target.

All experts of a layer share one scale for gate and up, and one for down: TensorRT-LLM and SGLang
take the largest of a layer for all of them. Both round it to BF16 somewhere; a power of two is its
own BF16 and so is its inverse, so that every target computes with the very value that is stored
(`deepseek/trtllm/input_scales.py` has the arithmetic of TensorRT-LLM's kernel, and what a scale
that is up to twice too large costs). In SGLang (`FusedMoE._weight_loader_impl`) another value would
moreover be refused: it rounds the scale of gate to BF16, then wants that of up within 1e-5 of it.
"""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict, Field

#: Smallest scale: below it the inverse would not be finite in BF16 times the largest input.
_MIN_EXPONENT = -126


class LayerInputScales(BaseModel):
    """Static input scales of one layer's experts, shared by all of them: of gate and up, and of
    down. `needed_*` are amax / 448 of the calibrated inputs, which the scales are at least."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    gate_up: float = Field(gt=0)
    down: float = Field(gt=0)
    needed_gate_up: float = Field(gt=0)
    needed_down: float = Field(gt=0)


def runtime_input_scale(needed: float) -> float:
    """The smallest power of two that is at least `needed`, which is amax / 448: float32-exact.

    `needed` must be positive and finite.
    """
    assert 0 < needed < math.inf, needed
    fraction, exponent = math.frexp(needed)  # fraction * 2^exponent, fraction in [0.5, 1)
    return math.ldexp(1.0, max(exponent - 1 if fraction == 0.5 else exponent, _MIN_EXPONENT))
