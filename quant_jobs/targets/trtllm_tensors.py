"""One tensor of a TensorRT-LLM engine directory, made from those of a checkpoint.

Nothing is rounded but what the loader itself would round:

    INT4 codes   compressed-tensors stores code + 8 in each nibble; the same nibbles in two's
                 complement differ in their highest bit: bytes XOR 0x88
    INT4 scales  the artifact's BF16, bit for bit
    INT8 codes   unpacked; scales F32 [N, 1] -> BF16 [N], the type that the loader casts them to
    FP8 tiles    bit for bit
    BF16         of an FP8 tile: code times scale in FP32, rounded once

N outputs · K inputs
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from deepseek.artifact.layout import StoredTensor
from deepseek.formats import dequantize_fp8_block, unpack_int8
from deepseek.recipe import Scheme
from deepseek.trtllm.fields import LayerInputScales
from quant_jobs.targets.layered import Read


def make_tensor(
    tensor: StoredTensor,
    schemes: Mapping[str, Scheme],
    stored: Mapping[str, Scheme],
    read: Read,
    scales: LayerInputScales | None,
) -> Tensor:
    """One tensor of the directory, from those of the checkpoint that hold the same linear.

    `schemes` are the checkpoint's, `stored` the directory's (`layout.stored_schemes`); `scales` are
    given where the layer has INT4 experts.
    """
    spec = tensor.spec
    module, scheme = spec.module, schemes[spec.module]
    match stored[module].weights, tensor.suffix:
        case "int4", "weight":
            packed = read(f"{module}.weight_packed")  # int32 [N, K/8]
            return packed.contiguous().view(torch.uint8).bitwise_xor(0x88).view(torch.int8)
        case "int4", "weight_scale_inv":
            return read(f"{module}.weight_scale")
        case "int4", "input_scale":
            assert scales is not None, module
            return torch.tensor([scales.down if spec.role == "down_proj" else scales.gate_up])
        case "int8", "weight":
            return unpack_int8(read(f"{module}.weight_packed"), spec.shape[1])
        case "int8", "weight_scale":
            return read(f"{module}.weight_scale").squeeze(1).to(torch.bfloat16)
        case "fp8-block", "weight":
            return read(f"{module}.weight")
        case "fp8-block", "weight_scale_inv":
            return read(f"{module}.weight_scale")
        case "bf16", "weight" if scheme.weights == "fp8-block":
            codes, tile_scales = read(f"{module}.weight"), read(f"{module}.weight_scale")
            return dequantize_fp8_block(codes, tile_scales).to(torch.bfloat16)
        case "bf16", "weight":
            return read(f"{module}.weight").to(torch.bfloat16)
    raise AssertionError(f"{module}: no way to {tensor.suffix} of {stored[module].label}")
