"""compress and decompress: stored tensors, sizes, errors of the values, and refusals."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from deepseek.errors import ArtifactError, CheckpointError, RecipeError
from deepseek.formats import (
    compress,
    decompress,
    dequantize_fp8_block,
    dequantize_int4,
    dequantize_int8,
    dequantize_int8_block,
    quantize_fp8_block,
    quantize_int4,
    quantize_int8,
    quantize_int8_asym,
    quantize_int8_block,
    stored_bytes,
    stored_shapes,
)
from deepseek.recipe import Scheme

#: Scheme -> relative Frobenius error of a Gaussian [512, 2048] weight, measured here. A format that
#: gets better or worse than this by 1 % has changed.
GAUSSIAN_ERROR = {
    Scheme(weights="bf16"): 0.00166,
    Scheme(weights="int8"): 0.00831,
    Scheme(weights="int8-asym"): 0.00783,
    Scheme(weights="int8", activations="int8"): 0.00831,
    Scheme(weights="int8-block", activations="int8"): 0.00943,
    Scheme(weights="fp8-block"): 0.0264,
    Scheme(weights="int4", group_size=128): 0.1174,
    Scheme(weights="int4", group_size=64): 0.1077,
    Scheme(weights="int4", group_size=32): 0.0971,
    Scheme(weights="int4-asym", group_size=128): 0.1006,
    Scheme(weights="int4-asym", group_size=64): 0.0911,
    Scheme(weights="int4-asym", group_size=32): 0.0808,
}
SCHEMES = list(GAUSSIAN_ERROR)
LABELS = [scheme.label for scheme in SCHEMES]
W4A8 = Scheme(weights="int4", group_size=128, activations="fp8")
INT8_BLOCK = Scheme(weights="int8-block", activations="int8")
each_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=LABELS)


def gaussian(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@each_scheme
def test_the_error_on_gaussian_weights_is_the_known_one(scheme: Scheme) -> None:
    weight = gaussian((512, 2048))
    error = (decompress(compress(weight, scheme), scheme, (512, 2048)) - weight).norm()
    relative = (error / weight.norm()).item()
    assert relative == pytest.approx(GAUSSIAN_ERROR[scheme], rel=0.01), f"{scheme.label} {relative}"


@each_scheme
@pytest.mark.parametrize("shape", [(1, 128), (130, 384), (160, 256), (256, 128)])
def test_what_is_stored_is_what_was_announced(scheme: Scheme, shape: tuple[int, int]) -> None:
    tensors = compress(gaussian(shape), scheme)
    announced = stored_shapes(scheme, *shape)
    actual = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
    assert actual == announced
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert total == stored_bytes(scheme, *shape)
    back = decompress(tensors, scheme, shape)
    assert back.dtype == torch.float32
    assert back.shape == shape


def test_bytes_of_a_deepseek_v3_expert_are_those_of_the_format() -> None:
    """gate_proj of a routed expert is [2048, 7168], 14 680 064 weights."""
    assert stored_bytes(Scheme(weights="bf16"), 2048, 7168) == 29_360_128
    packed8 = Scheme(weights="int8")
    plain8 = Scheme(weights="int8", activations="int8")
    assert stored_bytes(plain8, 2048, 7168) == 14_680_064 + 2048 * 4
    assert stored_bytes(packed8, 2048, 7168) == 14_680_064 + 2048 * 4 + 16
    asym8 = Scheme(weights="int8-asym")
    assert stored_bytes(asym8, 2048, 7168) == stored_bytes(packed8, 2048, 7168) + 2048
    for tiled in (Scheme(weights="fp8-block"), INT8_BLOCK):
        assert stored_bytes(tiled, 2048, 7168) == 14_680_064 + 16 * 56 * 4
    symmetric = 7_340_032 + 2048 * 56 * 2 + 16
    int4 = {name: Scheme(weights=name, group_size=128) for name in ("int4", "int4-asym")}
    assert stored_bytes(int4["int4"], 2048, 7168) == symmetric
    assert stored_bytes(W4A8, 2048, 7168) == symmetric + 4
    assert stored_bytes(int4["int4-asym"], 2048, 7168) == symmetric + 256 * 56 * 4


@each_scheme
def test_a_bfloat16_weight_gives_the_bytes_of_the_same_values_in_float32(scheme: Scheme) -> None:
    weight = gaussian((160, 256)).bfloat16()
    for name, tensor in compress(weight, scheme).items():
        same = compress(weight.float(), scheme)[name]
        assert torch.equal(tensor.view(torch.uint8), same.view(torch.uint8)), name


@each_scheme
def test_a_weight_is_not_changed_by_compressing_it(scheme: Scheme) -> None:
    weight = gaussian((160, 256))
    before = weight.clone()
    compress(weight, scheme)
    assert torch.equal(weight, before)


def test_decompress_is_the_formats_own_dequantize() -> None:
    weight = gaussian((200, 384))
    int8, fp8 = Scheme(weights="int8", activations="int8"), Scheme(weights="fp8-block")
    cases = [
        (Scheme(weights="int8-asym"), dequantize_int8(*quantize_int8_asym(weight))),
        (int8, dequantize_int8(*quantize_int8(weight))),
        (fp8, dequantize_fp8_block(*quantize_fp8_block(weight))),
        (INT8_BLOCK, dequantize_int8_block(*quantize_int8_block(weight))),
    ]
    for group in (32, 64, 128):
        for name, symmetric in (("int4", True), ("int4-asym", False)):
            scheme = Scheme(weights=name, group_size=group)
            cases.append((scheme, dequantize_int4(*quantize_int4(weight, group, symmetric))))
    for scheme, expected in cases:
        assert torch.equal(decompress(compress(weight, scheme), scheme, (200, 384)), expected)


# --- Scales from elsewhere ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(256, 256), (160, 256), (200, 130)])
def test_a_releases_fp8_blocks_survive_dequantizing_and_compressing_with_their_scales(
    shape: tuple[int, int],
) -> None:
    """The release's scales need not be amax / 448; given them, its codes come back to the bit."""
    blocks = (-(-shape[0] // 128), -(-shape[1] // 128))
    generator = torch.Generator().manual_seed(7)
    codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    codes[(codes & 0x7F) == 0x7F] = 0x80  # no NaN, but -0
    scale = torch.rand(blocks, generator=generator) * 1e-3 + 1e-5
    weight = dequantize_fp8_block(codes.view(torch.float8_e4m3fn), scale)
    tensors = compress(weight, Scheme(weights="fp8-block"), scale=scale)
    assert torch.equal(tensors["weight"].view(torch.uint8), codes)
    assert torch.equal(tensors["weight_scale"], scale)


def own_amax(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    if scheme.weights == "int8":
        return weight.abs().amax(1, keepdim=True)
    if scheme.weights == "int4":
        return weight.abs().view(weight.shape[0], -1, scheme.group_size or 0).amax(-1)
    return weight.abs().view(2, 128, 2, 128).amax(dim=(1, 3))


AMAX_SCHEMES = [
    Scheme(weights="int8"),
    Scheme(weights="fp8-block"),
    INT8_BLOCK,
    Scheme(weights="int4", group_size=64),
]
each_amax_scheme = pytest.mark.parametrize("scheme", AMAX_SCHEMES, ids=lambda s: s.label)


@each_amax_scheme
def test_the_datas_own_amax_or_scale_given_by_keyword_changes_nothing(scheme: Scheme) -> None:
    weight = gaussian((256, 256))
    plain = compress(weight, scheme)
    by_amax = compress(weight, scheme, amax=own_amax(weight, scheme))
    by_scale = compress(weight, scheme, scale=plain["weight_scale"])
    for name, tensor in plain.items():
        for other in (by_amax, by_scale):
            assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name


@each_amax_scheme
def test_a_smaller_calibrated_amax_clips_and_is_finer_inside(scheme: Scheme) -> None:
    weight = gaussian((256, 256))
    amax = own_amax(weight, scheme) * 0.5
    back = decompress(compress(weight, scheme, amax=amax), scheme, (256, 256))
    plain = decompress(compress(weight, scheme), scheme, (256, 256))
    # One code beyond -amax exists in the integer formats, so the limit is amax * 8/7 at most.
    assert back.abs().max() <= amax.max() * 1.15 < weight.abs().max()
    small = weight.abs() < 0.5
    if scheme.weights != "fp8-block":  # a floating-point format is as fine with any scale
        assert (back - weight)[small].norm() < 0.6 * (plain - weight)[small].norm()


BAD_AMAX = [float("nan"), float("inf"), -1.0, 0.0]


@each_amax_scheme
@pytest.mark.parametrize("bad", BAD_AMAX)
def test_an_unusable_amax_or_scale_is_refused(scheme: Scheme, bad: float) -> None:
    weight = gaussian((256, 256))
    amax = own_amax(weight, scheme)
    amax[1, 0] = bad
    with pytest.raises(CheckpointError, match="amax"):
        compress(weight, scheme, amax=amax)
    with pytest.raises(CheckpointError, match="scale"):
        compress(weight, scheme, scale=amax)


@each_amax_scheme
def test_an_amax_of_another_shape_is_a_bug_even_if_it_would_broadcast(scheme: Scheme) -> None:
    weight = gaussian((256, 256))
    amax = own_amax(weight, scheme)
    for wrong in (amax[:1], amax.flatten(), torch.cat((amax, amax))):
        with pytest.raises(AssertionError):
            compress(weight, scheme, amax=wrong)


def test_asymmetric_int4_takes_scale_and_zero_point_together() -> None:
    weight, scheme = gaussian((16, 128)), Scheme(weights="int4-asym", group_size=32)
    codes, scale, zeros = quantize_int4(weight, 32, symmetric=False)
    assert zeros is not None
    plain = compress(weight, scheme)
    given = compress(weight, scheme, scale=scale, zero_point=zeros)
    assert all(torch.equal(plain[name], given[name]) for name in plain)
    for wrong in ({"scale": scale}, {"zero_point": zeros}, {"amax": scale.float()}):
        with pytest.raises(AssertionError):
            compress(weight, scheme, **wrong)
    zeros[0, 0] = 8
    with pytest.raises(CheckpointError, match=r"zero point outside \[-8, 7\]"):
        compress(weight, scheme, scale=scale, zero_point=zeros)


def test_asymmetric_int8_takes_scale_and_zero_point_together() -> None:
    weight, scheme = gaussian((16, 128)), Scheme(weights="int8-asym")
    _, scale, zeros = quantize_int8_asym(weight)
    plain = compress(weight, scheme)
    given = compress(weight, scheme, scale=scale, zero_point=zeros)
    assert all(torch.equal(plain[name], given[name]) for name in plain)
    for wrong in ({"scale": scale}, {"zero_point": zeros}, {"amax": scale}):
        with pytest.raises(AssertionError):
            compress(weight, scheme, **wrong)
    with pytest.raises(CheckpointError, match=r"zero point outside \[-128, 127\]"):
        compress(weight, scheme, scale=scale, zero_point=zeros.int() + 200)


def test_an_input_scale_may_come_with_the_weight_or_after_it_and_does_not_change_it() -> None:
    weight, shape = gaussian((16, 256)), (16, 256)
    scale = torch.tensor([0.01])
    stored = compress(weight, W4A8)
    plain = Scheme(weights="int4", group_size=128)
    expected = decompress(stored, plain, shape)
    assert torch.equal(decompress(stored, W4A8, shape), expected)
    announced = stored_shapes(W4A8, *shape)
    assert announced.keys() - stored.keys() == {"input_scale"}
    stored["input_scale"] = scale
    together = compress(weight, W4A8, input_scale=scale)
    assert {name: (tuple(t.shape), t.dtype) for name, t in together.items()} == announced
    assert all(torch.equal(stored[name], tensor) for name, tensor in together.items())
    assert torch.equal(decompress(together, W4A8, shape), expected)


def test_an_input_scale_that_belongs_to_nothing_or_is_none_is_refused() -> None:
    weight = gaussian((16, 256))
    for scheme in (Scheme(weights="int4", group_size=128), Scheme(weights="int8")):
        with pytest.raises(AssertionError):
            compress(weight, scheme, input_scale=torch.ones(1))
    with pytest.raises(AssertionError):
        compress(weight, W4A8, input_scale=torch.tensor(1.0))
    with pytest.raises(CheckpointError, match="has a scale"):
        compress(weight, W4A8, input_scale=torch.zeros(1))
    stored = compress(weight, W4A8, input_scale=torch.ones(1))
    with pytest.raises(ArtifactError, match="input_scale is unknown"):
        decompress(stored, Scheme(weights="int4", group_size=128), (16, 256))
    with pytest.raises(ArtifactError, match="input_scale is torch.float64"):
        decompress(stored | {"input_scale": torch.ones(1).double()}, W4A8, (16, 256))


# --- Refused --------------------------------------------------------------------------------------


@each_scheme
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e38, -1e38])
def test_values_that_cannot_be_represented_are_refused_with_the_reason_only(
    scheme: Scheme, value: float
) -> None:
    weight = gaussian((160, 256))
    weight[159, 255] = value
    message = r"^holds NaN, infinity or magnitudes above 2\^126; repair the weight$"
    with pytest.raises(CheckpointError, match=message):
        compress(weight, scheme)
    if scheme.weights == "int8":
        with pytest.raises(CheckpointError, match=message):
            compress(weight, scheme, amax=torch.ones(160, 1))
        with pytest.raises(CheckpointError, match=message):
            compress(weight, scheme, scale=torch.ones(160, 1))


def test_a_group_that_does_not_divide_the_inputs_is_refused() -> None:
    scheme = Scheme(weights="int4", group_size=128)
    for attempt in (
        lambda: compress(gaussian((4, 200)), scheme),
        lambda: stored_shapes(scheme, 4, 200),
        lambda: stored_bytes(scheme, 4, 200),
    ):
        with pytest.raises(RecipeError, match="group_size 128 does not divide the 200 inputs"):
            attempt()


def test_source_must_have_been_made_concrete() -> None:
    with pytest.raises(AssertionError, match="concrete"):
        stored_bytes(Scheme(weights="source"), 4, 4)
    with pytest.raises(AssertionError, match="concrete"):
        compress(gaussian((4, 4)), Scheme(weights="source"))


Damage = Callable[[dict[str, torch.Tensor]], None]
DAMAGES: list[tuple[str, Damage]] = [
    ("weight_scale is missing", lambda t: t.__delitem__("weight_scale")),
    ("weight_bias is unknown", lambda t: t.__setitem__("weight_bias", torch.zeros(1))),
    ("weight_scale is torch.float16", lambda t: t.update(weight_scale=t["weight_scale"].half())),
    ("weight_packed is .*cut", lambda t: t.update(weight_packed=t["weight_packed"][:, 1:])),
    ("weight_zero_point is missing", lambda t: t.__delitem__("weight_zero_point")),
    ("weight_shape says", lambda t: t["weight_shape"].add_(1)),
]


@pytest.mark.parametrize(("message", "damage"), DAMAGES, ids=[m for m, _ in DAMAGES])
def test_stored_tensors_that_do_not_belong_together_are_refused(
    message: str, damage: Damage
) -> None:
    scheme = Scheme(weights="int4-asym", group_size=32)
    tensors = compress(gaussian((16, 64)), scheme)
    damage(tensors)
    with pytest.raises(ArtifactError, match=message.replace(".*cut", r".*\(16, 7\)")):
        decompress(tensors, scheme, (16, 64))


def test_a_weight_of_another_shape_or_scheme_is_not_decompressed() -> None:
    int8, fp8 = Scheme(weights="int8", activations="int8"), Scheme(weights="fp8-block")
    tensors = compress(gaussian((16, 64)), int8)
    with pytest.raises(ArtifactError, match=r"weight is torch.int8 \(16, 64\)"):
        decompress(tensors, int8, (64, 16))
    with pytest.raises(ArtifactError, match=r"weight is torch.int8 .* store torch.float8_e4m3fn"):
        decompress(tensors, fp8, (16, 64))


# --- Memory ---------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Peak bytes of all storages that operations created and that still live."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage.data_ptr() in given or storage.data_ptr() in self.live:
                continue
            self.live[storage.data_ptr()] = storage.nbytes()
            weakref.finalize(storage, self.live.pop, storage.data_ptr(), None)
            self.peak = max(self.peak, sum(self.live.values()))
        return result


@each_scheme
def test_compressing_needs_little_memory_beside_its_result(scheme: Scheme) -> None:
    """16 M weights are 67 MB in float32; so is each temporary of a function without chunks."""
    weight = gaussian((8192, 2048))
    with LiveBytes() as memory:
        tensors = compress(weight, scheme)
    result = sum(t.numel() * t.element_size() for t in tensors.values())
    codes = weight.numel() if scheme.group_size else 0  # int8 before packing
    assert result <= memory.peak <= result + codes + 50_000_000
