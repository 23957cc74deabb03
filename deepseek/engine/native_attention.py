"""The native attention (deepseek/native/attention.h) over a `LatentCache`: its arguments, checked.

Here is the one place where tensors become addresses. The kernel reads and writes the cache's own
memory; the caller keeps the cache, and whoever calls gives each span the pages of all its tokens.

T tokens · H heads · R latent · r rope
"""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch
from torch import Tensor

import deepseek._native as _native
from deepseek.engine.batch import Span
from deepseek.engine.kv_cache import LatentCache

#: R + r of the kernels; their buffers of one row have this size.
MAX_WIDTH = 2048


def takes_widths(latent: int, rope: int) -> bool:
    """Whether the kernels take these widths: rows are read as dwords of up to 4 values."""
    return latent > 0 and latent % 4 == 0 and rope % 2 == 0 and latent + rope <= MAX_WIDTH


class NativeCache:
    """A cache as the kernels see it."""

    def __init__(self, cache: LatentCache) -> None:
        tensors = cache.tensors
        layers, pages, page_tokens, _ = tensors[0].shape
        assert all(t.is_contiguous() and t.device.type == "cpu" for t in tensors)
        self.num_layers, self.num_pages, self.page_tokens = layers, pages, page_tokens
        if len(tensors) == 3:
            values, scales, keys = tensors
            self.latent, self.rope = values.shape[-1], keys.shape[-1]
            addresses = values.data_ptr(), scales.data_ptr(), keys.data_ptr()
        else:
            self.latent, self.rope = cache.latent, tensors[0].shape[-1] - cache.latent
            addresses = tensors[0].data_ptr(), 0, 0
        assert takes_widths(self.latent, self.rope), (self.latent, self.rope)
        self._tensors = tensors  # kept alive with the view
        self.view = _native.CacheView(
            cache.layout, pages, page_tokens, self.latent, self.rope, *addresses
        )


class SpanTable:
    """Where the tokens of one step are, for all layers: rows and pages of each span."""

    def __init__(self, cache: NativeCache, spans: Items[Span]) -> None:
        longest = max(len(span.pages) for span in spans)
        self.rows = torch.zeros(len(spans), 3, dtype=torch.int64)  # first row, count, start
        self.pages = torch.zeros(len(spans), longest, dtype=torch.int32)
        first = 0
        for number, span in enumerate(spans):
            count, pages = len(span.token_ids), torch.tensor(span.pages, dtype=torch.int32)
            assert len(pages) * cache.page_tokens >= span.stop, "a token has no page"
            assert int(pages.min()) > 0
            assert int(pages.max()) < cache.num_pages
            self.rows[number] = torch.tensor([first, count, span.start])
            self.pages[number, : len(pages)] = pages
            first += count
        self.num_tokens = first


def attend(
    cache: NativeCache,
    layer: int,
    query: Tensor,
    latent: Tensor,
    rope_key: Tensor,
    spans: SpanTable,
    num_threads: int,
) -> Tensor:
    """Store the tokens of `spans` and attend: scaled queries f32 [T, H, R + r], normed latents
    f32 [T, R] and rotated keys f32 [T, r], rows in the order of the spans -> weighted latents
    f32 [T, H, R]."""
    tokens, heads = spans.num_tokens, query.shape[1]
    _check(query, (tokens, heads, cache.latent + cache.rope))
    _check(latent, (tokens, cache.latent))
    _check(rope_key, (tokens, cache.rope))
    assert 0 <= layer < cache.num_layers
    output = torch.empty(tokens, heads, cache.latent)
    _native.attention(
        cache.view,
        layer,
        heads,
        spans.rows.data_ptr(),
        spans.pages.data_ptr(),
        len(spans.rows),
        spans.pages.shape[1],
        query.data_ptr(),
        latent.data_ptr(),
        rope_key.data_ptr(),
        output.data_ptr(),
        num_threads,
    )
    return output


def _check(tensor: Tensor, shape: tuple[int, ...]) -> None:
    assert tuple(tensor.shape) == shape, (tuple(tensor.shape), shape)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"
