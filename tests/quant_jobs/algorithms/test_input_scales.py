"""Static input scales: one per layer and projection, and no expert sets it unnoticed."""

from __future__ import annotations

import random

import pytest

from quant_jobs.algorithms.input_scales import GUARD, share_input_scales

ROLES = ("gate_proj", "up_proj", "down_proj")
FP8_MAX = 448.0


def experts(peaks: list[float], layer: int = 3) -> dict[str, float]:
    """amax by module: gate and up as given, down ten times that."""
    return {
        f"model.layers.{layer}.mlp.experts.{expert}.{role}": peak * (10 if "down" in role else 1)
        for expert, peak in enumerate(peaks)
        for role in ROLES
    }


def everywhere(amax: dict[str, float], tokens: int = 9) -> dict[str, int]:
    return dict.fromkeys(amax, tokens)


def module(expert: int, role: str, layer: int = 3) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}.{role}"


def test_experts_share_the_largest_scale_apart_for_gate_and_up_and_for_down() -> None:
    amax = experts([1.0, 4.0, 2.0])
    scales, ledger = share_input_scales(amax, everywhere(amax))
    assert scales.keys() == amax.keys()
    for name, scale in scales.items():
        assert scale == (40.0 if "down" in name else 4.0) / FP8_MAX
    assert ledger == ()


def test_gate_and_up_share_a_scale_even_where_they_were_smoothed_apart() -> None:
    amax = experts([1.0, 1.0]) | {module(1, "up_proj"): 3.0}
    scales, _ = share_input_scales(amax, everywhere(amax))
    assert scales[module(0, "gate_proj")] == scales[module(1, "up_proj")] == 3.0 / FP8_MAX


def test_an_outlier_is_clipped_at_the_guard_and_counted() -> None:
    amax = experts([1.0, 2.0, 1.5, 1000.0, 1.0])
    scales, ledger = share_input_scales(amax, everywhere(amax))
    median = 1.5
    assert scales[module(0, "gate_proj")] == GUARD * median / FP8_MAX
    assert scales[module(3, "down_proj")] == GUARD * median * 10 / FP8_MAX
    noted = [(entry.kind, entry.layer, entry.module, entry.count) for entry in ledger]
    assert noted == [("outlier_input_scale", 3, "model.layers.3.mlp.experts.3", 2)]
    amax = experts([1.0, 2.0, 1.5, 1.0, 1.0]) | {module(3, "down_proj"): 1e5}
    scales, ledger = share_input_scales(amax, everywhere(amax))
    assert scales[module(3, "gate_proj")] == 2.0 / FP8_MAX
    assert [entry.count for entry in ledger] == [1]


def test_at_the_guard_itself_nothing_clips() -> None:
    amax = experts([1.0, 1.0, GUARD])
    scales, ledger = share_input_scales(amax, everywhere(amax))
    assert scales[module(0, "up_proj")] == GUARD / FP8_MAX
    assert ledger == ()
    _, ledger = share_input_scales(amax, everywhere(amax), guard=GUARD - 1)
    assert [entry.kind for entry in ledger] == ["outlier_input_scale"]


@pytest.mark.parametrize("unrouted", [0.0, 3.0])  # 3.0: measured on tokens of other experts
def test_an_expert_without_tokens_has_no_say_and_is_noted(unrouted: float) -> None:
    amax = experts([1.0, unrouted, 2.0])
    tokens = everywhere(amax)
    tokens |= {module(1, role): 0 for role in ROLES}
    scales, ledger = share_input_scales(amax, tokens)
    assert scales[module(1, "gate_proj")] == 2.0 / FP8_MAX
    noted = [(entry.kind, entry.layer, entry.module, entry.count) for entry in ledger]
    assert noted == [("unseen_input_scale", 3, "model.layers.3.mlp.experts.1", 1)]


def test_zeros_do_not_pull_the_median_down() -> None:
    """An expert whose tokens are all zero on the way in says nothing about the others' size."""
    amax = experts([0.0, 0.0, 0.0, 1.0, 2.0])
    scales, ledger = share_input_scales(amax, everywhere(amax))
    assert scales[module(0, "gate_proj")] == 2.0 / FP8_MAX
    assert ledger == ()


def test_where_nothing_was_seen_the_scale_is_1() -> None:
    amax = experts([0.0, 0.0])
    scales, ledger = share_input_scales(amax, everywhere(amax, 0))
    assert set(scales.values()) == {1.0}
    assert [entry.kind for entry in ledger] == ["unseen_input_scale"] * 2
    scales, ledger = share_input_scales(amax, everywhere(amax))
    assert set(scales.values()) == {1.0}
    assert ledger == ()


def test_what_is_no_routed_expert_keeps_its_own_scale() -> None:
    attention = "model.layers.3.self_attn"
    amax = experts([1.0, 1.0]) | {
        f"{attention}.q_a_proj": 5.0,
        f"{attention}.kv_a_proj_with_mqa": 7.0,
        f"{attention}.q_b_proj": 1e6,
        "model.layers.3.mlp.shared_experts.gate_proj": 30.0,
        "model.layers.3.mlp.shared_experts.up_proj": 30.0,
        "model.layers.3.mlp.shared_experts.down_proj": 0.5,
        "model.layers.0.mlp.down_proj": 11.0,
    }
    scales, ledger = share_input_scales(amax, everywhere(amax))
    assert scales[f"{attention}.q_a_proj"] == scales[f"{attention}.kv_a_proj_with_mqa"]
    assert scales[f"{attention}.q_a_proj"] == 7.0 / FP8_MAX
    assert scales[f"{attention}.q_b_proj"] == 1e6 / FP8_MAX
    assert scales["model.layers.3.mlp.shared_experts.down_proj"] == 0.5 / FP8_MAX
    assert scales["model.layers.0.mlp.down_proj"] == 11.0 / FP8_MAX
    assert scales[module(0, "gate_proj")] == 1.0 / FP8_MAX
    assert ledger == ()


def test_layers_do_not_mix() -> None:
    amax = experts([1.0, 1.0], layer=3) | experts([500.0, 500.0], layer=14)
    scales, ledger = share_input_scales(amax, everywhere(amax))
    assert scales[module(1, "up_proj", 3)] == 1.0 / FP8_MAX
    assert scales[module(1, "up_proj", 14)] == 500.0 / FP8_MAX
    assert ledger == ()


def test_the_order_of_the_modules_does_not_matter() -> None:
    generator = random.Random(8)
    peaks = [generator.lognormvariate(0, 3) for _ in range(40)]
    amax = experts(peaks)
    tokens = {name: generator.randrange(3) for name in amax}
    wanted = share_input_scales(amax, tokens)
    assert {entry.kind for entry in wanted[1]} == {"outlier_input_scale", "unseen_input_scale"}
    for _ in range(5):
        names = generator.sample(sorted(amax), len(amax))
        found = share_input_scales({n: amax[n] for n in names}, {n: tokens[n] for n in names})
        assert found == wanted
        assert list(found[0]) == list(wanted[0])


def test_amax_and_tokens_are_of_the_same_modules() -> None:
    amax = experts([1.0])
    with pytest.raises(AssertionError):
        share_input_scales(amax, {})
    with pytest.raises(AssertionError):
        share_input_scales(amax, everywhere(amax), guard=0.5)
