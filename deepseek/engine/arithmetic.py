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

Sources. *executed*: the rule ran here beside the target's own Python code; *read*: in source text;
*recalled*: known, and not read again for this table.

    rule                     trtllm          vllm 0.32       sglang 0.5.23   transformers 5.23
    norm_of_sum, elementwise read            read            read            executed
    angles                   recalled        read            recalled        executed
    router_logits            read            read            read            executed
    expert_sum               recalled        read            read            read
    logits in BF16           recalled        read            recalled        executed
    block_inputs             recalled        read            read            executed
    static_inputs            read            -               read            executed
    token_inputs             -               read            read            executed
    rounded_weights          recalled        recalled        recalled        executed
    absorbed                 read            read            read            read
    fp8_queries              recalled        read            read            -

    trtllm        attention `fp8_block_scaling_bmm_out` (SM89 and SM90 quantize the queries and
                  keep FP8 tiles), preQuantScaleKernel (`__hmul2` in BF16, then the cast),
                  `dsv3_router_gemm_op` (FP32 out), FlashInfer's norm.cuh
    vllm          ir/ops/layernorm (the norm reads the FP32 sum, and is rounded before the weight
                  multiplies it), utils/deep_gemm and fp8_utils (`is_deep_gemm_e8m0_used` is true on
                  Hopper, so tiles of weights are quantized again with powers of two),
                  mla_attention, gate_linear (`out_dtype` None), marlin_moe, int8_utils
    sglang        deepseek_v2, deep_gemm_wrapper/configurer (powers of two on Blackwell only),
                  int8_kernel and per_token_group_quant.cuh (groups of INT8 are cut toward zero),
                  ep_moe_kernels, flashattention_backend (the cache is cast to the queries' BF16)
    transformers  modeling_deepseek_v3

Two simplifications: where a GEMM multiplies by the routing weight before it rounds (vLLM and SGLang
with Triton), the output here is rounded before and after; SGLang's `w4afp8` does not round SwiGLU
to BF16 before it quantizes it.

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
        static_inputs: W4A8. "divide" quantizes x / s; "reciprocal" x * (1 / s) in FP32;
            "bf16-reciprocal" x * bf16(1 / s), itself rounded to BF16; "none" leaves the input
            alone.
        token_inputs: W8A8. "int8" quantizes per token; "none" leaves the input alone, as every
            target does beside INT4 weights.
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
    static_inputs: Literal["none", "divide", "reciprocal", "bf16-reciprocal"] = "divide"
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
        expert_sum="products",
        block_inputs="fp8",
        static_inputs="reciprocal",
        rounded_weights=frozenset({"int4"}),
        absorbed="bfloat16",
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
