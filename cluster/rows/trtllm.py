"""TensorRT-LLM's PyTorch backend, 1.2.1 and 1.3.0rc29: what it loads of `build --target trtllm`.

Read in its source; on CPUs the loader's own text has read our directories (docs/trtllm.md), which
is not the tool itself, so that no row is `executed`.
"""

from __future__ import annotations

from cluster.matrix import (
    ADD_RULES,
    ANY,
    BF16,
    CPU,
    ELSEWHERE,
    EVERYTHING,
    FP8,
    G128,
    GENERIC,
    HEAD,
    HEAD_FORMATS,
    INDEXER,
    INT4,
    INT4_ASYM,
    INT4_OTHER,
    INT8_ASYM,
    INT8_BLOCK,
    KV,
    MLA,
    PARTS,
    ROUTED,
    SM80,
    SM90,
    W4A8,
    W4A8_G128,
    W4A8_INT8,
    W8A8,
    W8A16,
    Row,
)
from deepseek.trtllm.loadable import (
    EXPERTS_ONLY,
    GROUPS_OF_128,
    NO_HEAD,
    NO_INDEXER,
    NO_INT4_A8,
    NO_INT8_TILES,
    NO_W8A8,
    NO_ZERO_POINTS,
)

_LINEAR = "TensorRT-LLM _torch/modules/linear.py get_quant_method"
_MOE = "TensorRT-LLM fused_moe_cutlass.py _get_quant_method"
_INT8_MOE = "TensorRT-LLM fused_moe/quantization.py INT8WoqPerChannelFusedMoEMethod"
_MODEL = "TensorRT-LLM modeling_deepseekv3.py"
_README = "TensorRT-LLM examples/models/core/deepseek_v3/README.md"
_CONFIG = "TensorRT-LLM model_config.py load_hf_quant_config"
_KV_ARGS = "TensorRT-LLM llm_args.py KvCacheConfig, model_loader.py"

_GA, _RC = ("1.2.1",), ("1.3.0rc29",)
#: What both quantizations of routed experts ask for, by version.
_DIALECTS = {
    _GA: "beside FP8 blocks the dialect mixed says this with MIXED_PRECISION, which must be "
    "smoke-tested on the exact wheel; the dialect single does without it and has everything else "
    "in BF16",
    _RC: "beside FP8 blocks the dialect mixed says this with MIXED_PRECISION, which this version "
    "resolves by expert (#18393, tested there on CPUs only); the dialect single does without it "
    "and has everything else in BF16",
}
_AS_W4A8 = (
    "INT4 experts run as W4AFP8, so their activations become FP8 with static scales, which `build` "
    "takes from the calibration's maxima"
)
_LARGEST = "the largest input scale of a layer's experts counts for all"
_INT8 = "weights: int8"
_SYMMETRIC = "weights: int4, group_size: 128"
_RECIPES = "Use the recipe int8-experts or int4, or add to this one {rules}"

ROWS: tuple[Row, ...] = (
    Row("trtllm", CPU, EVERYTHING, ANY, False, _README, "read",
        "TensorRT-LLM runs on NVIDIA GPUs only", ELSEWHERE),
    Row("trtllm", SM80, EVERYTHING, ANY, False, _README, "read",
        "TensorRT-LLM does not support DeepSeek-V3 on Ampere", ELSEWHERE),
    Row("trtllm", SM90, PARTS, BF16 | FP8, True, _LINEAR, "read", kernels="read"),
    Row("trtllm", SM90, INDEXER, BF16 | FP8, False,
        "TensorRT-LLM attention_backend/sparse/dsa.py Indexer", "inferred", NO_INDEXER, ELSEWHERE),
    Row("trtllm", SM90, HEAD, HEAD_FORMATS, False,
        "TensorRT-LLM _torch/modules/embedding.py LMHead", "read", NO_HEAD, ADD_RULES),
    Row("trtllm", SM90, ROUTED, W4A8_INT8, False, _LINEAR, "read", NO_INT4_A8, _RECIPES,
        _SYMMETRIC),
    Row("trtllm", SM90, PARTS, W4A8_INT8, False, _LINEAR, "read", NO_INT4_A8, _RECIPES),
    Row("trtllm", SM90, ROUTED, W8A8, False, _LINEAR, "read", NO_W8A8, _RECIPES, _INT8),
    Row("trtllm", SM90, PARTS, W8A8, False, _LINEAR, "read", NO_W8A8, _RECIPES),
    Row("trtllm", SM90, ROUTED, INT8_BLOCK, False, _MOE, "read", NO_INT8_TILES, _RECIPES, _INT8),
    Row("trtllm", SM90, PARTS, INT8_BLOCK, False, _LINEAR, "read", NO_INT8_TILES, _RECIPES),
    Row("trtllm", SM90, MLA, W8A16 | INT8_ASYM | INT4 | INT4_ASYM | W4A8, False, _MODEL, "read",
        "its MLA loader reads these projections only as BF16 or FP8 blocks", ADD_RULES),
    Row("trtllm", SM90, GENERIC, W8A16 | INT8_ASYM | INT4 | INT4_ASYM | W4A8, False, _LINEAR,
        "inferred", EXPERTS_ONLY, ADD_RULES),
    *(Row("trtllm", SM90, ROUTED, W8A16, True, _INT8_MOE, "read", note, versions=version,
          kernels="read")
      for version, note in _DIALECTS.items()),
    Row("trtllm", SM90, ROUTED, INT8_ASYM, False, _INT8_MOE, "read", NO_ZERO_POINTS, ADD_RULES,
        _INT8),
    *(Row("trtllm", SM90, ROUTED, G128, True, _MOE, "read", f"{_AS_W4A8}; {note}",
          versions=version, kernels="read")
      for version, note in _DIALECTS.items()),
    *(Row("trtllm", SM90, ROUTED, W4A8_G128, True, _MOE, "read", f"{_LARGEST}; {note}",
          versions=version, kernels="read")
      for version, note in _DIALECTS.items()),
    Row("trtllm", SM90, ROUTED, INT4_OTHER | INT4_ASYM, False, _MOE, "read", GROUPS_OF_128,
        ADD_RULES, _SYMMETRIC),
    Row("trtllm", SM90, ROUTED, W4A8 - W4A8_G128, False, _MOE, "read", GROUPS_OF_128, ADD_RULES,
        f"{_SYMMETRIC}, activations: fp8"),
    Row("trtllm", SM90, KV, frozenset({"bf16"}), True, _KV_ARGS, "read", kernels="read"),
    Row("trtllm", SM90, KV, frozenset({"fp8"}), True, _MODEL, "read",
        "the FP8 KV cache holds rotary keys in FP8 too and uses the constant scale 1; calibrated "
        "KV scales are ignored", kernels="read"),
    Row("trtllm", SM90, KV, frozenset({"int8"}), False, _KV_ARGS, "read",
        "its KV cache is auto, fp8 or nvfp4", "Set kv_cache to fp8 or bf16 in the recipe"),
)  # fmt: skip

#: The artifact as it is.
ARTIFACT_ROWS: tuple[Row, ...] = (
    Row("trtllm", CPU | SM80 | SM90, EVERYTHING, ANY, False, _CONFIG, "read",
        "it has layouts of its own: of compressed-tensors it knows eight bits only, and takes INT8 "
        "for FP8", "Build it with `build --target trtllm`"),
)  # fmt: skip
