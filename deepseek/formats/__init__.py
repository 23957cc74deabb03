"""The number formats that weights are stored in: INT8, INT4 and FP8, as pure tensor functions.

    quantize_*     float weight -> codes and scales, rounded to nearest even, without calibration
    dequantize_*   codes and scales -> float32, the slow reference of every kernel
    pack_int4      eight codes per int32 (pack_int8: four), as compressed-tensors' `pack-quantized`
    compress       one linear's weight -> the named tensors of a compressed-tensors checkpoint
    decompress     and back; `stored_shapes` and `stored_bytes` say the same without any tensor
    input_rounding how the kernel of a linear rounds its input before the product

The quantizer, the artifact, the engine and the planner all call this package, so a format has one
definition. It is not a kernel (deepseek/engine/linear.py) and knows no file, module name or
calibration: the caller passes calibrated amax values or scales by keyword.

Conventions, chosen once:
    A scale is a multiplier: weight = code * scale, or (code - zero_point) * scale.
    It is rounded to its stored dtype *before* the codes are computed, so the codes are the best
    ones for the scale that will be read back.
    Symmetric scales are amax / (largest positive code): 127, 7, 448. Given an amax below the
    data's own, values clip; the one extra negative code (-128, -8) is used only then.
    Asymmetric scales are (max - min) / (number of steps), with 0 always inside the range.
    A row, group or tile of zeros has scale 1 and dequantizes to zeros, never scale 0 or NaN.
    Other scales are at least 2^-126, the smallest normal number: kernels that flush subnormals
    read the same value, and a division by the scale cannot overflow.
    NaN, infinity and magnitudes above 2^126 (which could dequantize to infinity) are refused.

N output features · K input features · g group size · T tokens. Results lie on the weight's device.
Work is done in float32 in chunks of rows: beside its results a call needs less than 100 MB, however
large the weight; INT4 also needs its codes, a byte per weight, until they are packed.
"""

from deepseek.formats.activations import RoundInput, input_rounding
from deepseek.formats.fp8 import (
    FP8_BLOCK,
    FP8_MAX,
    dequantize_fp8_block,
    dequantize_fp8_tensor,
    fake_quantize_fp8,
    quantize_fp8_block,
    quantize_fp8_tensor,
    quantize_input_fp8,
)
from deepseek.formats.int4 import (
    INT4_MAX,
    INT4_MIN,
    dequantize_int4,
    pack_int4,
    quantize_int4,
    unpack_int4,
)
from deepseek.formats.int8 import (
    INT8_MAX,
    INT8_MIN,
    dequantize_int8,
    pack_int8,
    quantize_int8,
    quantize_int8_asym,
    quantize_tokens_int8,
    unpack_int8,
)
from deepseek.formats.int8_block import (
    dequantize_int8_block,
    dequantize_token_groups_int8,
    quantize_int8_block,
    quantize_token_groups_int8,
)
from deepseek.formats.stored import compress, decompress, int8_codes, stored_bytes, stored_shapes
from deepseek.formats.tiles import TILE, num_tiles
from deepseek.formats.zero_points import pack_zero_point, unpack_zero_point

__all__ = [
    "FP8_BLOCK",
    "FP8_MAX",
    "INT4_MAX",
    "INT4_MIN",
    "INT8_MAX",
    "INT8_MIN",
    "TILE",
    "RoundInput",
    "compress",
    "decompress",
    "dequantize_fp8_block",
    "dequantize_fp8_tensor",
    "dequantize_int4",
    "dequantize_int8",
    "dequantize_int8_block",
    "dequantize_token_groups_int8",
    "fake_quantize_fp8",
    "input_rounding",
    "int8_codes",
    "num_tiles",
    "pack_int4",
    "pack_int8",
    "pack_zero_point",
    "quantize_fp8_block",
    "quantize_fp8_tensor",
    "quantize_input_fp8",
    "quantize_int4",
    "quantize_int8",
    "quantize_int8_asym",
    "quantize_int8_block",
    "quantize_token_groups_int8",
    "quantize_tokens_int8",
    "stored_bytes",
    "stored_shapes",
    "unpack_int4",
    "unpack_int8",
    "unpack_zero_point",
]
