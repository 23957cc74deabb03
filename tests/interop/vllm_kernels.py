"""Stand-ins for the kernels that vLLM would choose on a GPU: the same products in plain PyTorch.

Only what multiplies is replaced. vLLM chooses the scheme, makes the parameters and loads them; a
stand-in takes the parameters from the layer as a kernel would and dequantizes them once, after
loading. Inputs are quantized where the scheme quantizes integers (INT8, per token); FP8 block
linears take their inputs as they are.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.fused_moe.oracle.int8 import Int8MoeBackend
from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
from vllm.model_executor.layers.quantization.compressed_tensors import (
    compressed_tensors_moe as moe,
)
from vllm.model_executor.layers.quantization.compressed_tensors import schemes

TILE = 128


def unpack(packed: Tensor, bits: int, dim: int) -> Tensor:
    """Unsigned codes of int32 words, the lowest bits first, along `dim`."""
    words = packed.movedim(dim, -1)
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes = (words[..., None] >> shifts) & (2**bits - 1)
    return codes.flatten(-2).movedim(-1, dim)


def packed_weight(packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """[..., N, K * bits / 32] words, [..., N, G] scales and [..., N * bits / 32, G] zero points to
    [..., N, K] in the scales' type."""
    codes = unpack(packed, bits, -1)
    group = codes.shape[-1] // scale.shape[-1]
    offset = unpack(zero, bits, -2) if zero is not None else torch.full_like(scale, 2 ** (bits - 1))
    whole = offset.to(scale.dtype).repeat_interleave(group, -1)
    return (codes.to(scale.dtype) - whole) * scale.repeat_interleave(group, -1)


def tiled_weight(weight: Tensor, scale: Tensor) -> Tensor:
    """FP8 [N, K] with a scale of each 128 x 128 tile to FP32."""
    rows, columns = weight.shape
    whole = scale.repeat_interleave(TILE, 0)[:rows].repeat_interleave(TILE, 1)[:, :columns]
    return weight.float() * whole


def int8_product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Inputs [T, K] rounded to INT8 per token, times INT8 [N, K] with a scale for each row."""
    step = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
    codes = (x.float() / step).round().clamp(-128, 127)
    exact = codes.double() @ weight.double().T
    return (exact * step.double() * scale.double().flatten()).to(x.dtype)


class PackedLinear:
    """In place of Marlin and Machete."""

    def __init__(self, config: Any, **_: Any) -> None:
        self.bits = config.weight_type.size_bits

    def process_weights_after_loading(self, layer: Any) -> None:
        zero = getattr(layer, "weight_zero_point", None)
        layer.dense = packed_weight(layer.weight_packed, layer.weight_scale, zero, self.bits)

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.linear(x, layer.dense.to(x.dtype), bias)


class Fp8Linear:
    """In place of DeepGEMM and CUTLASS."""

    input_quant_key = None

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.dense = tiled_weight(layer.weight, layer.weight_scale)

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.linear(x, layer.dense.to(x.dtype), bias)


class Int8Linear:
    """In place of CUTLASS."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """The parameters are used as they are."""

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        product = int8_product(x, layer.weight, layer.weight_scale)
        return product if bias is None else product + bias


def prepare_packed_experts(method: Any, layer: Any) -> None:
    for name in ("w13", "w2"):
        zero = getattr(layer, f"{name}_weight_zero_point", None)
        packed, scale = (getattr(layer, f"{name}_weight_{part}") for part in ("packed", "scale"))
        setattr(layer, f"{name}_dense", packed_weight(packed, scale, zero, method.num_bits))


def run_experts(layer: Any, x: Tensor, weights: Tensor, ids: Tensor, multiply: Any) -> Tensor:
    """Every token's experts one after another; weights [T, k], ids [T, k]."""
    out = torch.zeros(x.shape, dtype=torch.float32)
    for expert in ids.unique().tolist():
        token, place = (ids == expert).nonzero(as_tuple=True)
        gate, up = multiply(x[token], "w13", expert).chunk(2, -1)
        product = multiply(functional.silu(gate) * up, "w2", expert)
        out.index_add_(0, token, product.float() * weights[token, place, None].float())
    return out.to(x.dtype)


class Experts:
    """What is asked of the class of a fused kernel before it is made."""

    @staticmethod
    def is_monolithic() -> bool:
        return False


def apply_packed_experts(
    _: Any, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, **__: Any
) -> Tensor:
    def multiply(inputs: Tensor, name: str, expert: int) -> Tensor:
        return functional.linear(inputs, getattr(layer, f"{name}_dense")[expert].to(inputs.dtype))

    return run_experts(layer, x, topk_weights, topk_ids, multiply)


def apply_int8_experts(
    _: Any, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, **__: Any
) -> Tensor:
    def multiply(inputs: Tensor, name: str, expert: int) -> Tensor:
        weight, scale = (getattr(layer, f"{name}_weight{part}")[expert] for part in ("", "_scale"))
        return int8_product(inputs, weight, scale)

    return run_experts(layer, x, topk_weights, topk_ids, multiply)


def latent_attention(
    attention: Any, query: Tensor, latent: Tensor, rotary: Tensor, *_: Any, **__: Any
) -> Tensor:
    """In place of FlashMLA and its paged cache: whole sequences of one length,
    `attention.sequence`, each on its own. Queries [T, H, N + R], latents [T, L], rotary keys
    [T, 1, R]; computed on latents with the absorbed weights that vLLM makes after loading."""
    absorbed = torch.einsum(
        "thn,hnl->thl", query[..., : attention.qk_nope_head_dim], attention.W_UK_T
    )
    queries = torch.cat((absorbed, query[..., attention.qk_nope_head_dim :]), -1)
    keys = torch.cat((latent, rotary.squeeze(1)), -1)[:, None]

    def sequences(part: Tensor) -> Tensor:
        return part.unflatten(0, (-1, attention.sequence)).transpose(1, 2)

    values = sequences(latent[:, None])
    out = functional.scaled_dot_product_attention(
        sequences(queries),
        sequences(keys).expand(-1, attention.num_heads, -1, -1),
        values.expand(-1, attention.num_heads, -1, -1),
        is_causal=True,
        scale=attention.scale,
    )
    latents = out.transpose(1, 2).flatten(0, 1)
    return torch.einsum("thl,hlv->thv", latents, attention.W_UV).flatten(1)


def install(stack: ExitStack) -> None:
    """Replace the kernels until the stack is closed; vLLM believes that this machine has them."""

    def replace(name: str, value: Any) -> None:
        stack.enter_context(patch(name, value))

    packed, fp8, int8 = (
        f"{schemes.__name__}.compressed_tensors_{name}"
        for name in ("wNa16", "w8a8_fp8", "w8a8_int8")
    )
    replace(f"{packed}.choose_mp_linear_kernel", lambda *_, **__: PackedLinear)
    replace(f"{fp8}.init_fp8_linear_kernel", lambda *_, **__: Fp8Linear())
    replace(f"{fp8}.expose_input_quant_key", lambda *_: None)
    replace(f"{int8}.init_int8_linear_kernel", lambda *_, **__: Int8Linear())
    wna16, w8a8 = (
        f"{moe.__name__}.compressed_tensors_moe_{name}" for name in ("wna16", "w8a8_int8")
    )
    marlin, triton = WNA16MoEBackend.MARLIN, Int8MoeBackend.TRITON
    replace(f"{wna16}.select_wna16_moe_backend", lambda *_, **__: (marlin, Experts))
    replace(f"{w8a8}.select_int8_moe_backend", lambda *_, **__: (triton, Experts))
    method = f"{wna16}.CompressedTensorsWNA16MoEMethod"
    replace(f"{method}.process_weights_after_loading", prepare_packed_experts)
    replace(f"{method}.apply", apply_packed_experts)
    method = f"{w8a8}.CompressedTensorsW8A8Int8MoEMethod"
    replace(f"{method}.process_weights_after_loading", lambda *_: None)
    replace(f"{method}.apply", apply_int8_experts)
    stack.enter_context(patch.object(MLAAttention, "forward", latent_attention))
