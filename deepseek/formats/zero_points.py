"""Zero points as compressed-tensors stores them: packed like codes, but along the outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek.formats.int4 import pack_int4, unpack_int4
from deepseek.formats.int8 import pack_int8, unpack_int8


def pack_zero_point(zero_point: Tensor, bits: int = 4) -> Tensor:
    """int8 [N, G] -> int32 [ceil(N * bits / 32), G], for codes of 4 or 8 bits.

    G is the number of groups, 1 where there is one zero point per output channel.
    """
    pack = {4: pack_int4, 8: pack_int8}[bits]
    # clone: contiguous() would keep odd strides in dimensions of size 1, which views refuse.
    return pack(_transposed(zero_point)).T.clone(memory_format=torch.contiguous_format)


def unpack_zero_point(packed: Tensor, num_rows: int, bits: int = 4) -> Tensor:
    """int32 [ceil(N * bits / 32), G] -> int8 [N, G]; `num_rows` is N."""
    unpack = {4: unpack_int4, 8: unpack_int8}[bits]
    return unpack(_transposed(packed), num_rows).T.contiguous()


def _transposed(x: Tensor) -> Tensor:
    return x.T.clone(memory_format=torch.contiguous_format)
