"""Absorbed multi-head latent attention (MLA) of one layer over the paged cache.

MLA (DeepSeek-V2, arXiv 2405.04434) caches one latent c and one rotary key k per token. With
kv_b_proj = [W_UK; W_UV] per head, the score q_nope . (W_UK c) equals (q_nope W_UK) . c, and the
output is W_UV times the weighted sum of latents. So W_UK and W_UV multiply this step's few queries
instead of the whole context, and keys and values are never computed.

The context is read in attention blocks of `BLOCK_TOKENS` tokens, with a running maximum and sum
(online softmax, Milakov and Gimelshein, arXiv 1805.02867). An attention block past a query's
position leaves the query's sums unchanged, bit for bit, so a token's result does not depend on the
other tokens of the step. This also needs FP32 products that treat a row alike in any number of rows
(`RowRule` in linear.py).

The caller owns cache and pages; this file writes and reads them, and frees nothing.

T tokens · H heads · n, r, v widths of query without position, rotary part, value · R latent ·
B sequences of a group, A of them active · C tokens of an attention block
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek.config import ModelConfig
from deepseek.engine.batch import Batch, Group
from deepseek.engine.kv_cache import LatentCache
from deepseek.engine.linear import Kernels, Projection, encode
from deepseek.engine.rope import rotate
from deepseek.engine.target_inputs import round_tiles_fp8, to_e4m3


class QueryUp:
    """The second half of the queries' projection, where the model has a query latent: its norm and
    q_b_proj, f32 [T, q rank] -> f32 [T, H * (n + r)]."""

    def __init__(self, norm: Tensor, q_b: Projection, eps: float, kernels: Kernels) -> None:
        self._norm, self._q_b, self._eps, self._kernels = norm, q_b, eps, kernels

    def forward(self, q_a: Tensor) -> Tensor:
        normed = rms_norm(q_a, self._norm, self._eps, self._kernels)
        return self._q_b.forward(encode(normed, self._q_b.encodings))


class Attention:
    """One layer's attention. `w_uk` is f32 [H, n, R], `w_uv` f32 [H, R, v].

    `qkv_a` projects the hidden state to the query latent (to the queries themselves where
    `query_up` is None), the KV latent and the rotary key, one after the other. With
    `absorbs_fp8_tiles` kv_b_proj is stored in FP8 tiles.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        *,
        qkv_a: Projection,
        query_up: QueryUp | None,
        output: Projection,
        kv_norm: Tensor,
        w_uk: Tensor,
        w_uv: Tensor,
        softmax_scale: float,
        kernels: Kernels,
        absorbs_fp8_tiles: bool,
    ) -> None:
        self._config = config
        self._layer = layer
        self._qkv_a, self._query_up, self._output = qkv_a, query_up, output
        self._kv_norm = kv_norm
        self._w_uk, self._w_uv = w_uk, w_uv
        self._softmax_scale = softmax_scale
        self._kernels = kernels
        arithmetic = kernels.arithmetic
        self._has_fp8_inputs = arithmetic.absorbed == "fp8" and absorbs_fp8_tiles

    def forward(
        self, x: Tensor, batch: Batch, angles: tuple[Tensor, Tensor], cache: LatentCache
    ) -> Tensor:
        """f32 [T, hidden], normed -> f32 [T, hidden]. Writes the step's latents into the cache."""
        config = self._config
        query_width = config.q_lora_rank or config.num_attention_heads * config.qk_head_dim
        widths = [query_width, config.kv_lora_rank, config.qk_rope_head_dim]
        joined = self._qkv_a.forward(encode(x, self._qkv_a.encodings))
        query, latent, rope_key = joined.split_with_sizes(widths, dim=-1)
        cos, sin = angles
        latent = rms_norm(latent, self._kv_norm, config.rms_norm_eps, self._kernels)
        cache.write(self._layer, batch.slots, latent, self._rotate(rope_key, cos, sin))

        if self._query_up is not None:
            query = self._query_up.forward(query)
        query = query.reshape(-1, config.num_attention_heads, config.qk_head_dim)
        widths = [config.qk_nope_head_dim, config.qk_rope_head_dim]
        q_nope, q_rope = query.split_with_sizes(widths, dim=-1)
        q_rope = self._rotate(q_rope, cos[:, None], sin[:, None])
        query = torch.cat((self._per_head(q_nope, self._w_uk), q_rope), dim=-1)
        if cache.layout == "fp8-tensor" and self._kernels.arithmetic.fp8_queries:
            query = to_e4m3(query).float()
        query *= self._softmax_scale  # [T, H, R + r]

        by_group = [self._attend(query[group.rows], group, cache) for group in batch.groups]
        latents = by_group[0] if len(by_group) == 1 else torch.cat(by_group)  # [T, H, R]
        values = self._per_head(latents, self._w_uv).flatten(1)  # [T, H * v]
        return self._output.forward(encode(values, self._output.encodings))

    def _per_head(self, x: Tensor, weight: Tensor) -> Tensor:
        """[T, H, a] times [H, a, b] head by head -> [T, H, b]."""
        if self._has_fp8_inputs:
            x = round_tiles_fp8(x, power_of_two=False)
        padded = self._kernels.rows.pad(x)
        product = torch.bmm(padded.transpose(0, 1), weight).transpose(0, 1)
        return self._kernels.round(product[: x.shape[0]])

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        kernels = self._kernels
        is_rounded = kernels.arithmetic.angles == "bfloat16"
        return kernels.round(rotate(x, cos, sin, kernels.round_angle if is_rounded else None))

    def _attend(self, query: Tensor, group: Group, cache: LatentCache) -> Tensor:
        """Scaled queries f32 [B * T, H, R + r] of one group -> weighted latents [B * T, H, R]."""
        heads, width = query.shape[1:]
        sequences, length = group.num_sequences, group.length
        kernels = self._kernels
        query = kernels.rows.pad(query.reshape(sequences, length * heads, width), dim=1)
        total = peak = weighted = query  # replaced by the first attention block
        for number, block in enumerate(group.blocks):
            active = block.num_active
            keys = cache.read(self._layer, block.pages)  # [A, C, R + r]
            scores = torch.bmm(query[:active], keys.transpose(1, 2))  # [A, rows, C]
            if block.hidden is not None:
                _mask(scores[:, : length * heads], block.hidden, heads)
            block_peak = scores.amax(dim=-1, keepdim=True)
            latents = keys[..., : self._config.kv_lora_rank]
            if number == 0:
                peak = block_peak
                weights = scores.sub_(peak).exp_()
                total = weights.sum(dim=-1, keepdim=True)
                weighted = torch.bmm(kernels.round(weights), latents)
                continue
            new_peak = torch.maximum(peak[:active], block_peak)
            weights = scores.sub_(new_peak).exp_()
            rescale = (peak[:active] - new_peak).exp_()
            total[:active] = total[:active] * rescale + weights.sum(dim=-1, keepdim=True)
            products = torch.bmm(kernels.round(weights), latents)
            weighted[:active] = weighted[:active] * rescale + products
            peak[:active] = new_peak
        result = kernels.round(weighted / total)[:, : length * heads]
        return result.reshape(sequences * length, heads, -1)


def rms_norm(x: Tensor, weight: Tensor, eps: float, kernels: Kernels) -> Tensor:
    """Scale f32 [..., K] to root mean square 1 and multiply it by the weight f32 [K]."""
    if kernels.arithmetic.elementwise == "twice":
        normed = torch.nn.functional.rms_norm(x, weight.shape, None, eps)
        return kernels.round(kernels.round_factor(normed) * weight)
    return kernels.round(torch.nn.functional.rms_norm(x, weight.shape, weight, eps))


def _mask(scores: Tensor, hidden: Tensor, heads: int) -> None:
    """Set scores [A, T * H, C] to -inf where hidden [A, T, C] is true, for all heads of a token."""
    active, length, width = hidden.shape
    view = scores.view(active, length, heads, width) if scores.is_contiguous() else None
    if view is not None:
        view.masked_fill_(hidden[:, :, None], float("-inf"))
    else:
        scores.masked_fill_(hidden.repeat_interleave(heads, dim=1), float("-inf"))
