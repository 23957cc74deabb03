"""transformers 5.23.0: what `from_pretrained` loads with `dequantize=True`, on any device.

`build --target transformers` is the artifact, so that one list serves for both. Weights become the
model's dtype while they are loaded: for looking and comparing, not for serving.
"""

from __future__ import annotations

from cluster.matrix import (
    ADD_RULES,
    ASYM_G128,
    BF16,
    CPU,
    DENSE,
    ELSEWHERE,
    FORMATS,
    FP8,
    G128,
    INDEXER,
    INT4_ASYM,
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
    W8A8,
    W8A16,
    Row,
    Uniform,
)

TEST = "tests/interop/test_transformers.py"
_CT = "transformers integrations/compressed_tensors.py CompressedTensorsDequantize"
_MODEL = "transformers modeling_deepseek_v3.py"
#: Reasons that a build gives too.
NO_W8A8_EXPERTS = "it unpacks packed experts only: of INT8 codes with quantized activations none"
DROPPED_ZEROS = "it drops the zero points of routed experts"
_NO_INPUTS = "activations are not quantized there"
_INT8, _SYMMETRIC = "weights: int8", "weights: int4, group_size: 128"
_ALL = CPU | SM80 | SM90

ROWS: tuple[Row, ...] = (
    Row("transformers", _ALL, INDEXER, BF16 | FP8, False,
        "transformers modeling_deepseek_v32.py DeepseekV32Indexer", "inferred",
        "one scheme dequantizes all of its linears outside the experts, and nobody checked that "
        "the indexer's FP8 blocks come out right", ELSEWHERE),
    Row("transformers", _ALL, ROUTED, W8A8, False, _CT, "executed", NO_W8A8_EXPERTS, ADD_RULES,
        _INT8, test=TEST),
    Row("transformers", _ALL, ROUTED, INT8_BLOCK, False, _CT, "read", NO_W8A8_EXPERTS, ADD_RULES,
        _INT8),
    Row("transformers", _ALL, ROUTED, INT8_ASYM, False, _CT, "executed", DROPPED_ZEROS, ADD_RULES,
        _INT8, test=TEST),
    Row("transformers", _ALL, ROUTED, ASYM_G128, False, _CT, "executed", DROPPED_ZEROS, ADD_RULES,
        _SYMMETRIC, test=TEST),
    Row("transformers", _ALL, ROUTED, INT4_ASYM, False, _CT, "read", DROPPED_ZEROS, ADD_RULES,
        _SYMMETRIC),
    Row("transformers", _ALL, ROUTED, W4A8_G128, True, _CT, "executed", _NO_INPUTS, test=TEST),
    Row("transformers", _ALL, PARTS, W4A8 | W8A8 | INT8_BLOCK, True, _CT, "read", _NO_INPUTS),
    Row("transformers", _ALL, DENSE, FP8, True, _CT, "executed", test=TEST),
    Row("transformers", _ALL, V3_PARTS, W8A16 | G128, True, _CT, "executed", test=TEST),
    Row("transformers", _ALL, PARTS, FORMATS, True, _CT, "read"),
    Row("transformers", _ALL, KV, frozenset({"bf16"}), True, _MODEL, "read"),
    Row("transformers", _ALL, KV, frozenset({"fp8", "int8"}), False, _MODEL, "read",
        "it caches latents in the model's dtype", "Set kv_cache to bf16 in the recipe"),
)  # fmt: skip

ARTIFACT_ROWS = ROWS

UNIFORM: tuple[Uniform, ...] = (
    Uniform("transformers", PARTS - ROUTED | INDEXER,
            "transformers integrations/compressed_tensors.py get_dense_scheme", "read",
            "it reads all linears outside the routed experts by one scheme"),
    Uniform("transformers", ROUTED,
            "transformers integrations/compressed_tensors.py get_experts_scheme", "read",
            "it reads the routed experts of all layers by one scheme"),
)  # fmt: skip
