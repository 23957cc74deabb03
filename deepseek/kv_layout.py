"""How each target lays the KV cache out: bytes per token and layer, from shapes alone.

A recipe names a KV format (`bf16`, `fp8`, `int8`); a target decides what that is in memory, and so
what it costs and how much it rounds. Under absorbed MLA a token has one latent of width R and one
rotary key of width r per layer:

    layout      bytes              V3     stored as
    bf16        2 (R + r)          1152   latent and rotary key BF16
    fp8-tensor  R + r              576    both e4m3, one scale for everything, the constant 1
    fp8-tiles   R + 4 R/128 + 2 r  656    latent e4m3 with one f32 scale per token and tile of 128,
                                          rotary key BF16 (vLLM's `fp8_ds_mla`, which it has for
                                          DeepSeek-V3.2 only)
    int8        R + 4 + 2 r        644    latent INT8 with one f32 scale per token, rotary key BF16
    fp32        4 (R + r)          2304   both FP32, for exactness tests

vLLM 0.32: `fp8_ds_mla` belongs to its sparse attention (`FlashMLASparseBackend`). For a dense model
on Hopper `--kv-cache-dtype fp8` is `FlashMLABackend`'s (FlashAttention, which comes first, has no
FP8): e4m3 over latent and rotary key with the scale `_k_scale`, which is 1. No dense backend takes
`fp8_ds_mla` (`validate_configuration`: executed where it can be imported on a CPU, else read).

This file imports no torch: the planner uses it too.
"""

from __future__ import annotations

from typing import Literal

from deepseek.errors import DeployError

KVLayout = Literal["bf16", "fp8-tensor", "fp8-tiles", "int8", "fp32"]
#: Values that share one scale in `fp8-tiles`.
KV_TILE = 128

_PLAIN: dict[str, KVLayout] = {"bf16": "bf16", "int8": "int8", "fp32": "fp32"}
#: What `fp8` is, by target.
_FP8: dict[str, KVLayout] = {
    "trtllm": "fp8-tensor",
    "sglang": "fp8-tensor",
    "vllm": "fp8-tensor",
    "embedded": "fp8-tiles",
}
#: What `fp8` is for a model with an indexer, where that differs.
_FP8_SPARSE: dict[str, KVLayout] = {"vllm": "fp8-tiles"}


def kv_layout(target: str, kv_cache: str, *, sparse: bool = False) -> KVLayout:
    """The layout of a KV format on a target; `sparse` is a model with an indexer (DeepSeek-V3.2).

    Raises:
        DeployError: the target has no such KV format.
    """
    fp8 = _FP8 | _FP8_SPARSE if sparse else _FP8
    layout = fp8.get(target) if kv_cache == "fp8" else _PLAIN.get(kv_cache)
    if layout is None:
        raise DeployError(f"{target} has no {kv_cache} KV cache; use bf16")
    return layout


def layer_token_bytes(layout: KVLayout, latent: int, rope: int) -> int:
    """Bytes of one token in one layer, for widths R and r."""
    match layout:
        case "bf16":
            return 2 * (latent + rope)
        case "fp8-tensor":
            return latent + rope
        case "fp8-tiles":
            return latent + 4 * -(-latent // KV_TILE) + 2 * rope
        case "int8":
            return latent + 4 + 2 * rope
        case "fp32":
            return 4 * (latent + rope)
