"""Refuses source tensors with numbers that nothing can be computed with: NaN, infinity, absurd
scales.

`checkpoint.py` calls it once for each tensor that it hands out, in the thread that reads. Bits are
compared as integers, so no float copy is made, not even of FP8. As integers the values that are not
finite are the largest ones of their sign: the positive ones end the signed order, the negative ones
the unsigned order. Two maxima per chunk, the second of them in cache, therefore see all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepseek.errors import CheckpointError
from deepseek.formats import FP8_MAX
from deepseek.formats.scales import SMALLEST_SCALE

#: Largest scale of an FP8 tile. Its largest value, 448 times as much, must be finite in every type
#: that models are served in, of which FP16 has the shortest range: 65504. The release's scales lie
#: between about 1e-5 and 1e-2. A far higher limit would let pass what it is for: one flipped bit of
#: the exponent makes 3e34 of 1e-4, and activations may survive that, finite and wrong.
LARGEST_SCALE_INV = 65504.0 / FP8_MAX

#: Bytes that both maxima go through before the next: they stay in a core's cache.
_CHUNK_BYTES = 1 << 19

#: Type -> the integers of its width, and the bits of the least positive value that is not finite.
#: e4m3 has NaN only; the others have infinity there, and NaN above it.
_BITS: dict[torch.dtype, tuple[type[Any], type[Any], int]] = {
    torch.float8_e4m3fn: (np.int8, np.uint8, 0x7F),
    torch.float16: (np.int16, np.uint16, 0x7C00),
    torch.bfloat16: (np.int16, np.uint16, 0x7F80),
    torch.float32: (np.int32, np.uint32, 0x7F80_0000),
}


def check_values(path: Path, name: str, tensor: Tensor, rows: Tensor | None = None) -> None:
    """Check that every value of a contiguous host tensor is finite. `path` and `name` are for the
    error sentence; so are `rows` int64 [T], where `tensor` [T, K] holds only these rows.

    Raises:
        CheckpointError: a value is NaN or infinite; the sentence names the first.
    """
    signed_type, unsigned_type, limit = _BITS[tensor.dtype]
    signed = tensor.reshape(-1).view(torch.uint8).numpy().view(signed_type)
    unsigned = signed.view(unsigned_type)
    negative_limit = limit | 1 << (8 * signed.itemsize - 1)
    size = _CHUNK_BYTES // signed.itemsize
    for first in range(0, len(signed), size):
        chunk = slice(first, first + size)
        if signed[chunk].max() < limit and unsigned[chunk].max() < negative_limit:
            continue
        bad = (signed[chunk] >= limit) | (unsigned[chunk] >= negative_limit)
        place = first + int(bad.argmax())
        position = _position(place, tensor)
        if rows is not None:
            position[0] = int(rows[position[0]])
        what = "NaN" if tensor.reshape(-1)[place].isnan() else "infinity"
        raise CheckpointError(
            f"{path}: tensor {name} holds {what} at {position}; repair the source, or download "
            "the shard again"
        )


def check_scales(path: Path, name: str, scale_inv: Tensor) -> None:
    """Check the scales f32 [n, k] of FP8 tiles. `path` and `name` are for the error sentence.

    Zero is refused: the release's quantizer divides by the scale, so from it a tile with scale 0
    can only have NaN for values. So is a subnormal number, which some kernels read as 0.

    Raises:
        CheckpointError: a scale is not between 2^-126 and LARGEST_SCALE_INV; the sentence names the
            first.
    """
    bad = ~((scale_inv >= SMALLEST_SCALE) & (scale_inv <= LARGEST_SCALE_INV)).flatten()
    if not bool(bad.any()):
        return
    place = int(bad.int().argmax())
    raise CheckpointError(
        f"{path}: tensor {name} holds {float(scale_inv.flatten()[place]):g} at "
        f"{_position(place, scale_inv)}; a scale of FP8 weights lies between 2^-126 and "
        f"{LARGEST_SCALE_INV:.4g}; repair the source, or download the shard again"
    )


def _position(place: int, tensor: Tensor) -> list[int]:
    return [int(index) for index in np.unravel_index(place, tensor.shape)]
