"""DeepSeek-V3's forward pass over one step's tokens with PyTorch's kernels: the slow reference,
the fallback, and what emulates targets. native.py is the fast one.

Residual stream, norms, attention and router are FP32; each linear computes in its own format
(linear.py). In a target's arithmetic (arithmetic.py) all of these are rounded as there. The tokens
of all sequences run together; only attention tells the sequences apart. The step loop (engine.py)
calls it. It keeps no state between steps; the caller owns the cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

from deepseek.config import ModelConfig
from deepseek.engine.absorbed import absorbed_name, absorbed_spec
from deepseek.engine.attention import Attention, QueryUp, rms_norm
from deepseek.engine.batch import Batch
from deepseek.engine.emulated import round_absorbed
from deepseek.engine.kv_cache import LatentCache
from deepseek.engine.linear import Kernels, Linear, Projection, encode, make_linear
from deepseek.engine.moe import GatedMlp, MixtureOfExperts, Router
from deepseek.engine.packed_layout import (
    PackedLinear,
    head_linear,
    projections,
)
from deepseek.engine.rope import Rope
from deepseek.engine.weights import Weights
from deepseek.recipe import Scheme


class Layer:
    """One decoder layer: attention, then MLP or experts, each around the residual stream."""

    def __init__(
        self, attention: Attention, mlp: GatedMlp | MixtureOfExperts, norms: tuple[Tensor, Tensor]
    ) -> None:
        self.attention, self.mlp, self.norms = attention, mlp, norms


class Model:
    """The whole model, from tensors in the layout "torch". `allocated_bytes` are the bytes of its
    tensors by inventory group.

    Raises on construction:
        ArtifactError: a tensor is missing, left over, or of another shape or type.
    """

    def __init__(
        self,
        config: ModelConfig,
        schemes: Mapping[str, Scheme],
        tensors: Mapping[str, Tensor],
        kernels: Kernels,
    ) -> None:
        self.config = config
        self._kernels = kernels
        self._rope = Rope(config)
        weights = Weights(config, schemes, tensors, "torch")
        self._embedding = weights.take("model.embed_tokens.weight")
        self._layers = [
            _Builder(config, layer, schemes, weights, kernels).build(self._rope)
            for layer in range(config.num_hidden_layers)
        ]
        self._norm = kernels.round(weights.take("model.norm.weight"))
        head = head_linear(config, schemes)
        self._head = Projection([make_linear(head.scheme, weights.take_linear(head), kernels)])
        weights.finish()
        self.allocated_bytes = dict(weights.num_bytes)

    def forward(self, batch: Batch, cache: LatentCache) -> Tensor:
        """Run the step and write its latents into the cache -> final hidden states, normed,
        f32 [T, hidden]."""
        eps, kernels = self.config.rms_norm_eps, self._kernels
        hidden = kernels.round(self._embedding.index_select(0, batch.token_ids).float())
        cos, sin = self._rope.angles(batch.positions)
        angles = kernels.round_angle(cos), kernels.round_angle(sin)
        total = hidden  # what the next norm reads
        for layer in self._layers:
            x = rms_norm(total, layer.norms[0], eps, kernels)
            total, hidden = self._add(hidden, layer.attention.forward(x, batch, angles, cache))
            x = rms_norm(total, layer.norms[1], eps, kernels)
            if isinstance(layer.mlp, MixtureOfExperts):
                update = layer.mlp.forward(x)
            else:
                update = layer.mlp.forward(encode(x, layer.mlp.encodings))
            total, hidden = self._add(hidden, update)
        return rms_norm(total, self._norm, eps, kernels)

    def _add(self, hidden: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        """Add to the residual stream -> the sum as the next norm reads it, and as it is stored."""
        total = hidden + update
        stored = self._kernels.round(total)
        is_exact = self._kernels.arithmetic.norm_of_sum == "float32"
        return (total if is_exact else stored), stored

    def logits(self, hidden: Tensor) -> Tensor:
        """Final hidden states f32 [R, hidden] -> logits f32 [R, vocabulary]."""
        return self._head.forward(encode(hidden, self._head.encodings))


class _Builder:
    """Takes one layer's tensors and builds the layer."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        schemes: Mapping[str, Scheme],
        weights: Weights,
        kernels: Kernels,
    ) -> None:
        self._config, self._layer = config, layer
        self._weights, self._kernels, self._schemes = weights, kernels, schemes
        self._projections = projections(config, layer, schemes)
        self._prefix = f"model.layers.{layer}"

    def build(self, rope: Rope) -> Layer:
        norms = (
            self._take("input_layernorm.weight"),
            self._take("post_attention_layernorm.weight"),
        )
        has_latent = self._config.q_lora_rank is not None
        kv_b = self._schemes[absorbed_spec(self._config, self._layer).module]
        w_uk, w_uv = round_absorbed(
            self._weights.take(absorbed_name(self._layer, "w_uk")),
            self._weights.take(absorbed_name(self._layer, "w_uv")),
            kv_b,
            self._kernels,
        )
        attention = Attention(
            self._config,
            self._layer,
            qkv_a=self._project("self_attn.qkv_a_proj" if has_latent else "self_attn.q_proj"),
            query_up=self._query_up() if has_latent else None,
            output=self._project("self_attn.o_proj"),
            kv_norm=self._take("self_attn.kv_a_layernorm.weight"),
            w_uk=w_uk,
            w_uv=w_uv,
            softmax_scale=rope.softmax_scale,
            kernels=self._kernels,
            absorbs_fp8_tiles=kv_b.weights == "fp8-block",
        )
        return Layer(attention, self._feed_forward(), norms)

    def _query_up(self) -> QueryUp:
        norm = self._take("self_attn.q_a_layernorm.weight")
        q_b, eps = self._project("self_attn.q_b_proj"), self._config.rms_norm_eps
        return QueryUp(norm, q_b, eps, self._kernels)

    def _feed_forward(self) -> GatedMlp | MixtureOfExperts:
        if not self._config.is_moe(self._layer):
            return self._mlp("mlp")
        router = Router(
            self._config,
            self._take("mlp.gate.weight"),
            self._weights.take(f"{self._prefix}.mlp.gate.e_score_correction_bias"),  # FP32
            self._kernels,
        )
        experts = [self._mlp(f"mlp.experts.{e}") for e in range(self._config.n_routed_experts)]
        return MixtureOfExperts(router, experts, self._mlp("mlp.shared_experts"), self._kernels)

    def _mlp(self, name: str) -> GatedMlp:
        gate_up, down = self._project(f"{name}.gate_up_proj"), self._project(f"{name}.down_proj")
        return GatedMlp(gate_up, down, self._kernels)

    def _project(self, name: str) -> Projection:
        return Projection(self._linears(self._projections[f"{self._prefix}.{name}"]))

    def _linears(self, packed: Iterable[PackedLinear]) -> list[Linear]:
        return [
            make_linear(linear.scheme, self._weights.take_linear(linear), self._kernels)
            for linear in packed
        ]

    def _take(self, name: str) -> Tensor:
        """A parameter that is no linear, in the dtype of the arithmetic."""
        return self._kernels.round(self._weights.take(f"{self._prefix}.{name}"))
