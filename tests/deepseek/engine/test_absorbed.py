"""kv_b_proj's halves: what the engine holds of them is what the artifact says."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.native_linears import quantize_linear

from deepseek.engine.absorbed import (
    absorbed_halves,
    absorbed_name,
    absorbed_shapes,
    absorbed_to_torch,
    pack_absorbed,
)
from deepseek.engine.native_layout import from_native
from deepseek.engine.torch_layout import Plain, dequantize
from deepseek.models import DEEPSEEK_V3
from deepseek.recipe import Scheme

HEADS, KEY, VALUE, LATENT = 3, 24, 40, 128
CONFIG = dataclasses.replace(
    DEEPSEEK_V3,
    num_attention_heads=HEADS,
    qk_nope_head_dim=KEY,
    v_head_dim=VALUE,
    kv_lora_rank=LATENT,
)
SCHEMES = {
    scheme.label: scheme
    for scheme in (
        Scheme(weights="bf16"),
        Scheme(weights="int8"),
        Scheme(weights="int8", activations="int8"),
        Scheme(weights="int8-asym"),
        Scheme(weights="int8-block", activations="int8"),
        Scheme(weights="int4", group_size=32),
        Scheme(weights="int4", group_size=64, activations="int8"),
        Scheme(weights="int4-asym", group_size=32),
    )
}
#: The halves that keep their codes, and lose nothing; others are rounded to BF16.
EXACT = {
    "w_uk": ("bf16", "int8", "int8-a8"),
    "w_uv": (*(label for label in SCHEMES if "block" not in label),),
}


def plain_of(scheme: Scheme) -> Plain:
    """A kv_b_proj of random values whose channels differ in size."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((HEADS * (KEY + VALUE), LATENT), generator=generator)
    weight *= torch.rand((len(weight), 1), generator=generator) + 0.1
    if not scheme.is_quantized:
        return {"weight": weight.bfloat16()}
    linear, _ = quantize_linear(scheme, weight)
    return from_native(scheme, linear.tensors, (len(weight), LATENT))


@pytest.mark.parametrize("label", SCHEMES)
def test_halves_are_those_of_the_artifact_in_both_layouts(label: str) -> None:
    scheme = SCHEMES[label]
    plain = plain_of(scheme)
    heads = dequantize(scheme, plain).view(HEADS, KEY + VALUE, LATENT)
    want = {"w_uk": heads[:, :KEY], "w_uv": heads[:, KEY:].transpose(1, 2)}

    in_torch = pack_absorbed(CONFIG, 1, scheme, plain, "torch")
    native = pack_absorbed(CONFIG, 1, scheme, plain, "native")
    back = absorbed_to_torch(CONFIG, 1, scheme, native.__getitem__)
    for half in absorbed_halves(CONFIG, scheme):
        name = absorbed_name(1, half.name)
        assert torch.equal(in_torch[name], want[half.name])
        if label in EXACT[half.name]:
            assert torch.equal(back[name], want[half.name])
        else:
            assert not torch.equal(back[name], want[half.name])
            assert torch.equal(back[name], want[half.name].bfloat16().float())


@pytest.mark.parametrize("label", SCHEMES)
def test_shapes_are_known_before_a_tensor_is(label: str) -> None:
    scheme = SCHEMES[label]
    for layout in ("torch", "native"):
        packed = pack_absorbed(CONFIG, 0, scheme, plain_of(scheme), layout)
        made = [(name, tuple(tensor.shape), tensor.dtype) for name, tensor in packed.items()]
        assert made == list(absorbed_shapes(CONFIG, 0, scheme, layout))
        assert all(tensor.is_contiguous() for tensor in packed.values())
