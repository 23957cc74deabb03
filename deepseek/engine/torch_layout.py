"""Plain weights -> the layout of PyTorch's operators on this CPU: the slow reference's, and that of
the emulated targets.

A *plain* weight is what a linear means, in rows of outputs, whatever kernel computes it; packing.py
makes it of a stored model, and native_layout.py has it back from an engine directory:

    int4, int4-asym    codes int8 [N, K] in -8..7, scale BF16 [N, K/g]; asym: zero_point int8
                       [N, K/g]; with FP8 activations: input_scale f32 [1]
    int8, int8-asym    codes int8 [N, K], scale f32 [N]; asym: zero_point int8 [N]
    int8-block         codes int8 [N, K], scale f32 [N, K/128], each tile's once per output
    bf16, fp8-block    weight [N, K], a floating type

N outputs · K inputs · g group size
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from deepseek.formats import TILE, dequantize_int4, dequantize_int8
from deepseek.recipe import Scheme

#: The tensors of a plain weight by suffix.
Plain = dict[str, Tensor]


def to_torch(scheme: Scheme, plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that `make_linear` takes, by suffix as `packed_layout.packed_shapes` lists them
    for the layout "torch"."""
    match scheme.weights:
        case "int4" | "int4-asym" if scheme.activations == "int8":
            return _int4_by_group(plain)
        case "int4" | "int4-asym":
            tensors = _int4(plain)
            if "input_scale" in plain:
                tensors["input_scale"] = plain["input_scale"]
            return tensors
        case "int8-block":
            return _int8_block(plain["codes"], plain["scale"])
        case "int8" | "int8-asym":
            return dict(plain)
        case _:
            return {"weight": plain["weight"].float()}


def dequantize(scheme: Scheme, plain: Mapping[str, Tensor]) -> Tensor:
    """The values f32 [N, K] of a plain weight."""
    match scheme.weights:
        case "int4" | "int4-asym":
            return dequantize_int4(plain["codes"], plain["scale"], plain.get("zero_point"))
        case "int8" | "int8-asym":
            zero_point = plain.get("zero_point")
            columns = None if zero_point is None else zero_point[:, None]
            return dequantize_int8(plain["codes"], plain["scale"][:, None], columns)
        case "int8-block":
            codes = plain["codes"]
            by_input = plain["scale"].repeat_interleave(TILE, dim=1)[:, : codes.shape[1]]
            return codes.float() * by_input
        case _:
            return plain["weight"].float()


def _int4(plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Packed uint8 [N, K/2] in this CPU's tile order, and scale with zero, BF16 [K/g, N, 2].

    The artifact computes (code - zero_point) * scale with codes in [-8, 7], the kernel
    (q - 8) * scale + zero with q in 0..15. So q = code + 8 and zero = -zero_point * scale, rounded
    to BF16; linear.py gives the error of that rounding.
    """
    codes = plain["codes"].to(torch.int32) + 8
    scale = plain["scale"]
    zero = torch.zeros_like(scale)
    if "zero_point" in plain:
        zero = (-plain["zero_point"].float() * scale.float()).to(scale.dtype)
    return {
        "packed": torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1),
        "scale_zero": torch.stack((scale, zero), dim=-1).transpose(0, 1).contiguous(),
    }


def _int4_by_group(plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Codes + 8, uint8 [K/g, N, g/2], column 2 i of a group in the low bits; scale BF16 and zero
    point int8, [K/g, N]."""
    unsigned = (plain["codes"] + 8).view(torch.uint8)
    pairs = unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)
    num_outputs, num_groups = plain["scale"].shape
    tensors = {
        "codes": pairs.view(num_outputs, num_groups, -1).transpose(0, 1).contiguous(),
        "scale": plain["scale"].T.contiguous(),
    }
    if "zero_point" in plain:
        tensors["zero_point"] = plain["zero_point"].T.contiguous()
    return tensors


def _int8_block(codes: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """Codes int8 [K/128, N, 128], padded with zeros where 128 does not divide K, and the scale of
    each output's tile, f32 [K/128, N]."""
    num_outputs, num_inputs = codes.shape
    whole = torch.nn.functional.pad(codes, (0, -num_inputs % TILE))
    by_tile = whole.view(num_outputs, -1, TILE).transpose(0, 1).contiguous()
    return {"codes": by_tile, "scale": scale.T.contiguous()}
