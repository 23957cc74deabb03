"""The embedded engine: this very code, which the tests of `deepseek/engine` execute."""

from __future__ import annotations

from cluster.matrix import (
    ANY,
    BF16,
    CPU,
    ELSEWHERE,
    EVERYTHING,
    FORMATS,
    FP8,
    INDEXER,
    KV,
    PARTS,
    SM80,
    SM90,
    Row,
)

_CACHE = "deepseek/engine/kv_cache.py"
_TEST = "tests/deepseek/engine/test_formats.py"

ROWS: tuple[Row, ...] = (
    Row("embedded", SM80 | SM90, EVERYTHING, ANY, False, "deepseek/engine/linear.py", "read",
        "the embedded engine runs on the CPU so far", ELSEWHERE),
    Row("embedded", CPU, PARTS, FORMATS, True, "deepseek/engine/linear.py", "executed",
        test=_TEST),
    Row("embedded", CPU, INDEXER, BF16 | FP8, True, "deepseek/engine/packed_layout.py", "executed",
        test=_TEST),
    Row("embedded", CPU, KV, frozenset({"bf16", "int8"}), True, _CACHE, "executed", test=_TEST),
    Row("embedded", CPU, KV, frozenset({"fp8"}), False, _CACHE, "read",
        "the embedded engine has no FP8 KV cache", "Set kv_cache to bf16 or int8 in the recipe"),
)  # fmt: skip
