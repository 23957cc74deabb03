"""The layouts of the KV cache: what each rounds, what each occupies."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from deepseek.config import ModelConfig
from deepseek.engine.kv_cache import (
    LatentCache,
    cache_bytes,
    check_cache_format,
    dequantize_tiles,
    quantize_tiles,
    token_bytes,
)
from deepseek.errors import DeployError
from deepseek.kv_layout import KVLayout, kv_layout, layer_token_bytes
from deepseek.models import DEEPSEEK_V3

LAYOUTS: tuple[KVLayout, ...] = get_args(KVLayout)
LAYERS = 4
#: Latent and rotary widths: DeepSeek-V3's, one tile exactly, less than a tile, a ragged last tile.
WIDTHS = [(512, 64), (128, 64), (48, 16), (200, 32)]


def config_of(latent: int, rope: int) -> ModelConfig:
    return replace(
        DEEPSEEK_V3, kv_lora_rank=latent, qk_rope_head_dim=rope, num_hidden_layers=LAYERS
    )


def tokens(count: int, latent: int, rope: int) -> tuple[Tensor, Tensor]:
    """Latents and rotary keys with a token of zeros, tiny values, and values beyond 448."""
    generator = torch.Generator().manual_seed(7)
    latents = torch.randn(count, latent, generator=generator)
    keys = 20 * torch.randn(count, rope, generator=generator)
    latents[1], keys[1] = 0.0, 0.0
    latents[2] *= 1e-40
    latents[3, 0], latents[3, 1], keys[3, 0] = 1000.0, -448.0, -7e4
    return latents, keys


def slow_token(layout: KVLayout, latent: Tensor, key: Tensor) -> Tensor:
    """One token's values after the round trip, float64 [R + r], value by value or tile by tile."""
    both = torch.cat((latent, key))
    match layout:
        case "fp32":
            return both.double()
        case "bf16":
            return both.bfloat16().double()
        case "fp8-tensor":
            return torch.tensor([nearest_e4m3(v) for v in both.tolist()], dtype=torch.float64)
        case "int8":
            scale = max(latent.abs().max().item() / 127, 2.0**-126)
            values = [round(v / scale) * scale for v in latent.double().tolist()]
        case "fp8-tiles":
            values = []
            for first in range(0, len(latent), 128):
                tile = latent[first : first + 128].double()
                scale = max(tile.abs().max().item() / 448, 2.0**-126)
                values += [nearest_e4m3(v / scale) * scale for v in tile.tolist()]
    return torch.cat((torch.tensor(values, dtype=torch.float64), key.bfloat16().double()))


def nearest_e4m3(value: float) -> float:
    """Round to nearest even with 3 bits after the leading one, steps of 2^-9 below 2^-6."""
    size = abs(value)
    if size == 0.0:
        return 0.0
    step = 2.0 ** (max(math.floor(math.log2(size)), -6) - 3)
    return math.copysign(min(round(size / step) * step, 448.0), value)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("widths", WIDTHS)
def test_a_token_comes_back_as_the_layout_rounds_it(
    layout: KVLayout, widths: tuple[int, int]
) -> None:
    cache = LatentCache(config_of(*widths), layout, 4, 8)
    latents, keys = tokens(6, *widths)
    slots = torch.tensor([8, 15, 16, 23, 9, 32])  # pages 1, 2 and 4
    cache.write(1, slots, latents, keys)
    got = cache.read(1, torch.tensor([[1, 2, 3, 4]]))[0]
    assert got.dtype == torch.float32
    for token, slot in enumerate(slots.tolist()):
        want = slow_token(layout, latents[token], keys[token])
        torch.testing.assert_close(got[slot - 8].double(), want, rtol=1e-6, atol=1e-40)
    written = torch.zeros(32, dtype=torch.bool)
    written[slots - 8] = True
    assert not got[~written].any(), "slots that nobody wrote are zeros"
    assert not cache.read(0, torch.tensor([[1, 2, 3, 4]])).any(), "the other layer is untouched"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_are_poisoned_and_cleared_whatever_the_type(layout: KVLayout) -> None:
    cache = LatentCache(config_of(200, 32), layout, 4, 8)
    every = torch.arange(32)
    cache.write(0, every + 8, *tokens(32, 200, 32))
    cache.poison([2, 3])
    values = cache.read(0, torch.tensor([[1, 2, 3, 4, 0]]))[0].view(5, 8, -1)
    assert values[1:3].isnan().any(dim=-1).all(), "every token of a poisoned page shows"
    assert not values[[0, 3, 4]].isnan().any()
    cache.clear([2, 1])
    values = cache.read(0, torch.tensor([[1, 2, 3, 4]]))[0].view(4, 8, -1)
    assert not values[:2].any()
    assert values[2].isnan().any()
    assert values[3].any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_token_that_is_not_finite_stays_so(layout: KVLayout) -> None:
    """Except that infinity saturates in a layout without a scale of its own."""
    cache = LatentCache(config_of(128, 16), layout, 1, 8)
    latents, keys = torch.ones(2, 128), torch.ones(2, 16)
    latents[0, 5], latents[1, 7] = float("nan"), float("inf")
    cache.write(0, torch.tensor([8, 9]), latents, keys)
    got = cache.read(0, torch.tensor([[1]]))[0]
    assert got[0].isnan().any()
    if layout == "fp8-tensor":
        assert got[1, 7] == 448
    else:
        assert not got[1].isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("widths", WIDTHS)
def test_planned_bytes_are_the_bytes_of_the_storage(
    layout: KVLayout, widths: tuple[int, int]
) -> None:
    config = config_of(*widths)
    cache = LatentCache(config, layout, 5, 16)
    storage = sum(tensor.untyped_storage().nbytes() for tensor in cache.tensors)
    assert storage == cache.num_bytes == cache_bytes(config, layout, 5, 16)
    assert storage == 6 * 16 * LAYERS * layer_token_bytes(layout, *widths)


def test_a_token_of_deepseek_v3_costs_what_each_layout_says() -> None:
    per_layer = {layout: token_bytes(DEEPSEEK_V3, layout) / 61 for layout in LAYOUTS}
    assert per_layer == {
        "bf16": 1152,
        "fp8-tensor": 576,
        "fp8-tiles": 656,
        "int8": 644,
        "fp32": 2304,
    }


def test_each_tile_has_its_own_scale_and_the_last_may_be_short() -> None:
    latent = torch.cat((torch.full((1, 128), 1e-4), torch.full((1, 72), 300.0)), dim=1)
    codes, scale = quantize_tiles(latent)
    assert scale.shape == (1, 2)
    torch.testing.assert_close(scale, torch.tensor([[1e-4 / 448, 300 / 448]]))
    torch.testing.assert_close(dequantize_tiles(codes, scale), latent)
    one_scale = (latent / (300 / 448)).to(torch.float8_e4m3fn).float() * (300 / 448)
    assert not one_scale[0, :128].any(), "with one scale the first tile would be lost"


def test_a_format_that_nobody_has_is_refused_in_one_sentence() -> None:
    assert [check_cache_format(name) for name in ("bf16", "fp8", "int8", "fp32")]
    for name in ("fp4", "fp8-tiles", "", "BF16"):
        with pytest.raises(DeployError, match=rf"^there is no {name} KV cache; use bf16, fp8"):
            check_cache_format(name)
    with pytest.raises(DeployError, match="transformers has no fp8 KV cache; use bf16"):
        kv_layout("transformers", "fp8")
