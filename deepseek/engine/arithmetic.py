"""The arithmetic in which the engine executes a model: its own, or an emulation of a target's.

The embedded engine computes in FP32 between its kernels. A GPU runtime does not: its tensors are
BF16, its FP8 linears quantize their inputs on the fly, its W4A8 experts multiply by a rounded
reciprocal. `Arithmetic` states these differences as data. model.py, attention.py and moe.py round
where a kernel of the target stores its result, and `make_linear` chooses the kernel (emulated.py).
With `EMBEDDED` nothing is rounded, and every output keeps its bits.

What is emulated is where values are rounded and to what, on one GPU of the Hopper generation, as
its decoding kernels do: absorbed attention that reads every latent from the KV cache. What is not:

- the order of FP32 sums, and the sums inside a tensor core, which keep fewer bits than FP32;
- prefill kernels that attend to a prompt's own keys before these are rounded to the KV format;
- partial sums of several GPUs, each rounded to BF16 before they are added (tensor parallelism).

Sources. *read* is source text, of the version named; *recalled* is known and was not read again;
*executed* where the rule ran here, on a CPU.

    rule                       trtllm          vllm 0.32       sglang          transformers 5.23
    activations bfloat16       read [L, DS]    read            read            executed
    block_inputs               fp8, recalled   fp8-pow2, read  fp8, recalled   none, executed
    static_inputs              bf16 reciprocal, read; executed [10] | - | recalled | none, executed
    weights rounded to BF16    recalled        read, recalled  recalled        executed
    absorbed                   fp8, recalled   bfloat16, read  bfloat16, rec.  bfloat16
    norm_of_sum, elementwise   recalled        read            recalled        executed
    angles                     recalled        read            recalled        executed
    router_logits              recalled        read            recalled        executed
    expert_sum                 recalled        read            recalled        executed
    queries, KV cache in FP8   recalled        read            recalled        -

vLLM: ir/ops/layernorm.py (the sum that is normed is FP32, its norm is rounded before the weight
multiplies it), utils/deep_gemm.py and fp8_utils.py (`is_deep_gemm_e8m0_used` is true on Hopper, so
FP8 tiles are quantized again with powers of two), layers/attention/mla_attention.py (kv_b_proj
dequantized to the activations' type; queries quantized beside an FP8 cache), fused_moe/router
(`out_dtype` None: logits BF16), experts/marlin_moe.py (`mul_topk_weights`, then `moe_sum`),
logits_processor.py (`head_dtype` is the model's). transformers: modeling_deepseek_v3.py.

This file imports no torch: whoever only names an arithmetic needs none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from deepseek.recipe import WeightFormat

FloatName = Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """How a target computes. The defaults are the embedded engine's own.

    Between kernels:
        activations: what every tensor between two kernels is rounded to: embedding, residual
            stream, norms, outputs of linears, rotary key and query, attention weights before they
            multiply the latents, attention's output, SwiGLU's output, each expert's output, the
            experts' sum, the logits; and parameters that are stored in more bits: norms, router,
            head. Softmax, the inside of a norm and router scores are FP32 everywhere.
        norm_of_sum: what a norm reads where the kernel adds the residual itself: the FP32 sum, or
            the sum as it is stored.
        elementwise: "twice" where a norm and SwiGLU are rounded before their last product too.
        angles: type of cosines and sines, and of the two products of a rotation.
        router_logits: type of the router's product, before the sigmoid.
        expert_sum: "weights" multiplies an expert's output inside the FP32 sum over experts;
            "products" rounds each product of output and routing weight first.

    In linears:
        block_inputs: inputs of a linear in FP8 tiles. "fp8" quantizes them on the fly to e4m3 with
            one FP32 scale (amax / 448) per token and 128 channels; "fp8-pow2" rounds that scale up
            to a power of two, and quantizes the weight's tiles again with such scales.
        static_inputs: W4A8. "divide" quantizes x / s; "bf16-reciprocal" the product of x and
            bf16(1 / s), itself rounded to BF16; "none" leaves the input alone.
        token_inputs: W8A8. "int8" quantizes per token; "none" leaves the input alone.
        rounded_weights: formats whose dequantized values are rounded to BF16 before the product.
        absorbed: the halves of kv_b_proj. "fp8" where they stay FP8 tiles whose inputs are
            quantized as `block_inputs`, if kv_b_proj is stored so; else rounded to that type.
        fp8_queries: whether queries are rounded to e4m3 (scale 1) where the KV layout is
            `fp8-tensor`.
    """

    name: str
    activations: FloatName = "float32"
    norm_of_sum: FloatName = "float32"
    elementwise: Literal["once", "twice"] = "once"
    angles: FloatName = "float32"
    router_logits: FloatName = "float32"
    expert_sum: Literal["weights", "products"] = "weights"
    block_inputs: Literal["none", "fp8", "fp8-pow2"] = "none"
    static_inputs: Literal["none", "divide", "bf16-reciprocal"] = "divide"
    token_inputs: Literal["none", "int8"] = "int8"
    rounded_weights: frozenset[WeightFormat] = frozenset()
    absorbed: Literal["float32", "bfloat16", "fp8"] = "float32"
    fp8_queries: bool = False


EMBEDDED = Arithmetic(name="embedded")

_ALL = (
    EMBEDDED,
    Arithmetic(
        name="trtllm",
        activations="bfloat16",
        block_inputs="fp8",
        static_inputs="bf16-reciprocal",
        rounded_weights=frozenset({"int4", "int8"}),
        absorbed="fp8",
        fp8_queries=True,
    ),
    Arithmetic(
        name="vllm",
        activations="bfloat16",
        elementwise="twice",
        router_logits="bfloat16",
        expert_sum="products",
        block_inputs="fp8-pow2",
        rounded_weights=frozenset({"int4", "int4-asym"}),
        absorbed="bfloat16",
        fp8_queries=True,
    ),
    Arithmetic(
        name="sglang",
        activations="bfloat16",
        router_logits="bfloat16",
        expert_sum="products",
        block_inputs="fp8",
        rounded_weights=frozenset({"int4"}),
        absorbed="bfloat16",
        fp8_queries=True,
    ),
    Arithmetic(
        name="transformers",
        activations="bfloat16",
        norm_of_sum="bfloat16",
        elementwise="twice",
        angles="bfloat16",
        expert_sum="products",
        static_inputs="none",
        token_inputs="none",
        rounded_weights=frozenset({"bf16", "fp8-block", "int8", "int8-asym", "int4", "int4-asym"}),
        absorbed="bfloat16",
    ),
)
#: By name of the target.
ARITHMETICS: Mapping[str, Arithmetic] = MappingProxyType({a.name: a for a in _ALL})
