"""The order in memory in which the native kernels read weights, and back.

deepseek/native/linear.h draws the layouts: blocks of 16 outputs, one output per lane of a vector,
and in each lane as many inputs as fit in 32 bits. They are the same for every CPU. Every `pack_*`
function has an `unpack_*` that returns the values it was given, for the kernels in torch.

N outputs, padded to a multiple of 16 with zeros · K inputs · g group size · B = ceil(N / 16)
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek.formats import TILE

#: Outputs of a block.
LANES = 16


def num_blocks(num_outputs: int) -> int:
    """Blocks of 16 outputs."""
    return -(-num_outputs // LANES)


def pack_int8(codes: Tensor, multiple: int = 4) -> Tensor:
    """Codes int8 [N, K] -> uint8 [B, ceil(K/4), 16, 4] = code + 128. K is padded to `multiple`
    (4, or 128 for weights in tiles) with the code 0."""
    assert codes.dtype == torch.int8, codes.dtype
    assert multiple % 4 == 0, multiple
    padded = _pad(codes, LANES, multiple)
    blocks = padded.view(torch.uint8).view(-1, LANES, padded.shape[1] // 4, 4).transpose(1, 2)
    return (blocks ^ 0x80).contiguous()


def unpack_int8(packed: Tensor, num_outputs: int, num_inputs: int) -> Tensor:
    """The inverse of `pack_int8`: codes int8 [N, K]."""
    rows = (packed ^ 0x80).view(torch.int8).transpose(1, 2).reshape(packed.shape[0] * LANES, -1)
    return rows[:num_outputs, :num_inputs].contiguous()


def pack_int4(codes: Tensor) -> Tensor:
    """Codes int8 [N, K] in [-8, 7], K a multiple of 8 -> uint8 [B, K/8, 16, 4]: byte j of a lane
    holds input 8b + j in its low bits and input 8b + 4 + j in its high bits, each code + 8."""
    assert codes.dtype == torch.int8, codes.dtype
    assert codes.shape[1] % 8 == 0, tuple(codes.shape)
    nibbles = (_pad(codes, LANES, 8) + 8).view(torch.uint8)
    eights = nibbles.view(-1, LANES, codes.shape[1] // 8, 2, 4)
    return (eights[:, :, :, 0] | (eights[:, :, :, 1] << 4)).transpose(1, 2).contiguous()


def unpack_int4(packed: Tensor, num_outputs: int) -> Tensor:
    """The inverse of `pack_int4`: codes int8 [N, K]."""
    eights = torch.stack((packed & 0xF, packed >> 4), dim=3).view(torch.int8)  # [B, K/8, 16, 2, 4]
    rows = eights.transpose(1, 2).reshape(packed.shape[0] * LANES, -1)
    return rows[:num_outputs] - 8


def pack_bf16(weight: Tensor) -> Tensor:
    """Float [N, K] -> BF16 [B, ceil(K/2), 16, 2], rounded; K is padded to 2 with zeros."""
    padded = _pad(weight.bfloat16(), LANES, 2)
    return padded.view(-1, LANES, padded.shape[1] // 2, 2).transpose(1, 2).contiguous()


def unpack_bf16(packed: Tensor, num_outputs: int, num_inputs: int) -> Tensor:
    """The inverse of `pack_bf16`: BF16 [N, K]."""
    rows = packed.transpose(1, 2).reshape(packed.shape[0] * LANES, -1)
    return rows[:num_outputs, :num_inputs].contiguous()


def pack_channels(values: Tensor) -> Tensor:
    """One value per output [N] (scale f32, zero point int8) -> the same dtype [B * 16]."""
    return _pad(values.reshape(-1, 1), LANES, 1).flatten()


def pack_groups(values: Tensor) -> Tensor:
    """One value per output and group [N, G] (scale BF16 of INT4, f32 of INT8 tiles) -> the same
    dtype [B, G, 16]."""
    padded = _pad(values, LANES, 1)
    return padded.view(-1, LANES, values.shape[1]).transpose(1, 2).contiguous()


def unpack_groups(packed: Tensor, num_outputs: int) -> Tensor:
    """The inverse of `pack_groups`: [N, G]."""
    rows = packed.transpose(1, 2).reshape(packed.shape[0] * LANES, -1)
    return rows[:num_outputs].contiguous()


def pack_int4_zeros(zero_point: Tensor) -> Tensor:
    """Zero points int8 [N, K/g] in [-8, 7] -> uint8 [B, K/g, 16] = zero point + 8."""
    assert zero_point.dtype == torch.int8, zero_point.dtype
    return (pack_groups(zero_point) + 8).view(torch.uint8)


def unpack_int4_zeros(packed: Tensor, num_outputs: int) -> Tensor:
    """The inverse of `pack_int4_zeros`: int8 [N, K/g]."""
    return unpack_groups(packed, num_outputs).view(torch.int8) - 8


def tile_scales(scale: Tensor, num_outputs: int) -> Tensor:
    """Scales of tiles, f32 [ceil(N/128), ceil(K/128)] -> f32 [B, ceil(K/128), 16], each tile's once
    per output."""
    return pack_groups(scale.repeat_interleave(TILE, dim=0)[:num_outputs])


def _pad(values: Tensor, rows: int, columns: int) -> Tensor:
    """Pad [N, K] with zeros to multiples, contiguous."""
    extra = (0, -values.shape[1] % columns, 0, -values.shape[0] % rows)
    return torch.nn.functional.pad(values, extra).contiguous()
