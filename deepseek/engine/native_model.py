"""The model on the native kernels: one call of the extension `deepseek._native` per step.

Python keeps the tensors, which the extension reads in place (huge pages, the mapped engine file, or
memory), the cache, scheduling and sampling. `_pointer` is the one place where a tensor becomes an
address; it refuses what the extension would misread. What the extension computes is model.py's
forward pass, with these differences, all within each format's tolerance:

- unquantized weights and the inputs of every linear that takes no INT8 are BF16; sums are FP32;
- zero points of INT4 are exact integers, where torch's operator has their product with the scale in
  BF16;
- attention rounds queries and weights as deepseek/native/attention.h says.

Results of a token depend on its own sequence alone, whatever else the step computes, and on no
number of threads: no kernel has another order of additions for another number of rows.

T tokens · R rows · D hidden
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

import deepseek._native as _native
from deepseek.config import ModelConfig
from deepseek.engine.absorbed import AbsorbedHalf, absorbed_halves, absorbed_name, absorbed_spec
from deepseek.engine.batch import Batch
from deepseek.engine.kv_cache import LatentCache
from deepseek.engine.native_attention import NativeCache
from deepseek.engine.native_layout import native_shapes
from deepseek.engine.packed_layout import PackedLinear, head_linear, projections
from deepseek.engine.rope import amplitude, inverse_frequencies, softmax_scale
from deepseek.engine.weights import Weights
from deepseek.recipe import Scheme


class NativeModel:
    """The whole model, from tensors in the layout "native". `allocated_bytes` are the bytes of its
    tensors by inventory group.

    Raises on construction:
        ArtifactError: a tensor is missing, left over, or of another shape or type.
    """

    def __init__(
        self,
        config: ModelConfig,
        schemes: Mapping[str, Scheme],
        tensors: Mapping[str, Tensor],
    ) -> None:
        self.config = config
        self._tensors: list[Tensor] = []  # what the extension points to
        self._cache: tuple[LatentCache, NativeCache] | None = None  # of the last step
        self._weights = Weights(config, schemes, tensors, "native")
        self._frequencies = inverse_frequencies(config)
        self._model = _native.Model(
            hidden=config.hidden_size,
            vocabulary=config.vocab_size,
            heads=config.num_attention_heads,
            query_rank=config.q_lora_rank or 0,
            latent=config.kv_lora_rank,
            nope=config.qk_nope_head_dim,
            rope=config.qk_rope_head_dim,
            value=config.v_head_dim,
            experts=config.n_routed_experts,
            chosen=config.num_experts_per_tok,
            groups=config.n_group,
            chosen_groups=config.topk_group,
            normalizes=config.norm_topk_prob,
            routed_scale=config.routed_scaling_factor,
            eps=config.rms_norm_eps,
            softmax_scale=softmax_scale(config),
            amplitude=amplitude(config.yarn),
            frequencies=_pointer(self._frequencies, torch.float32, config.qk_rope_head_dim // 2),
        )
        embedding = self._weights.take("model.embed_tokens.weight")
        self._model.set_embedding(self._keep(embedding), embedding.dtype == torch.bfloat16)
        for layer in range(config.num_hidden_layers):
            self._add_layer(layer, schemes)
        self._model.set_norm(self._plain("model.norm.weight"))
        self._model.set_head(self._linear(head_linear(config, schemes)))
        self._weights.finish()
        self.allocated_bytes = dict(self._weights.num_bytes)

    def forward(self, batch: Batch, cache: LatentCache) -> Tensor:
        """Run the step and write its latents into the cache -> final hidden states, normed,
        f32 [T, D]."""
        sizes, pages = batch.tables
        num_tokens, num_spans = len(batch.token_ids), len(batch.spans)
        hidden = torch.empty(num_tokens, self.config.hidden_size)
        self._model.forward(
            tokens=_pointer(batch.token_ids, torch.int64, num_tokens),
            spans=_pointer(sizes, torch.int32, num_spans, 2),
            pages=_pointer(pages, torch.int32, num_spans, pages.shape[1]),
            num_tokens=num_tokens,
            num_spans=num_spans,
            table_width=pages.shape[1],
            cache=self._view_of(cache).view,
            hidden=_pointer(hidden, torch.float32, num_tokens, self.config.hidden_size),
            threads=torch.get_num_threads(),
        )
        return hidden

    def _view_of(self, cache: LatentCache) -> NativeCache:
        if self._cache is None or self._cache[0] is not cache:
            self._cache = cache, NativeCache(cache)
        return self._cache[1]

    def logits(self, hidden: Tensor) -> Tensor:
        """Final hidden states f32 [R, D] -> logits f32 [R, vocabulary]."""
        config = self.config
        rows = hidden.contiguous()
        logits = torch.empty(len(rows), config.vocab_size)
        if len(rows):
            self._model.logits(
                hidden=_pointer(rows, torch.float32, len(rows), config.hidden_size),
                rows=len(rows),
                logits=_pointer(logits, torch.float32, len(rows), config.vocab_size),
                threads=torch.get_num_threads(),
            )
        return logits

    @property
    def seconds(self) -> dict[str, float]:
        """What the parts of all steps so far have taken, as deepseek/native/model.h names them."""
        return self._model.seconds

    def _add_layer(self, layer: int, schemes: Mapping[str, Scheme]) -> None:
        config, prefix = self.config, f"model.layers.{layer}"
        by_name = projections(config, layer, schemes)

        def project(name: str) -> list[object]:
            return [self._linear(linear) for linear in by_name[f"{prefix}.{name}"]]

        def mlp(name: str) -> tuple[list[object], list[object]]:
            return project(f"{name}.gate_up_proj"), project(f"{name}.down_proj")

        def plain(name: str) -> int:
            return self._plain(f"{prefix}.{name}")

        kv_b = schemes[absorbed_spec(config, layer).module]
        (w_uk, key_scale), (w_uv, _) = (
            self._absorbed(layer, half) for half in absorbed_halves(config, kv_b)
        )
        has_latent = config.q_lora_rank is not None
        self._model.add_layer(
            input_norm=plain("input_layernorm.weight"),
            output_norm=plain("post_attention_layernorm.weight"),
            query_norm=plain("self_attn.q_a_layernorm.weight") if has_latent else 0,
            latent_norm=plain("self_attn.kv_a_layernorm.weight"),
            qkv_a=project("self_attn.qkv_a_proj" if has_latent else "self_attn.q_proj"),
            q_b=project("self_attn.q_b_proj") if has_latent else [],
            w_uk=w_uk,
            w_uv=w_uv,
            key_scale=key_scale,
            output=project("self_attn.o_proj"),
            router=plain("mlp.gate.weight") if config.is_moe(layer) else 0,
            bias=plain("mlp.gate.e_score_correction_bias") if config.is_moe(layer) else 0,
            experts=[mlp(f"mlp.experts.{e}") for e in range(config.n_routed_experts)]
            if config.is_moe(layer)
            else [],
            mlp=mlp("mlp.shared_experts" if config.is_moe(layer) else "mlp"),
        )

    def _absorbed(self, layer: int, half: AbsorbedHalf) -> tuple[list[object], int]:
        """A linear for each head, and the address of the scales of all heads' inputs, or 0."""
        name = absorbed_name(layer, half.name)
        whole = {suffix: self._weights.take(f"{name}.{suffix}") for suffix in half.native_shapes()}
        input_scale = 0
        if half.scales_inputs:
            input_scale = self._keep(whole.pop("scale"))
            shape, _ = native_shapes(half.scheme, *half.shape)["scale"]
            whole["scale"] = torch.ones(shape).expand(self.config.num_attention_heads, *shape)
        heads = [
            self._make_linear(
                half.scheme, half.shape, {suffix: t[h] for suffix, t in whole.items()}
            )
            for h in range(self.config.num_attention_heads)
        ]
        return heads, input_scale

    def _linear(self, linear: PackedLinear) -> object:
        return self._make_linear(linear.scheme, linear.shape, self._weights.take_linear(linear))

    def _make_linear(
        self, scheme: Scheme, shape: tuple[int, int], tensors: Mapping[str, Tensor]
    ) -> object:
        """A linear of the extension; shapes and types of its tensors were checked by `Weights`."""
        pointers = {suffix: self._keep(tensor) for suffix, tensor in tensors.items()}
        input_scale = tensors.get("input_scale")
        weight = next(pointers[name] for name in ("weight", "codes", "packed") if name in pointers)
        return _native.Linear(
            format=scheme.label,
            outputs=shape[0],
            inputs=shape[1],
            group=scheme.group_size or 0,
            weight=weight,
            scale=pointers.get("scale", 0),
            zero_point=pointers.get("zero_point", 0),
            input_scale=math.nan if input_scale is None else input_scale.item(),
        )

    def _plain(self, name: str) -> int:
        return self._keep(self._weights.take(name))

    def _keep(self, tensor: Tensor) -> int:
        """The address of a tensor of the engine, which lives as long as this model."""
        self._tensors.append(tensor)
        return _pointer(tensor, tensor.dtype, *tensor.shape)


def _pointer(tensor: Tensor, dtype: torch.dtype, *shape: int) -> int:
    """The address of a tensor's first element, for the extension to read or write."""
    given = (tensor.dtype, tuple(tensor.shape), tensor.device.type)
    assert given == (dtype, shape, "cpu"), (given, dtype, shape)
    assert tensor.is_contiguous(), tensor.stride()
    return tensor.data_ptr()
