"""The deployability matrix: rows of facts about what each engine loads. Data, no logic.

For a target, GPU generation, part and format the first matching row counts. A row that `loads` may
have a note, which states a condition and which the planner prints. The others give the reason and
what to change, where `{rules}` stands for recipe rules made of the parts' globs and `instead`.

Versions: TensorRT-LLM 1.2.x (PyTorch backend), vLLM and SGLang as of autumn 2026. Nothing here was
run on a GPU by us. `evidence` says what a row rests on:

    read      in the loader's own source
    reported  in the project's documentation, issue or pull request
    inferred  follows from what was read, not stated anywhere
    unverified  a cautious guess; `build` for that target must settle it
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal

from cluster.hardware import GpuGeneration
from deepseek.trtllm.loadable import (
    EXPERTS_ONLY,
    GROUPS_OF_128,
    NO_INDEXER,
    NO_W8A8,
    NO_ZERO_POINTS,
)

Target = Literal["trtllm", "vllm", "sglang", "transformers", "embedded"]
TARGETS: tuple[Target, ...] = ("trtllm", "vllm", "sglang", "transformers", "embedded")
Evidence = Literal["read", "reported", "inferred", "unverified"]

KV_CACHE = "kv_cache"
#: Part -> the glob that a recipe rule uses for it. A model has q_a_proj and q_b_proj, or without a
#: query latent q_proj, which every engine loads as a linear of its own, as it does q_b_proj.
GLOBS = {
    "routed_experts": "*.mlp.experts.*",
    "shared_experts": "*.shared_experts.*",
    "dense_mlp": "*.mlp.[gud]*_proj",
    "q_a_proj": "*.q_a_proj",
    "kv_a_proj_with_mqa": "*.kv_a_proj_with_mqa",
    "q_b_proj": "*.q_b_proj",
    "q_proj": "*.q_proj",
    "kv_b_proj": "*.kv_b_proj",
    "o_proj": "*.o_proj",
}
PARTS = frozenset(GLOBS)
ROUTED = frozenset({"routed_experts"})
#: What TensorRT-LLM's MLA code reads by itself, past its generic linear loader.
MLA = frozenset({"q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj"})
GENERIC = PARTS - ROUTED - MLA
KV_B = frozenset({"kv_b_proj"})
#: Fused by every GPU engine where there is a query latent.
QKV_A = frozenset({"q_a_proj", "kv_a_proj_with_mqa"})
#: DeepSeek-V3.2's, which no rule changes: FP8 blocks or BF16, as released.
INDEXER = frozenset({"indexer"})
KV = frozenset({KV_CACHE})
EVERYTHING = PARTS | INDEXER | KV

BF16 = frozenset({"bf16"})
FP8 = frozenset({"fp8-block"})
W8A8 = frozenset({"int8-a8"})
#: INT8 weights in 128x128 tiles, INT8 activations per token and 128 channels.
INT8_BLOCK = frozenset({"int8-block-a8"})
W8A16 = frozenset({"int8"})
INT8_ASYM = frozenset({"int8-asym"})
INT4 = frozenset({"int4-g32", "int4-g64", "int4-g128"})
INT4_ASYM = frozenset({"int4-asym-g32", "int4-asym-g64", "int4-asym-g128"})
G128 = frozenset({"int4-g128"})
INT4_OTHER = INT4 - G128
#: INT4 weights with FP8 activations, one static scale per input.
W4A8 = frozenset({"int4-g32-afp8", "int4-g64-afp8", "int4-g128-afp8"})
W4A8_G128 = frozenset({"int4-g128-afp8"})
FORMATS = BF16 | FP8 | W8A8 | INT8_BLOCK | W8A16 | INT8_ASYM | INT4 | INT4_ASYM | W4A8
KV_FORMATS = frozenset({"bf16", "fp8", "int8"})

SM80: frozenset[GpuGeneration] = frozenset({"sm80"})
SM90: frozenset[GpuGeneration] = frozenset({"sm90"})
CPU: frozenset[GpuGeneration] = frozenset({"cpu"})


@dataclass(frozen=True, slots=True)
class Row:
    """`text` is the reason of a refusal, or the note of a condition ("" for none)."""

    target: Target
    gpus: frozenset[GpuGeneration]
    parts: frozenset[str]
    formats: frozenset[str]
    loads: bool
    source: str
    evidence: Evidence
    text: str = ""
    change: str = ""
    instead: str = "weights: source"


_TRT_LINEAR = "TensorRT-LLM _torch/modules/linear.py get_quant_method"
_TRT_MOE = "TensorRT-LLM fused_moe_cutlass.py _get_quant_method"
_TRT_INT8_MOE = "TensorRT-LLM fused_moe/quantization.py INT8WoqPerChannelFusedMoEMethod"
_TRT_MODEL = "TensorRT-LLM modeling_deepseekv3.py"
_TRT_README = "TensorRT-LLM examples/models/core/deepseek_v3/README.md"
_TRT_INDEXER = "TensorRT-LLM attention_backend/sparse/dsa.py Indexer"
_VLLM_INDEXER = "vLLM deepseek_v2.py Indexer, _try_load_fp8_indexer_wk"
_SGL_INDEXER = "SGLang nsa_indexer.py Indexer"
_VLLM_CT = "vLLM compressed_tensors.py _get_scheme_from_parts"
_VLLM_MOE = "vLLM compressed_tensors_moe.py get_moe_method"
_SGL_CT = "SGLang compressed_tensors.py get_moe_scheme"
_HF_MODEL = "transformers modeling_deepseek_v3.py"
_HF_CT = "transformers quantizer_compressed_tensors.py, core_model_loading.py"
_HF_ZEROS = "it drops the zero points of routed experts"
_SYMMETRIC = "weights: int4, group_size: 128"
_W4A8_G128 = "weights: int4, group_size: 128, activations: fp8"
_INT8 = "weights: int8"
_ADD = "Add to the recipe {rules}"
#: What both quantizations of routed experts ask for in TensorRT-LLM.
_DIALECTS = (
    "beside FP8 blocks the dialect mixed says this with MIXED_PRECISION, which must be "
    "smoke-tested on the exact wheel; the dialect single does without it and has everything else "
    "in BF16"
)
_KV_INSTEAD = "Set kv_cache to fp8 or bf16 in the recipe"

_TRTLLM = (
    Row("trtllm", CPU, EVERYTHING, FORMATS | KV_FORMATS, False, _TRT_README, "reported",
        "TensorRT-LLM runs on NVIDIA GPUs only", "Use --target embedded on a CPU"),
    Row("trtllm", SM80, EVERYTHING, FORMATS | KV_FORMATS, False, _TRT_README, "reported",
        "TensorRT-LLM does not support DeepSeek-V3 on Ampere",
        "Use Hopper GPUs or --target vllm"),
    Row("trtllm", SM90, PARTS, BF16 | FP8, True, _TRT_LINEAR, "read"),
    Row("trtllm", SM90, INDEXER, BF16 | FP8, False, _TRT_INDEXER, "inferred", NO_INDEXER,
        "Use --target vllm or --target sglang"),
    Row("trtllm", SM90, PARTS, W8A8, False, _TRT_LINEAR, "read", NO_W8A8,
        "Use the recipe int8-experts or int4, or --target vllm or sglang"),
    Row("trtllm", SM90, PARTS, INT8_BLOCK, False, _TRT_LINEAR, "read", NO_W8A8,
        "Use the recipe int8-experts or int4, or --target sglang"),
    Row("trtllm", SM90, MLA, W8A16 | INT8_ASYM | INT4 | INT4_ASYM | W4A8, False, _TRT_MODEL,
        "inferred",
        "its MLA loader reads these projections only as BF16 or FP8 blocks", _ADD),
    Row("trtllm", SM90, GENERIC, W8A16 | INT8_ASYM | INT4 | INT4_ASYM | W4A8, False, _TRT_LINEAR,
        "inferred", EXPERTS_ONLY, _ADD),
    Row("trtllm", SM90, ROUTED, W8A16, True, _TRT_INT8_MOE, "read", _DIALECTS),
    Row("trtllm", SM90, ROUTED, INT8_ASYM, False, _TRT_INT8_MOE, "read", NO_ZERO_POINTS, _ADD,
        _INT8),
    Row("trtllm", SM90, ROUTED, G128, True, _TRT_MOE, "read",
        "INT4 experts run as W4AFP8, so their activations become FP8 with static scales, which "
        f"`build` takes from the calibration's maxima; {_DIALECTS}"),
    Row("trtllm", SM90, ROUTED, W4A8_G128, True, _TRT_MOE, "read",
        f"the largest input scale of a layer's experts counts for all; {_DIALECTS}"),
    Row("trtllm", SM90, ROUTED, INT4_OTHER | INT4_ASYM, False, _TRT_MOE, "read", GROUPS_OF_128,
        _ADD, _SYMMETRIC),
    Row("trtllm", SM90, ROUTED, W4A8 - W4A8_G128, False, _TRT_MOE, "read", GROUPS_OF_128, _ADD,
        _W4A8_G128),
    Row("trtllm", SM90, KV, frozenset({"bf16"}), True, _TRT_README, "reported"),
    Row("trtllm", SM90, KV, frozenset({"fp8"}), True, _TRT_MODEL, "read",
        "the FP8 KV cache holds rotary keys in FP8 too and uses the constant scale 1; calibrated "
        "KV scales are ignored"),
    Row("trtllm", SM90, KV, frozenset({"int8"}), False, "TensorRT-LLM llm_args.py KvCacheConfig",
        "read", "its KV cache is auto, fp8 or nvfp4", _KV_INSTEAD),
)  # fmt: skip

_VLLM = (
    Row("vllm", CPU, EVERYTHING, FORMATS | KV_FORMATS, False, _VLLM_CT, "unverified",
        "its CPU backend is not a target of ours", "Use --target embedded on a CPU"),
    Row("vllm", SM80 | SM90, PARTS, BF16, True, _VLLM_CT, "read"),
    Row("vllm", SM90, PARTS, FP8, True, _VLLM_MOE, "read"),
    Row("vllm", SM80, PARTS, FP8, True, "vLLM pull request 18026, issue 40851", "reported",
        "without FP8 tensor cores FP8 weights run weight-only through Marlin"),
    Row("vllm", SM90, INDEXER, BF16 | FP8, True, _VLLM_INDEXER, "read"),
    Row("vllm", SM80, INDEXER, BF16 | FP8, False, "vLLM flashmla_sparse.py", "read",
        "its sparse attention has kernels for Hopper and later only", "Use Hopper GPUs"),
    Row("vllm", SM80 | SM90, PARTS, W8A8, True, _VLLM_MOE, "read"),
    Row("vllm", SM80 | SM90, PARTS, INT8_BLOCK, False,
        "vLLM compressed_tensors.py _is_dynamic_token_w8a8", "read",
        "its W8A8 for INT8 has one scale per output channel and per token, none per tile",
        "Use the recipe int8, or --target sglang"),
    Row("vllm", SM80 | SM90, PARTS, W8A16 | INT4, True, _VLLM_MOE, "read"),
    Row("vllm", SM80 | SM90, ROUTED, INT8_ASYM, False, "vLLM marlin_utils.py", "read",
        "Marlin, its kernel for such experts, takes zero points of 4 bits only", _ADD, _INT8),
    Row("vllm", SM80, PARTS, INT8_ASYM, False, "vLLM marlin_utils.py, machete.py", "read",
        "its kernels for Ampere take zero points of 4 bits only", _ADD, _INT8),
    Row("vllm", SM90, QKV_A, INT8_ASYM, False, "vLLM machete_utils.py", "read",
        "Machete, its only kernel for 8-bit zero points, takes outputs in multiples of 128; "
        "kv_a_proj_with_mqa has 576, together with q_a_proj 2112", _ADD, _INT8),
    Row("vllm", SM90, PARTS, INT8_ASYM, True, "vLLM machete.py", "inferred",
        "zero points of 8 bits go through Machete; smoke-test the wheel"),
    Row("vllm", SM80 | SM90, PARTS, W4A8, False, "vLLM compressed_tensors.py _is_fp8_w4a8", "read",
        "its W4A8 finds the scales of activations per token while it runs and refuses static ones",
        _ADD, _SYMMETRIC),
    Row("vllm", SM80 | SM90, ROUTED, INT4_ASYM, True,
        "vLLM compressed_tensors_moe_wna16_marlin.py, pull request 44025", "read",
        "experts with zero points need a version of June 2026 or later; older ones take symmetric "
        "ones only"),
    Row("vllm", SM80 | SM90, PARTS, INT4_ASYM, True, _VLLM_CT, "read"),
    Row("vllm", SM80 | SM90, KV, frozenset({"bf16"}), True, _VLLM_CT, "read"),
    Row("vllm", SM90, KV, frozenset({"fp8"}), True,
        "vLLM FlashMLA backend, compressed_tensors.py get_quant_method", "reported",
        "static KV scales of compressed-tensors are read for its Attention only, not for MLA: the "
        "scale is 1 unless --calculate-kv-scales; what was measured is kv_latent_amax in "
        "intserve.json, and its one scale would have to cover the rotary key too"),
    Row("vllm", SM80, KV, frozenset({"fp8"}), False, "vLLM issue 52202", "reported",
        "it rejects an FP8 MLA cache below SM89", "Set kv_cache to bf16 in the recipe"),
    Row("vllm", SM80 | SM90, KV, frozenset({"int8"}), False, "vLLM issue 33480", "reported",
        "it has no INT8 KV cache for MLA", _KV_INSTEAD),
)  # fmt: skip

_SGLANG = (
    Row("sglang", CPU, EVERYTHING, FORMATS | KV_FORMATS, False, _SGL_CT, "unverified",
        "its CPU backend is not a target of ours", "Use --target embedded on a CPU"),
    Row("sglang", SM80 | SM90, PARTS, BF16, True, _SGL_CT, "read"),
    Row("sglang", SM90, PARTS, FP8, True, "SGLang fp8.py", "reported"),
    Row("sglang", SM80, PARTS, FP8, False, "SGLang issue 12887", "reported",
        "its FP8 block kernels do not compile for Ampere",
        "Use the recipe int8, or --target vllm"),
    Row("sglang", SM90, INDEXER, BF16 | FP8, True, _SGL_INDEXER, "read"),
    Row("sglang", SM80, INDEXER, BF16 | FP8, False, _SGL_INDEXER, "inferred",
        "its indexer scores tokens with DeepGEMM, which needs Hopper", "Use Hopper GPUs"),
    Row("sglang", SM80 | SM90, PARTS, W8A8, True, "SGLang w8a8_int8.py, pull request 3888", "read"),
    Row("sglang", SM80 | SM90, PARTS, INT8_BLOCK, True, "SGLang blockwise_int8.py", "read"),
    Row("sglang", SM80 | SM90, KV_B, W8A16 | INT8_ASYM | INT4 | INT4_ASYM | W4A8, False,
        "SGLang deepseek_v2.py", "unverified",
        "its absorbed MLA reads the unpacked weight of kv_b_proj", _ADD, "weights: bf16"),
    Row("sglang", SM80 | SM90, PARTS, INT8_ASYM, False,
        "SGLang marlin_utils.py, compressed_tensors_wNa16_moe.py", "read",
        "its kernels take zero points of 4 bits only", _ADD, _INT8),
    Row("sglang", SM80, PARTS, W4A8, False, "SGLang w4afp8.py", "read",
        "its W4AFP8 kernels need Hopper", _ADD, _SYMMETRIC),
    Row("sglang", SM90, ROUTED, W4A8_G128, True, "SGLang w4afp8.py", "read",
        "the largest input scale of a layer's experts, rounded to BF16, counts for all"),
    Row("sglang", SM90, ROUTED, W4A8, False, "SGLang w4afp8.py", "read",
        "its W4AFP8 experts have groups of 128 only", _ADD, _W4A8_G128),
    Row("sglang", SM90, PARTS, W4A8, False, "SGLang w4afp8.py", "read",
        "its W4AFP8 is for routed experts only", _ADD),
    Row("sglang", SM80 | SM90, PARTS, INT4_ASYM, True, "SGLang pull requests 25292, 27690",
        "reported", "zero points need a version of June 2026 or later"),
    Row("sglang", SM80 | SM90, PARTS, W8A16 | INT4, True, _SGL_CT, "read"),
    Row("sglang", SM80 | SM90, KV, frozenset({"bf16"}), True, _SGL_CT, "read"),
    Row("sglang", SM90, KV, frozenset({"fp8"}), True, "SGLang docs, attention backends",
        "reported", "an FP8 MLA cache on Hopper needs --attention-backend flashmla"),
    Row("sglang", SM80, KV, frozenset({"fp8"}), False, "SGLang docs, attention backends",
        "reported", "its Triton MLA backend for Ampere has no FP8 cache",
        "Set kv_cache to bf16 in the recipe"),
    Row("sglang", SM80 | SM90, KV, frozenset({"int8"}), False, "SGLang docs, quantized KV cache",
        "reported", "its KV cache is bf16, fp8 or fp4", _KV_INSTEAD),
)  # fmt: skip

#: transformers 5.23, `from_pretrained` with `CompressedTensorsConfig(dequantize=True)`: on any
#: device, in the model's dtype, for looking and comparing.
_TRANSFORMERS = (
    Row("transformers", CPU | SM80 | SM90, INDEXER, BF16 | FP8, False, _HF_MODEL, "inferred",
        "its DeepSeek-V3 has no sparse attention", "Use --target vllm or --target sglang"),
    Row("transformers", CPU | SM80 | SM90, ROUTED, W8A8 | INT8_BLOCK, False, _HF_CT, "read",
        "its converter of routed experts does not handle INT8 codes with quantized activations "
        "(torch.cat of no tensors)",
        "Use the recipe int8-experts or int8-weight-only, or --target vllm or embedded"),
    Row("transformers", CPU | SM80 | SM90, ROUTED, INT8_ASYM, False, _HF_CT, "read", _HF_ZEROS,
        _ADD, _INT8),
    Row("transformers", CPU | SM80 | SM90, ROUTED, INT4_ASYM, False, _HF_CT, "read", _HF_ZEROS,
        _ADD, _SYMMETRIC),
    Row("transformers", CPU | SM80 | SM90, ROUTED, W4A8, True, _HF_CT, "read",
        "activations are not quantized: it computes with the weights' values only"),
    Row("transformers", CPU | SM80 | SM90, PARTS, FORMATS, True, _HF_CT, "read"),
    Row("transformers", CPU | SM80 | SM90, KV, frozenset({"bf16"}), True, _HF_MODEL, "read"),
    Row("transformers", CPU | SM80 | SM90, KV, frozenset({"fp8", "int8"}), False, _HF_MODEL, "read",
        "it caches keys and values in the model's dtype", "Set kv_cache to bf16 in the recipe"),
)  # fmt: skip

_EMBEDDED = (
    Row("embedded", SM80 | SM90, EVERYTHING, FORMATS | KV_FORMATS, False,
        "deepseek/engine/linear.py", "read", "the embedded engine runs on the CPU so far",
        "Use --target trtllm, vllm or sglang, or --hardware cpu"),
    Row("embedded", CPU, PARTS, FORMATS, True, "deepseek/engine/linear.py", "read"),
    Row("embedded", CPU, INDEXER, BF16 | FP8, True, "deepseek/engine/packed_layout.py", "read"),
    Row("embedded", CPU, KV, frozenset({"bf16", "int8"}), True, "deepseek/engine/kv_cache.py",
        "read"),
    Row("embedded", CPU, KV, frozenset({"fp8"}), False, "deepseek/engine/kv_cache.py", "read",
        "the embedded engine has no FP8 KV cache", "Set kv_cache to bf16 or int8 in the recipe"),
)  # fmt: skip

ROWS: tuple[Row, ...] = (*_TRTLLM, *_VLLM, *_SGLANG, *_TRANSFORMERS, *_EMBEDDED)


@dataclass(frozen=True, slots=True)
class Mix:
    """Cells (part, format) that one model may combine; BF16 goes with any. A target without a Mix
    combines all formats: per linear or, where it fuses linears, per fused unit."""

    target: Target
    name: str
    gpus: frozenset[GpuGeneration]
    cells: frozenset[tuple[str, str]]


def _cells(parts: frozenset[str], formats: frozenset[str]) -> frozenset[tuple[str, str]]:
    return frozenset(product(parts, formats))


#: SGLang picks one quantization method per model and reads one global compressed-tensors format.
MIXES: tuple[Mix, ...] = (
    Mix("sglang", "FP8 blocks (fp8)", SM90, _cells(PARTS | INDEXER, FP8)),
    Mix("sglang", "W8A8 INT8 (w8a8_int8)", SM80 | SM90, _cells(PARTS, W8A8)),
    Mix("sglang", "W8A8 INT8 in tiles (blockwise_int8)", SM80 | SM90, _cells(PARTS, INT8_BLOCK)),
    Mix("sglang", "INT4 g128 experts on FP8 blocks (w4afp8)", SM90,
        _cells(PARTS - ROUTED | INDEXER, FP8) | _cells(ROUTED, G128 | W4A8_G128)),
    Mix("sglang", "weight-only INT (pack-quantized)", SM80 | SM90,
        _cells(PARTS, W8A16 | INT4 | INT4_ASYM)),
)  # fmt: skip
