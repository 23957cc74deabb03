"""Static FP8 input scales of INT4 experts, which the loader's own rounding leaves as they are.

The W4A8 kernel multiplies an expert's inputs by `act_scale`, rounds them to e4m3, and multiplies
the product by `alpha`. Both come from the checkpoint's `input_scale` s (`load_quant_scales` of
`WInt4AFP8FusedMoEMethod`), where bf16() rounds to nearest:

    gate, up   act_scale = bf16(1 / s)          alpha = s
    down       act_scale = bf16(1 / bf16(s))    alpha = bf16(s)

Where act_scale times alpha is not 1, every output of the layer's experts is that much too large or
too small: up to 0.39 % for s = amax / 448, the usual choice. A power of two is its own bf16 and so
is its inverse: the product is exactly 1, and the inputs, which are BF16, are not rounded a second
time by the multiplication. e4m3 is a floating-point format, so a scale that is up to twice too
large costs next to nothing: relative error 0.0266 in place of 0.0267 for products of Gaussians, and
0.0269 in place of 0.0260 where the largest value is thousands of times the typical one
(`bench/input_scales.py`).
"""

from __future__ import annotations

import torch

from deepseek.artifact.input_scales import runtime_input_scale

__all__ = ["gain_error", "runtime_input_scale"]


def gain_error(scale: float, *, down: bool) -> float:
    """|act_scale * alpha - 1| as the loader rounds the `input_scale` of gate and up, or of down."""
    stored = torch.tensor(scale, dtype=torch.float32)
    alpha = stored.to(torch.bfloat16).float() if down else stored
    act_scale = (1 / alpha).to(torch.bfloat16).float()
    return abs(act_scale.double() * alpha.double() - 1.0).item()
