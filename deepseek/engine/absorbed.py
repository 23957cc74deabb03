"""The two halves of kv_b_proj, as attention multiplies them (attention.py): W_UK with queries, W_UV
with weighted latents. Their names, shapes and types, and how they are made.

In torch's layout they are dequantized: `w_uk` f32 [H, n, R] and `w_uv` f32 [H, R, v]. The native
layout has H linears each (native_layout.py), [R, n] and [v, R], whose inputs are BF16 whatever the
scheme quantizes, because neither input is a latent as kv_b_proj reads it:

- W_UV keeps the artifact's codes, scales and zero points, since its outputs and inputs are
  kv_b_proj's, in every format but those of tiles.
- W_UK is transposed, so that the scale of an output channel becomes one of an input, by which the
  query is multiplied: `w_uk.scale` is f32 [H, n]. Groups, tiles and zero points cannot move there;
  such a weight is held in BF16.

H heads · n, v widths of query without position and of value · R latent
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from deepseek.config import ModelConfig
from deepseek.engine.native_layout import from_native, native_shapes, to_native
from deepseek.engine.torch_layout import Plain, dequantize
from deepseek.inventory import LATENT_READER, TensorSpec, linears
from deepseek.recipe import Scheme

_BF16 = Scheme(weights="bf16")


@dataclass(frozen=True, slots=True)
class AbsorbedHalf:
    """One head's weight [N, K] of a half in the native layout, and its scheme there."""

    name: Literal["w_uk", "w_uv"]
    shape: tuple[int, int]
    scheme: Scheme

    @property
    def scales_inputs(self) -> bool:
        """Whether its scale is one of each input, instead of each output."""
        return self.name == "w_uk" and self.scheme.is_quantized

    def native_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of the tensors of a head, by suffix."""
        shapes = native_shapes(self.scheme, *self.shape)
        if self.scales_inputs:
            shapes["scale"] = ((self.shape[1],), torch.float32)
        return shapes


def absorbed_halves(config: ModelConfig, scheme: Scheme) -> tuple[AbsorbedHalf, AbsorbedHalf]:
    """W_UK and W_UV of a kv_b_proj of this scheme."""
    latent, key, value = config.kv_lora_rank, config.qk_nope_head_dim, config.v_head_dim
    codes = _BF16
    if scheme.weights in ("int8", "int8-asym", "int4", "int4-asym"):
        codes = Scheme(weights=scheme.weights, group_size=scheme.group_size)
    return (
        AbsorbedHalf("w_uk", (latent, key), codes if scheme.weights == "int8" else _BF16),
        AbsorbedHalf("w_uv", (value, latent), codes),
    )


def absorbed_spec(config: ModelConfig, layer: int) -> TensorSpec:
    """The kv_b_proj of one layer."""
    return next(spec for spec in linears(config, layer) if spec.role == LATENT_READER)


def absorbed_name(layer: int, half: str) -> str:
    """Name of "w_uk" or "w_uv" of a layer; in the native layout its tensors' names begin so."""
    return f"model.layers.{layer}.self_attn.{half}"


def absorbed_shapes(
    config: ModelConfig, layer: int, scheme: Scheme, layout: Literal["native", "torch"]
) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of the tensors of a layer whose kv_b_proj has this scheme."""
    heads = config.num_attention_heads
    for half in absorbed_halves(config, scheme):
        name = absorbed_name(layer, half.name)
        if layout == "torch":
            yield name, (heads, *reversed(half.shape)), torch.float32
            continue
        for suffix, (shape, dtype) in half.native_shapes().items():
            yield f"{name}.{suffix}", (heads, *shape), dtype


def pack_absorbed(
    config: ModelConfig,
    layer: int,
    scheme: Scheme,
    plain: Mapping[str, Tensor],
    layout: Literal["native", "torch"],
) -> dict[str, Tensor]:
    """kv_b_proj as a plain weight (torch_layout.py) [H (n + v), R] -> the halves, by full name."""
    heads, key = config.num_attention_heads, config.qk_nope_head_dim
    by_head = {suffix: t.view(heads, -1, *t.shape[1:]) for suffix, t in plain.items()}
    packed: dict[str, Tensor] = {}
    for half in absorbed_halves(config, scheme):
        part = slice(key) if half.name == "w_uk" else slice(key, None)
        heads_of_half = [
            {suffix: t[head, part] for suffix, t in by_head.items()} for head in range(heads)
        ]
        name = absorbed_name(layer, half.name)
        if layout == "torch":
            packed[name] = _stacked_values(half, (dequantize(scheme, h) for h in heads_of_half))
            continue
        native = [_to_native(half, scheme, head) for head in heads_of_half]
        for suffix in native[0]:
            packed[f"{name}.{suffix}"] = torch.stack([head[suffix] for head in native])
    return packed


def absorbed_to_torch(
    config: ModelConfig, layer: int, scheme: Scheme, take: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """The halves in torch's layout, by full name, of those in the native one, which `take` gives
    by name."""
    converted = {}
    for half in absorbed_halves(config, scheme):
        name = absorbed_name(layer, half.name)
        tensors = {suffix: take(f"{name}.{suffix}") for suffix in half.native_shapes()}
        heads = (
            _from_native(half, {suffix: t[head] for suffix, t in tensors.items()})
            for head in range(config.num_attention_heads)
        )
        converted[name] = _stacked_values(half, heads)
    return converted


def _to_native(half: AbsorbedHalf, scheme: Scheme, plain: Plain) -> dict[str, Tensor]:
    """One head's rows of kv_b_proj -> the tensors of its half, by suffix."""
    if not half.scheme.is_quantized:
        values = dequantize(scheme, plain)
        return to_native(half.scheme, {"weight": values.T if half.name == "w_uk" else values})
    if not half.scales_inputs:
        return to_native(half.scheme, plain)
    ones = torch.ones(half.shape[0])
    native = to_native(half.scheme, {"codes": plain["codes"].T, "scale": ones})
    return native | {"scale": plain["scale"]}


def _from_native(half: AbsorbedHalf, native: Plain) -> Tensor:
    """The inverse: one head's rows of kv_b_proj, f32 [n, R] or [v, R]."""
    if not half.scales_inputs:
        values = dequantize(half.scheme, from_native(half.scheme, native, half.shape))
        return values.T if half.name == "w_uk" else values
    plain = from_native(half.scheme, native, half.shape)
    return dequantize(half.scheme, {"codes": plain["codes"].T, "scale": native["scale"]})


def _stacked_values(half: AbsorbedHalf, heads: Iterable[Tensor]) -> Tensor:
    """One head's rows of kv_b_proj each -> the half in torch's layout."""
    return torch.stack([values if half.name == "w_uk" else values.T for values in heads])
