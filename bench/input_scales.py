"""Gain error and quantization error of static FP8 input scales: amax / 448, and what `build` makes.

    python bench/input_scales.py

For each distribution and size, the relative error of a BF16 input that the W4A8 kernel multiplies
by `act_scale`, rounds to e4m3 and multiplies by `alpha`, as TensorRT-LLM's loader makes both of
the checkpoint's scale. "five" is the best of the next five BF16 values. Medians over sizes.
"""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

from deepseek.formats import FP8_MAX
from deepseek.trtllm.input_scales import gain_error, runtime_input_scale

NUM_VALUES = 1 << 20
SIZES = tuple(2 ** (step / 16) for step in range(16))  # one binade, in which the law repeats


def main() -> None:
    """Print one row per distribution and input."""
    torch.manual_seed(0)
    print("| inputs | input of | scale | gain error, median | worst | relative error of x |")
    print("|---|---|---|---:|---:|---:|")
    for name, values in distributions().items():
        for down in (False, True):
            for kind in ("amax / 448", "five", "power of two"):
                gains, errors = [], []
                for size in SIZES:
                    x = (values * size).to(torch.bfloat16)
                    scale = choose(kind, float(x.abs().max()) / FP8_MAX, down=down)
                    gains.append(gain_error(scale, down=down))
                    errors.append(relative_error(x, scale, down=down))
                print(
                    f"| {name} | {'down' if down else 'gate, up'} | {kind} "
                    f"| {statistics.median(gains):.2e} | {max(gains):.2e} "
                    f"| {statistics.median(errors):.5f} |"
                )


def distributions() -> dict[str, Tensor]:
    """Heavy-tailed inputs, like those of experts; f32 [n]."""
    normal = torch.randn(6, NUM_VALUES)
    return {
        "product of three Gaussians": normal[0] * normal[1] * normal[2],
        "silu(a) b": torch.nn.functional.silu(normal[3]) * normal[4],
        "log-normal magnitudes": normal[5] * torch.exp(1.5 * normal[0]),
    }


def choose(kind: str, needed: float, *, down: bool) -> float:
    """The scale that goes into the checkpoint."""
    if kind == "power of two":
        return runtime_input_scale(needed)
    if kind == "five":
        return min(_next_bf16(needed, 5), key=lambda scale: gain_error(scale, down=down))
    return needed


def _next_bf16(needed: float, count: int) -> list[float]:
    """The next `count` BF16 values from `needed` on."""
    value = torch.tensor(needed).to(torch.bfloat16)
    infinity = torch.tensor(float("inf"), dtype=torch.bfloat16)
    if float(value) < needed:
        value = torch.nextafter(value, infinity)
    values = []
    for _ in range(count):
        values.append(float(value))
        value = torch.nextafter(value, infinity)
    return values


def relative_error(x: Tensor, scale: float, *, down: bool) -> float:
    """Relative RMS error of a BF16 input after the kernel's own steps."""
    stored = torch.tensor(scale, dtype=torch.float32)
    alpha = stored.to(torch.bfloat16).float() if down else stored
    act_scale = (1 / alpha).to(torch.bfloat16)
    codes = (x * act_scale).float().clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    error = codes.float() * alpha - x.float()
    return float(error.norm() / x.float().norm())


if __name__ == "__main__":
    main()
