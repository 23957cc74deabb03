"""The paged latent cache (KV cache): one compressed latent and one rotary key per layer and token.

Under absorbed MLA all heads share this one vector, so a token costs `kv_lora_rank + rope` values
per layer, whatever the number of heads. pages.py says who owns which KV page; deepseek/kv_layout.py
lists the layouts and their bytes. What each rounds:

    bf16        latent and rotary key to BF16; the default
    fp8-tensor  both to e4m3 with the constant scale 1: values beyond 448 saturate, values below
                2^-10 become 0, and neither shows anywhere but in the result
    fp8-tiles   the latent to e4m3, each 128 channels with their own f32 scale amax / 448 (at least
                2^-126, for a tile of zeros); the rotary key to BF16
    int8        the latent to INT8 with one f32 scale per token; the rotary key stays BF16, because
                its large values, which depend on the position, would set the scale of the latent
    fp32        nothing; for exactness tests

`write` and `read` are PyTorch's kernels'; `read` returns f32, dequantized. The native kernels read
and write the same bytes in place.
Page 0 stays zero and pads short page tables (pages.py). The engine clears a page whenever the page
gets an owner, so the unused tail of a page is zeros, never a former owner's data (or, in tests, the
NaN that poisons free pages).

P pages · S tokens per page · L layers · R latent width · r rope width
B sequences · C tokens of an attention block
"""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor

from deepseek.artifact.engine_manifest import CacheFormat
from deepseek.config import ModelConfig
from deepseek.engine.pages import ZERO_PAGE
from deepseek.errors import DeployError
from deepseek.formats import FP8_MAX, dequantize_int8, quantize_tokens_int8
from deepseek.formats.scales import SMALLEST_SCALE
from deepseek.kv_layout import KV_TILE, KVLayout, layer_token_bytes

_FP8 = torch.float8_e4m3fn


def check_cache_format(name: str) -> CacheFormat:
    """Return `name` if it is a KV format; which layout that is, the target decides (`kv_layout`).

    Raises:
        DeployError: it is none.
    """
    if name not in get_args(CacheFormat):  # nested literals are flat
        raise DeployError(
            f"there is no {name} KV cache; use bf16, fp8 or int8 (kv_cache in the recipe)"
        )
    return name  # type: ignore[return-value]  # narrowed by the line above


def token_bytes(config: ModelConfig, layout: KVLayout) -> int:
    """Bytes that one token occupies over all layers."""
    per_layer = layer_token_bytes(layout, config.kv_lora_rank, config.qk_rope_head_dim)
    return per_layer * config.num_hidden_layers


def cache_bytes(config: ModelConfig, layout: KVLayout, num_pages: int, page_tokens: int) -> int:
    """Bytes of the whole cache, the zero page included."""
    return (num_pages + 1) * page_tokens * token_bytes(config, layout)


class LatentCache:
    """Storage for `num_pages` pages plus the zero page: `tensors` are [L, P, S, width] each. `int8`
    and `fp8-tiles` have latents, scales and rotary keys, the other layouts one tensor."""

    def __init__(
        self, config: ModelConfig, layout: KVLayout, num_pages: int, page_tokens: int
    ) -> None:
        self.page_tokens = page_tokens
        self.layout = layout
        shape = (config.num_hidden_layers, num_pages + 1, page_tokens)
        latent, rope = config.kv_lora_rank, config.qk_rope_head_dim
        self.latent = latent
        parts: dict[KVLayout, list[tuple[int, torch.dtype]]] = {
            "bf16": [(latent + rope, torch.bfloat16)],
            "fp32": [(latent + rope, torch.float32)],
            "int8": [(latent, torch.int8), (1, torch.float32), (rope, torch.bfloat16)],
            "fp8-tensor": [(latent + rope, _FP8)],
            "fp8-tiles": [
                (latent, _FP8),
                (math.ceil(latent / KV_TILE), torch.float32),
                (rope, torch.bfloat16),
            ],
        }
        self.tensors = [
            torch.zeros((*shape, width), dtype=dtype)  # [L, P, S, width]
            for width, dtype in parts[layout]
        ]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def clear(self, pages: list[int]) -> None:
        """Zero these pages in all layers. The caller does so whenever a page gets an owner."""
        if pages:
            assert ZERO_PAGE not in pages
            index = torch.tensor(pages)
            for tensor in self.tensors:
                _bits(tensor).index_fill_(1, index, 0)

    def poison(self, pages: list[int]) -> None:
        """Fill these pages with NaN, so that any use of them shows (tests)."""
        index = torch.tensor(pages, dtype=torch.int64)
        for tensor in self.tensors:
            if tensor.is_floating_point():
                nan = torch.tensor(float("nan")).to(tensor.dtype)
                _bits(tensor).index_fill_(1, index, _bits(nan).item())

    def write(self, layer: int, slots: Tensor, latent: Tensor, rope: Tensor) -> None:
        """Store one token per row: slots int64 [T] (page * S + offset), f32 [T, R] and [T, r]."""
        if self.layout == "int8":
            codes, scale = quantize_tokens_int8(latent)
            values = [codes, scale, rope]
        elif self.layout == "fp8-tiles":
            codes, scale = quantize_tiles(latent)
            values = [codes, scale, rope]
        elif self.layout == "fp8-tensor":
            values = [_saturate(torch.cat((latent, rope), dim=1))]
        else:
            values = [torch.cat((latent, rope), dim=1)]
        for tensor, value in zip(self.tensors, values, strict=True):
            rows = _bits(tensor[layer]).view(-1, tensor.shape[-1])
            rows.index_copy_(0, slots, _bits(value.to(tensor.dtype)))

    def read(self, layer: int, pages: Tensor) -> Tensor:
        """Page numbers int64 [B, C/S] -> f32 [B, C, R + r], latent first."""
        num_sequences, num_pages = pages.shape
        index = pages.reshape(-1)
        stored = [tensor[layer].index_select(0, index) for tensor in self.tensors]
        if self.layout == "int8":
            codes, scale, rope = stored
            values = torch.cat((dequantize_int8(codes, scale), rope.float()), dim=-1)
        elif self.layout == "fp8-tiles":
            codes, scale, rope = stored
            values = torch.cat((dequantize_tiles(codes, scale), rope.float()), dim=-1)
        else:
            values = stored[0].float()
        return values.view(num_sequences, num_pages * self.page_tokens, -1)


def quantize_tiles(latent: Tensor) -> tuple[Tensor, Tensor]:
    """f32 [T, R] -> e4m3 [T, R] and one scale amax / 448 per tile, f32 [T, ceil(R/128)].

    The last tile is shorter where 128 does not divide R. A tile with NaN or infinity gets such a
    scale, so the token's logits are not finite, instead of quietly wrong.
    """
    amax = torch.stack(
        [tile.abs().amax(dim=-1) for tile in torch.split(latent, KV_TILE, dim=-1)], dim=-1
    )
    scale = amax.div_(FP8_MAX).clamp_min_(SMALLEST_SCALE)
    return _saturate(latent / _per_channel(scale, latent.shape[-1])).to(_FP8), scale


def dequantize_tiles(codes: Tensor, scale: Tensor) -> Tensor:
    """e4m3 [..., R] and f32 [..., ceil(R/128)] -> f32 [..., R]."""
    return codes.float().mul_(_per_channel(scale, codes.shape[-1]))


def _per_channel(scale: Tensor, width: int) -> Tensor:
    return scale.repeat_interleave(KV_TILE, dim=-1)[..., :width]


def _saturate(values: Tensor) -> Tensor:
    """At +-448, the largest e4m3; NaN stays NaN, which the cast keeps."""
    return values.clamp(-FP8_MAX, FP8_MAX)


def _bits(tensor: Tensor) -> Tensor:
    """The tensor, as bytes where torch's CPU operators have no kernel for its type."""
    return tensor.view(torch.uint8) if tensor.dtype == _FP8 else tensor
