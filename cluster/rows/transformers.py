"""transformers 5.23.0: what `from_pretrained` loads with `dequantize=True`, on any device.

`build --target transformers` rewrites what the artifact has in a form that its loader cannot read:
the same values in another form, or BF16 where there is none. Weights become the model's dtype while
they are loaded: for looking and comparing, not for serving.
"""

from __future__ import annotations

from cluster.matrix import (
    ASYM_G128,
    BF16,
    CPU,
    DENSE,
    ELSEWHERE,
    FORMATS,
    FP8,
    G128,
    HEAD,
    INDEXER,
    INT4,
    INT4_ASYM,
    INT4_ASYM_A8,
    INT8_ASYM,
    INT8_BLOCK,
    KV,
    PARTS,
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
    Uniform,
)
from deepseek.hf.loadable import (
    AS_IS_FP8_EXPERTS,
    AS_IS_MIXED_EXPERTS,
    AS_IS_MIXED_LINEARS,
    AS_IS_W8A8,
    AS_IS_ZERO_POINTS,
    NO_FP8_INPUTS,
    NO_INDEXER,
    NO_INT8_INPUTS,
    NO_KV,
)

TEST = "tests/interop/test_transformers.py"
_CT = "transformers integrations/compressed_tensors.py CompressedTensorsDequantize"
_FP8 = "transformers integrations/finegrained_fp8.py"
_MODEL = "transformers modeling_deepseek_v3.py"
_BUILD = "Build it with `build --target transformers`"
_ALL = CPU | SM80 | SM90

_OTHERS = (
    Row("transformers", _ALL, INDEXER, BF16 | FP8, False,
        "transformers modeling_deepseek_v32.py DeepseekV32Indexer", "inferred", NO_INDEXER,
        ELSEWHERE),
    Row("transformers", _ALL, KV, frozenset({"bf16"}), True, _MODEL, "read"),
    Row("transformers", _ALL, KV, frozenset({"fp8", "int8"}), False, _MODEL, "read", NO_KV,
        "Set kv_cache to bf16 in the recipe"),
)  # fmt: skip

ROWS: tuple[Row, ...] = (
    *_OTHERS,
    Row("transformers", _ALL, PARTS | HEAD, W4A8_INT8, True, _CT, "read", NO_INT8_INPUTS),
    Row("transformers", _ALL, HEAD, W8A8, True, _CT, "read", NO_INT8_INPUTS),
    Row("transformers", _ALL, HEAD, W8A16 | INT4, True, _CT, "read"),
    Row("transformers", _ALL, V3_PARTS, W8A8 | INT8_BLOCK, True, _CT, "executed", NO_INT8_INPUTS,
        test=TEST),
    Row("transformers", _ALL, PARTS, W8A8 | INT8_BLOCK, True, _CT, "read", NO_INT8_INPUTS),
    Row("transformers", _ALL, ROUTED, W4A8_G128, True, _CT, "executed", NO_FP8_INPUTS, test=TEST),
    Row("transformers", _ALL, PARTS, W4A8, True, _CT, "read", NO_FP8_INPUTS),
    Row("transformers", _ALL, DENSE, FP8, True, f"{_CT}; {_FP8}", "executed", test=TEST),
    Row("transformers", _ALL, V3_PARTS, W8A16 | INT8_ASYM | G128 | ASYM_G128, True, _CT,
        "executed", test=TEST),
    Row("transformers", _ALL, PARTS, FORMATS, True, f"{_CT}; {_FP8}", "read"),
)  # fmt: skip

ARTIFACT_ROWS: tuple[Row, ...] = (
    *_OTHERS,
    Row("transformers", _ALL, ROUTED, INT4_ASYM_A8, False, _CT, "read", AS_IS_ZERO_POINTS, _BUILD),
    Row("transformers", _ALL, PARTS | HEAD, W4A8_INT8, True, _CT, "read", NO_INT8_INPUTS),
    Row("transformers", _ALL, HEAD, W8A8, True, _CT, "read", NO_INT8_INPUTS),
    Row("transformers", _ALL, HEAD, W8A16 | INT4, True, _CT, "read"),
    Row("transformers", _ALL, ROUTED, W8A8 | INT8_BLOCK, False, _CT, "executed", AS_IS_W8A8, _BUILD,
        test=TEST),
    Row("transformers", _ALL, ROUTED, INT8_ASYM | ASYM_G128, False, _CT, "executed",
        AS_IS_ZERO_POINTS, _BUILD, test=TEST),
    Row("transformers", _ALL, ROUTED, INT4_ASYM, False, _CT, "read", AS_IS_ZERO_POINTS, _BUILD),
    Row("transformers", _ALL, ROUTED, FP8, False, _CT, "read", AS_IS_FP8_EXPERTS, _BUILD),
    Row("transformers", _ALL, ROUTED, W4A8_G128, True, _CT, "executed", NO_FP8_INPUTS, test=TEST,
        drops=("input_scale",)),
    Row("transformers", _ALL, PARTS, W8A8 | INT8_BLOCK, True, _CT, "read", NO_INT8_INPUTS),
    Row("transformers", _ALL, PARTS, W4A8, True, _CT, "read", NO_FP8_INPUTS),
    Row("transformers", _ALL, DENSE, FP8, True, _CT, "executed", test=TEST),
    Row("transformers", _ALL, V3_PARTS, W8A16 | G128, True, _CT, "executed", test=TEST),
    Row("transformers", _ALL, PARTS, FORMATS, True, _CT, "read"),
)  # fmt: skip

#: Of the artifact as it is.
UNIFORM: tuple[Uniform, ...] = (
    Uniform("transformers", PARTS - ROUTED | INDEXER | HEAD,
            "transformers integrations/compressed_tensors.py get_dense_scheme", "read",
            AS_IS_MIXED_LINEARS),
    Uniform("transformers", ROUTED,
            "transformers integrations/compressed_tensors.py get_experts_scheme", "read",
            AS_IS_MIXED_EXPERTS),
)  # fmt: skip
