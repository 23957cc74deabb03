"""The paged latent cache (KV cache): one compressed latent and one rotary key per layer and token.

Under absorbed MLA all heads share this one vector, so a token costs `kv_lora_rank + rope` values
per layer, whatever the number of heads. pages.py says who owns which KV page. Formats, in bytes per
token and layer (R latent, r rope):

    bf16   2 (R + r)      the default
    int8   R + 4 + 2 r    latent INT8 with one f32 scale per token; the rotary key stays BF16,
                          because its large values, which depend on the position, would set the
                          scale of the latent
    fp32   4 (R + r)      for exactness tests

`read` returns f32, dequantized: BF16 matrix products are slower than FP32 ones on CPUs without AMX.
Page 0 stays zero and pads short page tables (pages.py). The engine clears a page whenever the page
gets an owner, so the unused tail of a page is zeros, never a former owner's data (or, in tests, the
NaN that poisons free pages).

P pages · S tokens per page · L layers · R latent width · r rope width
B sequences · C tokens of an attention block
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from deepseek.config import ModelConfig
from deepseek.engine.pages import ZERO_PAGE
from deepseek.errors import DeployError
from deepseek.formats import dequantize_int8, quantize_tokens_int8

CacheFormat = Literal["bf16", "int8", "fp32"]


def check_cache_format(name: str) -> CacheFormat:
    """Return `name` if it is a KV format of this engine.

    Raises:
        DeployError: the embedded engine does not implement it.
    """
    if name not in get_args(CacheFormat):
        raise DeployError(
            f"the embedded engine has no {name} KV cache; use bf16 or int8 (kv_cache in the recipe)"
        )
    return name  # type: ignore[return-value]  # narrowed by the line above


def token_bytes(config: ModelConfig, cache_format: CacheFormat) -> int:
    """Bytes that one token occupies over all layers."""
    latent, rope = config.kv_lora_rank, config.qk_rope_head_dim
    per_layer = {
        "bf16": 2 * (latent + rope),
        "int8": latent + 4 + 2 * rope,
        "fp32": 4 * (latent + rope),
    }
    return per_layer[cache_format] * config.num_hidden_layers


def cache_bytes(
    config: ModelConfig, cache_format: CacheFormat, num_pages: int, page_tokens: int
) -> int:
    """Bytes of the whole cache, the zero page included."""
    return (num_pages + 1) * page_tokens * token_bytes(config, cache_format)


class LatentCache:
    """Storage for `num_pages` pages plus the zero page."""

    def __init__(
        self, config: ModelConfig, cache_format: CacheFormat, num_pages: int, page_tokens: int
    ) -> None:
        self.page_tokens = page_tokens
        self._latent_width = config.kv_lora_rank
        self._format = cache_format
        shape = (config.num_hidden_layers, num_pages + 1, page_tokens)
        rope = config.qk_rope_head_dim

        def zeros(width: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros((*shape, width), dtype=dtype)  # [L, P, S, width]

        if cache_format == "int8":
            self._tensors = [
                zeros(self._latent_width, torch.int8),
                zeros(1, torch.float32),
                zeros(rope, torch.bfloat16),
            ]
        else:
            dtype = torch.bfloat16 if cache_format == "bf16" else torch.float32
            self._tensors = [zeros(self._latent_width + rope, dtype)]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors)

    def clear(self, pages: list[int]) -> None:
        """Zero these pages in all layers. The caller does so whenever a page gets an owner."""
        if pages:
            assert ZERO_PAGE not in pages
            index = torch.tensor(pages)
            for tensor in self._tensors:
                tensor.index_fill_(1, index, 0)

    def poison(self, pages: list[int]) -> None:
        """Fill these pages with NaN, so that any use of them shows (tests)."""
        index = torch.tensor(pages, dtype=torch.int64)
        for tensor in self._tensors:
            if tensor.is_floating_point():
                tensor.index_fill_(1, index, float("nan"))

    def write(self, layer: int, slots: Tensor, latent: Tensor, rope: Tensor) -> None:
        """Store one token per row: slots int64 [T] (page * S + offset), f32 [T, R] and [T, r]."""
        if self._format == "int8":
            codes, scale = quantize_tokens_int8(latent)
            values = [codes, scale, rope]
        else:
            values = [torch.cat((latent, rope), dim=1)]
        for tensor, value in zip(self._tensors, values, strict=True):
            rows = tensor[layer].view(-1, tensor.shape[-1])
            rows.index_copy_(0, slots, value.to(tensor.dtype))

    def read(self, layer: int, pages: Tensor) -> Tensor:
        """Page numbers int64 [B, C/S] -> f32 [B, C, R + r], latent first."""
        num_sequences, num_pages = pages.shape
        index = pages.reshape(-1)
        stored = [tensor[layer].index_select(0, index) for tensor in self._tensors]
        if self._format == "int8":
            codes, scale, rope = stored
            values = torch.cat((dequantize_int8(codes, scale), rope.float()), dim=-1)
        else:
            values = stored[0].float()
        return values.view(num_sequences, num_pages * self.page_tokens, -1)
