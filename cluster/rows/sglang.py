"""SGLang 0.5.23: what it loads of `build --target sglang`, which writes the layout that fits the
artifact (w8a8_int8, blockwise_int8, w4afp8 or compressed-tensors), and of the artifact itself.

Its configuration code, choice of schemes, model and loader are run by the test that the rows name,
on artifacts of ours and on what is built of them; its kernels are read.
"""

from __future__ import annotations

from cluster.matrix import (
    ADD_RULES,
    ANY,
    ASYM_G128,
    BF16,
    CPU,
    DENSE,
    ELSEWHERE,
    EVERYTHING,
    FP8,
    G128,
    HEAD,
    HEAD_FORMATS,
    INDEXER,
    INT4,
    INT4_A8,
    INT4_ASYM,
    INT8_ASYM,
    INT8_BLOCK,
    KV,
    KV_B,
    PACKED,
    PARTS,
    QKV_A,
    ROUTED,
    SM80,
    SM90,
    V3_PARTS,
    W4A8,
    W4A8_G128,
    W4A8_INT8,
    W8A8,
    W8A16,
    Mix,
    Row,
    cells,
)
from deepseek.sglang.loadable import NEEDS_SM90 as _NEEDS_SM90
from deepseek.sglang.loadable import (
    NO_EXPERT_ZERO_POINTS,
    NO_HEAD,
    NO_INT4_A8,
    NO_INT4_A8_EXPERTS,
    NO_INT8_EXPERTS,
    NO_STATIC_FP8,
)

#: Form of the artifact that the rows below are about; older ones say `mixed-precision` for it all.
ARTIFACT_FORM = 3
TEST = "tests/interop/test_sglang_config.py"
_CT = "SGLang compressed_tensors.py get_moe_scheme, compressed_tensors_wNa16_moe.py"
_W8A8 = "SGLang w8a8_int8.py"
_W4A8 = "SGLang w4afp8.py"
_EXPERTS = "SGLang fused_moe_triton/layer.py weight_loader, compressed_tensors_wNa16_moe.py"
_LOADER = "SGLang deepseek_weight_loader.py"
_FP8 = "SGLang fp8.py, fp8_utils.py can_auto_enable_marlin_fp8"
_FUSED = f"{_LOADER} do_load_weights, linear.py ReplicatedLinear"
_SCALES = "SGLang layers/parameter.py, linear.py ReplicatedLinear"
_INDEXER = "SGLang dsa/dsa_indexer.py"
_KV = "SGLang memory_pool.py MLATokenToKVPool"

PLAIN_KV_B = (
    "kv_b_proj is stored in BF16, because its absorbed MLA reads the unpacked weight of kv_b_proj"
)
NO_PACKED_KV_B = "its absorbed MLA reads the unpacked weight of kv_b_proj"
SHAPE_LEFT_OUT = (
    "weight_shape of q_a_proj and kv_a_proj_with_mqa is left out, because it puts the two one "
    "after the other, four numbers where its fused linear has two"
)
FUSED_SHAPE = (
    "it puts the stored shapes of q_a_proj and kv_a_proj_with_mqa one after the other, four "
    "numbers where its fused linear has two, and stops"
)
NO_FP32_SCALES = "it takes scales of packed linears in the model's BF16 only, and ours are FP32"
_ITSELF = (
    "`build` has no model of its loader for DeepSeek-V3.2: serve the quantized checkpoint itself "
    "with it"
)
_ZERO_POINTS = "its kernels take zero points of 4 bits only"
_STARTED = "it is started with --quantization w8a8_int8, as the launch file says"
_BUILD_IT = "Build it with `build --target sglang`"
_INT8, _PLAIN = "weights: int8", "weights: bf16"
_SYMMETRIC = "weights: int4, group_size: 128"
_NO_MIXED_FP8 = (
    "its FP8 block experts have no kernel for Ampere, nor do FP8 linears of compressed-tensors"
)
_GPUS = SM80 | SM90

_HEAD = "SGLang compressed_tensors.py get_lm_head_scheme, logits_processor.py"
_HARDWARE = (
    Row("sglang", CPU, EVERYTHING, ANY, False, "SGLang w8a8_int8.py, amx_utils.py", "read",
        "its CPU kernels need AMX, and its CPU backend is not a target of ours", ELSEWHERE),
    Row("sglang", _GPUS, PARTS, BF16, True, "SGLang unquant.py", "read", kernels="read"),
    Row("sglang", SM90, DENSE, FP8, True, _FP8, "executed", kernels="read", test=TEST),
    Row("sglang", SM90, PARTS, FP8, True, _FP8, "read", kernels="read"),
    Row("sglang", SM80, PARTS, FP8, False, f"{_FP8}, compressed_tensors_w8a16_fp8.py", "inferred",
        _NO_MIXED_FP8, ADD_RULES, _PLAIN, stops="kernels"),
    Row("sglang", SM90, INDEXER, BF16 | FP8, True, _INDEXER, "inferred", _ITSELF, kernels="read"),
    Row("sglang", SM80, INDEXER, BF16 | FP8, False, _INDEXER, "inferred",
        "its indexer scores tokens with DeepGEMM, which needs Hopper", ELSEWHERE, stops="kernels"),
)  # fmt: skip
_PACKED_EXPERTS = (
    Row("sglang", _GPUS, ROUTED, INT8_ASYM, False, _EXPERTS, "read", NO_EXPERT_ZERO_POINTS,
        ADD_RULES, _INT8),
    *(Row("sglang", _GPUS, ROUTED, frozenset({f"int4-asym-g{size}"}), False, _EXPERTS, "read",
          NO_EXPERT_ZERO_POINTS, ADD_RULES, f"weights: int4, group_size: {size}")
      for size in (32, 64, 128)),
    Row("sglang", _GPUS, ROUTED, W8A16, True, _CT, "executed", kernels="inferred", test=TEST),
    Row("sglang", _GPUS, ROUTED, G128, True, _CT, "executed", kernels="read", test=TEST),
    Row("sglang", _GPUS, ROUTED, INT4, True, _CT, "read", kernels="read"),
)  # fmt: skip
_PACKED_LINEARS = (
    Row("sglang", _GPUS, KV_B, W8A16 | G128, True, f"{_LOADER} post_load_weights", "executed",
        PLAIN_KV_B, kernels="read", test=TEST),
    Row("sglang", _GPUS, KV_B, PACKED, True, f"{_LOADER} post_load_weights", "read", PLAIN_KV_B,
        kernels="read"),
    Row("sglang", _GPUS, QKV_A, W8A16 | G128, True, _FUSED, "executed", SHAPE_LEFT_OUT,
        kernels="read", test=TEST),
    Row("sglang", _GPUS, PARTS, INT8_ASYM, False,
        "SGLang marlin_utils.py query_marlin_supported_quant_types", "read", _ZERO_POINTS,
        ADD_RULES, _INT8, stops="kernels"),
    Row("sglang", _GPUS, DENSE, W8A16 | G128, True, _CT, "executed", kernels="read", test=TEST),
    Row("sglang", _GPUS, PARTS, INT4_ASYM, True, _CT, "read", kernels="inferred"),
    Row("sglang", _GPUS, PARTS, W8A16 | INT4, True, _CT, "read", kernels="read"),
)  # fmt: skip
_INT4_A8 = (
    Row("sglang", _GPUS, ROUTED, W4A8_INT8, False,
        "SGLang compressed_tensors.py _is_wint4afp8, get_moe_scheme", "read", NO_INT4_A8_EXPERTS,
        ADD_RULES, _SYMMETRIC),
    Row("sglang", _GPUS, PARTS, W4A8_INT8, False,
        "SGLang compressed_tensors.py _get_scheme_from_parts", "read", NO_INT4_A8, ADD_RULES,
        _SYMMETRIC),
)  # fmt: skip
_KV_ROWS = (
    Row("sglang", _GPUS, KV, frozenset({"bf16"}), True, _KV, "read", kernels="read"),
    Row("sglang", SM90, KV, frozenset({"fp8"}), True, f"{_KV}, flashattention_backend.py", "read",
        "its FP8 KV cache holds rotary keys in FP8 too, with one scale, which is 1",
        kernels="read"),
    Row("sglang", SM80, KV, frozenset({"fp8"}), False, "SGLang decode_attention.py", "inferred",
        "its Triton MLA kernels multiply in the cache's type, and Ampere has no FP8 cores",
        "Set kv_cache to bf16 in the recipe", stops="kernels"),
    Row("sglang", _GPUS, KV, frozenset({"int8"}), False, "SGLang kv_cache_hook.py", "read",
        "its KV cache is bf16, fp8 or fp4", "Set kv_cache to bf16 in the recipe"),
)  # fmt: skip

ROWS: tuple[Row, ...] = (
    *_HARDWARE,
    Row("sglang", _GPUS, V3_PARTS, W8A8, True, _W8A8, "executed", _STARTED, kernels="read",
        test=TEST),
    Row("sglang", _GPUS, PARTS, W8A8, True, _W8A8, "read", _STARTED, kernels="read"),
    Row("sglang", _GPUS, V3_PARTS, INT8_BLOCK, True, "SGLang blockwise_int8.py", "executed",
        kernels="read", test=TEST),
    Row("sglang", _GPUS, PARTS, INT8_BLOCK, True, "SGLang blockwise_int8.py", "read",
        kernels="read"),
    Row("sglang", _GPUS, HEAD, HEAD_FORMATS, False, f"{_W8A8}, {_HEAD}", "read", NO_HEAD,
        ADD_RULES),
    *_INT4_A8,
    Row("sglang", SM80, ROUTED, W4A8, False, _W4A8, "read", _NEEDS_SM90,
        ADD_RULES, _SYMMETRIC, stops="kernels"),
    Row("sglang", SM90, ROUTED, W4A8_G128, True, _W4A8, "executed",
        "the largest input scale of a layer's experts, rounded to BF16, counts for all",
        kernels="read", test=TEST),
    Row("sglang", SM90, ROUTED, W4A8, False, _W4A8, "read",
        "its W4AFP8 experts have groups of 128 only", ADD_RULES, f"{_SYMMETRIC}, activations: fp8"),
    *_PACKED_EXPERTS,
    *_PACKED_LINEARS,
    Row("sglang", _GPUS, PARTS, W4A8, False, _W4A8, "read",
        "its W4AFP8 is for routed experts only", ADD_RULES),
    *_KV_ROWS,
)  # fmt: skip

#: The artifact as it is (form 3, whose top-level format is that of the routed experts).
ARTIFACT_ROWS: tuple[Row, ...] = (
    *_HARDWARE,
    Row("sglang", _GPUS, HEAD, W8A8 | INT4, True, _HEAD, "read", kernels="read"),
    Row("sglang", _GPUS, HEAD, W8A16, False, _SCALES, "read", NO_FP32_SCALES, ADD_RULES),
    Row("sglang", _GPUS, HEAD, INT4_A8, False,
        "SGLang compressed_tensors.py _get_scheme_from_parts", "read", NO_INT4_A8, ADD_RULES,
        _SYMMETRIC),
    *_INT4_A8,
    Row("sglang", _GPUS, ROUTED, W8A8, False, _CT, "executed", NO_INT8_EXPERTS,
        "Build it with `build --target sglang`, or start it with --quantization w8a8_int8",
        test=TEST),
    Row("sglang", _GPUS, PARTS, W8A8, True, "SGLang compressed_tensors_w8a8_int8.py", "read",
        kernels="read"),
    Row("sglang", _GPUS, PARTS, INT8_BLOCK, False, "SGLang compressed_tensors.py", "read",
        "its compressed-tensors INT8 has no scales per tile",
        _BUILD_IT),
    Row("sglang", _GPUS, ROUTED, W4A8_G128, False,
        "SGLang compressed_tensors.py _is_wint4afp8", "executed", NO_STATIC_FP8,
        _BUILD_IT, test=TEST),
    Row("sglang", _GPUS, ROUTED, W4A8, False, "SGLang compressed_tensors.py _is_wint4afp8", "read",
        NO_STATIC_FP8, ADD_RULES, _SYMMETRIC),
    Row("sglang", _GPUS, DENSE, W8A16 | INT8_ASYM, False, _SCALES, "executed", NO_FP32_SCALES,
        _BUILD_IT, test=TEST),
    Row("sglang", _GPUS, PARTS - ROUTED, W8A16 | INT8_ASYM, False, _SCALES, "read",
        NO_FP32_SCALES, _BUILD_IT),
    Row("sglang", _GPUS, QKV_A, G128 | ASYM_G128, False, _FUSED, "executed", FUSED_SHAPE,
        _BUILD_IT, test=TEST),
    Row("sglang", _GPUS, QKV_A, PACKED, False, _FUSED, "read", FUSED_SHAPE, _BUILD_IT),
    Row("sglang", _GPUS, KV_B, PACKED, False, f"{_LOADER} post_load_weights", "read",
        NO_PACKED_KV_B, _BUILD_IT),
    *_PACKED_EXPERTS,
    Row("sglang", _GPUS, PARTS, INT4_ASYM, True, _CT, "read", kernels="inferred"),
    Row("sglang", _GPUS, PARTS, INT4, True, _CT, "read", kernels="read"),
    Row("sglang", _GPUS, PARTS, W4A8, False, "SGLang compressed_tensors.py", "read",
        NO_STATIC_FP8, ADD_RULES),
    *_KV_ROWS,
)  # fmt: skip

_PACKED_CELLS = cells(PARTS, PACKED) | cells(PARTS | INDEXER, FP8)
#: SGLang picks one quantization method per model; `build` writes what that method reads.
MIXES: tuple[Mix, ...] = (
    Mix("sglang", "w8a8_int8", "W8A8 INT8 (w8a8_int8)", _GPUS, cells(PARTS, W8A8), "int8"),
    Mix("sglang", "blockwise_int8", "W8A8 INT8 in tiles (blockwise_int8)", _GPUS,
        cells(PARTS, INT8_BLOCK), "int8-block"),
    Mix("sglang", "compressed-tensors", "weight-only INT beside FP8 blocks (compressed-tensors)",
        _GPUS, _PACKED_CELLS, "int4"),
    Mix("sglang", "w4afp8", "INT4 g128 experts on FP8 blocks (w4afp8)", SM90,
        cells(PARTS - ROUTED | INDEXER, FP8) | cells(ROUTED, G128 | W4A8_G128), "w4a8",
        plain=False),
)  # fmt: skip
#: In the artifact W8A8 linears may stand beside packed ones.
ARTIFACT_MIXES: tuple[Mix, ...] = (
    Mix("sglang", "compressed-tensors", "compressed-tensors", _GPUS,
        _PACKED_CELLS | cells(PARTS - ROUTED | HEAD, W8A8) | cells(HEAD, INT4), "int4"),
)  # fmt: skip
