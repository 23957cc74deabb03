"""How a scale is chosen, and how a weight is read in chunks of rows; all formats use it.

The rules are in the package's docstring. No format is defined here.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from deepseek.errors import CheckpointError

#: The smallest normal number of float32 and bfloat16 alike.
SMALLEST_SCALE = 2.0**-126
LARGEST_MAGNITUDE = 2.0**126
_CHUNK_ELEMENTS = 1 << 22


def row_chunks(w: Tensor, multiple: int = 1) -> Iterator[slice]:
    """Yield row slices of about 4 M elements, a multiple of `multiple` rows in all but the last."""
    assert w.ndim == 2, tuple(w.shape)
    assert w.numel(), tuple(w.shape)
    height = max(_CHUNK_ELEMENTS // w.shape[1] // multiple, 1) * multiple
    for first in range(0, w.shape[0], height):
        yield slice(first, min(first + height, w.shape[0]))


def rows_of(given: Tensor | None, rows: slice) -> Tensor | None:
    """These rows of an optional tensor."""
    return None if given is None else given[rows]


def assert_shapes(shape: tuple[int, ...], *given: Tensor | None) -> None:
    """Assert that each given amax, scale or zero point has the shape of the scale to be stored."""
    for tensor in given:
        assert tensor is None or tuple(tensor.shape) == shape, (tuple(tensor.shape), shape)


def largest(x: Tensor) -> Tensor:
    """The largest magnitude [], NaN where any value is NaN. Unlike x.abs() it does not copy x."""
    low, high = x.aminmax()
    return torch.maximum(-low, high)


def check_magnitude(peak: Tensor) -> None:
    """Refuse a weight by its amax values.

    Raises:
        CheckpointError: NaN, infinity, or so large that it might dequantize to infinity.
    """
    # `not (... <= ...)` refuses NaN too, which compares false.
    if not bool((peak <= LARGEST_MAGNITUDE).all()):
        raise CheckpointError("holds NaN, infinity or magnitudes above 2^126; repair the weight")


def choose_scale(
    peak: Tensor,
    largest_code: float,
    dtype: torch.dtype,
    amax: Tensor | None,
    scale: Tensor | None,
) -> Tensor:
    """The scale to store, shaped like `peak`: the given scale, else from the given amax, else from
    `peak`, the data's own amax, which is checked in any case.

    Raises:
        CheckpointError: the data, the amax or the scale cannot be represented.
    """
    assert amax is None or scale is None, "give amax or scale, not both"
    check_magnitude(peak)
    if scale is not None:
        return given_scale(scale, dtype)
    if amax is not None:
        amax = amax.to(peak)
        if not bool(((amax >= 0) & (amax <= LARGEST_MAGNITUDE)).all()):
            raise CheckpointError("has a calibrated amax that is negative, NaN or above 2^126")
        if bool(((amax == 0) & (peak > 0)).any()):
            raise CheckpointError("has a calibrated amax of 0 where values are not 0")
        peak = amax
    # bfloat16 has float32's exponents, so rounding cannot leave the range that nonzero keeps.
    return nonzero(peak / largest_code, peak).to(dtype)


def given_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The caller's scale, checked and rounded to its stored dtype.

    Raises:
        CheckpointError: a scale is NaN, negative, zero or outside what `choose_scale` gives.
    """
    stored = scale.to(dtype)
    if not bool(((stored >= SMALLEST_SCALE) & (stored <= LARGEST_MAGNITUDE)).all()):
        raise CheckpointError("has a scale that is not between 2^-126 and 2^126")
    return stored


def nonzero(scale: Tensor, peak: Tensor) -> Tensor:
    """Raise `scale` to the smallest normal number, and to 1 where all values are zeros."""
    return scale.clamp_min(SMALLEST_SCALE).masked_fill(peak == 0, 1.0)


def choose_range(
    values: Tensor,
    codes: tuple[int, int],
    dtype: torch.dtype,
    scale: Tensor | None,
    zero_point: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Scale (`dtype`) and zero point (int8) of `values`, one along each last dimension.

    `codes` are the smallest and the largest code. A given scale and zero point are checked and
    returned; otherwise the scale is (max - min) / (number of steps), with 0 always inside
    [min, max], so that 0 has a code of its own.

    Raises:
        CheckpointError: the data, the scale or the zero point cannot be represented.
    """
    assert (scale is None) == (zero_point is None), "give both or neither"
    lowest, highest = codes
    low, high = values.amin(dim=-1), values.amax(dim=-1)
    check_magnitude(torch.maximum(-low, high))
    if scale is not None and zero_point is not None:
        if not bool(((zero_point >= lowest) & (zero_point <= highest)).all()):
            raise CheckpointError(f"has a zero point outside [{lowest}, {highest}]")
        return given_scale(scale, dtype), zero_point
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    width = high - low
    chosen = nonzero(width / (highest - lowest), width).to(dtype)
    return chosen, round_to_int8(lowest - low / chosen.float(), lowest, highest)


def round_to_int8(steps: Tensor, low: int, high: int) -> Tensor:
    """Round half to even (in place), clip to [low, high], and convert to int8."""
    return steps.round_().clamp_(low, high).to(torch.int8)
