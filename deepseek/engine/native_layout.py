"""Plain weights <-> the layout of the native kernels, which is the same for every CPU.

Lanes are 16 outputs; N is padded to a multiple of 16 with zeros. A kernel reads the bytes of a
block of 16 outputs one after the other:

    int8, int8-asym  codes: code + 128, uint8 [N/16, K/4, 16, 4]; scale f32 [N]; zero_point int8 [N]
    int8-block       codes as int8, K padded to 128; scale f32 [N/16, K/128, 16]
    int4, int4-asym  packed: code + 8, uint8 [N/16, K/8, 16, 4]: byte j of a lane holds k = 8 b + j
                     in its low bits and 8 b + 4 + j in its high ones; scale BF16 [N/16, K/g, 16],
                     zero_point uint8 likewise (zero point + 8)
    bf16, fp8-block  weight BF16 [N/16, K/2, 16, 2]

torch_layout.py says what a plain weight is. No tensor is computed with here.

N outputs · K inputs · g group size
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from deepseek.formats import TILE
from deepseek.recipe import Scheme

#: Outputs of a block.
LANES = 16


def native_shapes(
    scheme: Scheme, num_outputs: int, num_inputs: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The tensors of an [N, K] weight by suffix: shape and dtype."""
    blocks = -(-num_outputs // LANES)
    match scheme.weights:
        case "int4" | "int4-asym":
            assert scheme.group_size is not None
            groups = num_inputs // scheme.group_size
            shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
                "packed": ((blocks, num_inputs // 8, LANES, 4), torch.uint8),
                "scale": ((blocks, groups, LANES), torch.bfloat16),
            }
            if scheme.weights == "int4-asym":
                shapes["zero_point"] = ((blocks, groups, LANES), torch.uint8)
            if scheme.activations == "fp8":
                shapes["input_scale"] = ((1,), torch.float32)
            return shapes
        case "int8" | "int8-asym":
            shapes = {
                "codes": ((blocks, -(-num_inputs // 4), LANES, 4), torch.uint8),
                "scale": ((blocks * LANES,), torch.float32),
            }
            if scheme.weights == "int8-asym":
                shapes["zero_point"] = ((blocks * LANES,), torch.int8)
            return shapes
        case "int8-block":
            tiles = -(-num_inputs // TILE)
            return {
                "codes": ((blocks, tiles * TILE // 4, LANES, 4), torch.uint8),
                "scale": ((blocks, tiles, LANES), torch.float32),
            }
        case _:
            return {"weight": ((blocks, -(-num_inputs // 2), LANES, 2), torch.bfloat16)}


def to_native(scheme: Scheme, plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A plain weight -> its native tensors, by suffix; see `native_shapes`."""
    match scheme.weights:
        case "int4" | "int4-asym":
            codes = _blocked(plain["codes"].view(torch.uint8) + 8, 8, value=8)
            tensors = {
                "packed": codes[..., :4] | (codes[..., 4:] << 4),
                "scale": _by_block(plain["scale"]),
            }
            if "zero_point" in plain:
                tensors["zero_point"] = _by_block(plain["zero_point"].view(torch.uint8) + 8, 8)
            if "input_scale" in plain:
                tensors["input_scale"] = plain["input_scale"]
            return tensors
        case "int8" | "int8-asym":
            tensors = {
                "codes": _blocked(plain["codes"].view(torch.uint8) ^ 0x80, 4, value=0x80),
                "scale": _pad(plain["scale"], LANES).contiguous(),
            }
            if "zero_point" in plain:
                tensors["zero_point"] = _pad(plain["zero_point"], LANES).contiguous()
            return tensors
        case "int8-block":
            codes = plain["codes"].view(torch.uint8) ^ 0x80
            whole = torch.nn.functional.pad(codes, (0, -codes.shape[1] % TILE), value=0x80)
            return {
                "codes": _blocked(whole, 4, value=0x80),
                "scale": _by_block(plain["scale"]),
            }
        case _:
            return {"weight": _blocked(plain["weight"].bfloat16(), 2)}


def from_native(
    scheme: Scheme, tensors: Mapping[str, Tensor], shape: tuple[int, int]
) -> dict[str, Tensor]:
    """The inverse of `to_native`: the plain weight [N, K] of `shape`."""
    num_outputs, num_inputs = shape
    match scheme.weights:
        case "int4" | "int4-asym":
            packed = tensors["packed"]
            codes = torch.cat((packed & 15, packed >> 4), dim=-1)
            plain = {
                "codes": (_unblocked(codes, shape) - 8).view(torch.int8),
                "scale": _by_output(tensors["scale"], num_outputs),
            }
            if "zero_point" in tensors:
                zero_point = _by_output(tensors["zero_point"], num_outputs) - 8
                plain["zero_point"] = zero_point.view(torch.int8)
            if "input_scale" in tensors:
                plain["input_scale"] = tensors["input_scale"]
            return plain
        case "int8" | "int8-asym":
            plain = {
                "codes": (_unblocked(tensors["codes"], shape) ^ 0x80).view(torch.int8),
                "scale": tensors["scale"][:num_outputs].clone(),
            }
            if "zero_point" in tensors:
                plain["zero_point"] = tensors["zero_point"][:num_outputs].clone()
            return plain
        case "int8-block":
            return {
                "codes": (_unblocked(tensors["codes"], shape) ^ 0x80).view(torch.int8),
                "scale": _by_output(tensors["scale"], num_outputs),
            }
        case _:
            return {"weight": _unblocked(tensors["weight"], shape)}


def _pad(x: Tensor, multiple: int, value: int = 0) -> Tensor:
    """Pad the first dimension to a multiple."""
    pads = [0, 0] * (x.dim() - 1) + [0, -x.shape[0] % multiple]
    return torch.nn.functional.pad(x, pads, value=value)


def _blocked(x: Tensor, width: int, value: int = 0) -> Tensor:
    """[N, K] -> [N/16, K/width, 16, width]; what is padded has this value."""
    whole = torch.nn.functional.pad(
        x, (0, -x.shape[1] % width, 0, -x.shape[0] % LANES), value=value
    )
    return whole.view(whole.shape[0] // LANES, LANES, -1, width).transpose(1, 2).contiguous()


def _unblocked(x: Tensor, shape: tuple[int, int]) -> Tensor:
    rows = x.transpose(1, 2).reshape(x.shape[0] * LANES, -1)
    return rows[: shape[0], : shape[1]].contiguous()


def _by_block(x: Tensor, value: int = 0) -> Tensor:
    """[N, G] -> [N/16, G, 16]"""
    whole = _pad(x, LANES, value)
    return whole.view(-1, LANES, x.shape[1]).transpose(1, 2).contiguous()


def _by_output(x: Tensor, num_outputs: int) -> Tensor:
    return x.transpose(1, 2).reshape(-1, x.shape[1])[:num_outputs].contiguous()
