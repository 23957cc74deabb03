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
    HEAD,
    HEAD_FORMATS,
    INDEXER,
    KV,
    KV_FORMATS,
    PARTS,
    SM80,
    SM90,
    Row,
)

_CACHE = "deepseek/engine/kv_cache.py"
_TEST = "tests/deepseek/engine/test_linear.py"
_HEAD_TEST = "tests/deepseek/engine/test_packed.py"
_KV_TEST = "tests/deepseek/engine/test_kv_cache.py"

ROWS: tuple[Row, ...] = (
    Row("embedded", SM80 | SM90, EVERYTHING, ANY, False, "deepseek/engine/linear.py", "read",
        "the embedded engine runs on the CPU so far", ELSEWHERE),
    Row("embedded", CPU, PARTS, FORMATS, True, "deepseek/engine/linear.py", "executed",
        test=_TEST),
    Row("embedded", CPU, HEAD, HEAD_FORMATS, True, "deepseek/engine/packed_layout.py", "executed",
        test=_HEAD_TEST),
    Row("embedded", CPU, INDEXER, BF16 | FP8, True, "deepseek/engine/packed_layout.py", "executed",
        test=_TEST),
    Row("embedded", CPU, KV, KV_FORMATS, True, _CACHE, "executed", test=_KV_TEST),
)  # fmt: skip
