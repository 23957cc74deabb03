"""One tensor of an SGLang engine directory, made from those of a checkpoint.

Nothing is rounded but what SGLang itself would round:

    INT4 codes   w4afp8: compressed-tensors stores code + 8 in each nibble; the same nibbles in
                 two's complement differ in their highest bit: bytes XOR 0x88
    INT8 packed  the artifact's words; scales F32 -> BF16, the type in which SGLang holds them
    kv_b_proj    of INT8 or INT4 codes in groups of compressed-tensors: code times scale in FP32,
                 rounded to BF16 once
    the rest     bit for bit

N outputs · K inputs
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from deepseek.artifact.input_scales import LayerInputScales
from deepseek.artifact.layout import StoredTensor
from deepseek.formats import decompress, stored_shapes
from deepseek.recipe import Scheme
from deepseek.tensor_files import DTYPES
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
    given where the layer has INT4 experts with static input scales.
    """
    spec = tensor.spec
    module, scheme = spec.module, schemes[spec.module]
    outputs, inputs = spec.shape
    if stored[module].weights == "bf16" != scheme.weights:
        parts = {suffix: read(f"{module}.{suffix}") for suffix in stored_shapes(scheme, 128, 128)}
        return decompress(parts, scheme, (outputs, inputs)).to(torch.bfloat16)
    match tensor.suffix:
        case "input_scale":
            assert scales is not None, module
            return torch.tensor([scales.down if spec.role == "down_proj" else scales.gate_up])
        case "weight" if scheme.weights == "int4":
            packed = read(f"{module}.weight_packed")  # int32 [N, K/8]
            return packed.contiguous().view(torch.uint8).bitwise_xor(0x88).view(torch.int8)
        case "weight_scale_inv":
            return read(f"{module}.weight_scale")
    values = read(f"{module}.{tensor.suffix}")
    wanted = DTYPES[tensor.dtype]
    if values.dtype != wanted:
        assert wanted == torch.bfloat16, (module, values.dtype, wanted)
        return values.to(wanted)
    return values
