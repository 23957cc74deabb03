"""Plans of Kimi-K2 and Moonlight: their parts, what loads, what fits, and what GPUs would cut."""

from __future__ import annotations

import pytest
from support.plans import recipe_of

from cluster.choice import tally_of
from cluster.deployability import check, served_schemes
from cluster.hardware import parse_hardware
from cluster.matrix import TARGETS
from cluster.plan import Plan, make_plan
from cluster.splits import split_refusals, trtllm_refusals
from deepseek.models import DEEPSEEK_V3, KIMI_K2, MOONLIGHT
from deepseek.recipe import Recipe, builtin_recipes, load_recipe


def plan(config, recipe: Recipe | str, hardware: str, **options: object) -> Plan:
    loaded = load_recipe(recipe) if isinstance(recipe, str) else recipe
    return make_plan(config, loaded, parse_hardware(hardware), **options)


@pytest.mark.heavy
@pytest.mark.parametrize("recipe", builtin_recipes())
def test_every_built_in_recipe_has_a_plan_for_moonlight_on_every_target(recipe: str) -> None:
    for target in TARGETS:
        hardware = "cpu" if target == "embedded" else "1xH800-80GB"
        made = plan(MOONLIGHT, recipe, hardware, target=target, context=1024)
        assert made.fits
        assert made.loads == (not made.refusals)
        assert not any("q_a_proj" in refusal.part for refusal in made.refusals)
    assert plan(MOONLIGHT, recipe, "cpu", context=1024).good


def test_q_proj_loads_where_q_b_proj_does() -> None:
    schemes = served_schemes(MOONLIGHT, load_recipe("int8-asym").resolve(MOONLIGHT))
    parts = {
        target: " ".join(refusal.part for refusal in check(schemes, "bf16", target, "sm90"))
        for target in ("trtllm", "vllm", "sglang")
    }
    assert "o_proj, q_proj and shared_experts" in parts["trtllm"]
    assert "kv_a_proj_with_mqa as int8-asym" in parts["vllm"]  # 576 outputs, in no fused linear
    assert "q_proj" not in parts["vllm"]
    assert "q_proj" in parts["sglang"]
    (refusal,) = check(
        served_schemes(MOONLIGHT, load_recipe("int8").resolve(MOONLIGHT)), "bf16", "trtllm", "sm90"
    )
    assert refusal.part == "every linear as int8-a8"


def test_a_bf16_source_has_no_fp8_blocks_to_load() -> None:
    schemes = load_recipe("int4").resolve(MOONLIGHT)
    assert {scheme.label for scheme in schemes.values()} == {"bf16", "int4-g128"}


@pytest.mark.heavy
def test_int4_puts_kimi_on_one_node_and_int8_needs_two() -> None:
    """537 and 1030 GB."""
    one = plan(KIMI_K2, "int4", "8xH800-80GB")
    assert (one.good, one.target) == (True, "trtllm")
    assert one.footprint.weights == pytest.approx(537.4e9, rel=1e-3)
    two = plan(KIMI_K2, "int8", "8xH800-80GB")
    assert not two.fits
    assert two.smallest_fit is not None
    assert two.smallest_fit.gpus == 16
    assert two.footprint.weights == pytest.approx(1030.0e9, rel=1e-3)
    assert two.footprint.groups["mtp"].values == 0


def test_groups_that_gpus_would_cut_are_refused_and_the_number_that_works_is_named() -> None:
    """Moonlight's shared expert is 2816 = 22 x 128 wide: 2 GPUs, not 8."""
    made = plan(MOONLIGHT, "int4-all", "8xH800-80GB", target="vllm")
    (refusal,) = made.refusals
    assert refusal.sentence() == (
        "vllm cannot load shared_experts with 2816 inputs as int4-g128 on 8 GPUs: 352 inputs for "
        "each do not make whole groups of 128. Use 2 GPUs, or another format for these linears "
        "in the recipe."
    )
    assert plan(MOONLIGHT, "int4-all", "2xH800-80GB", target="vllm").loads
    assert plan(MOONLIGHT, "int8-weight-only", "8xH800-80GB", target="vllm").loads


def test_experts_that_only_expert_parallelism_keeps_whole_get_a_note() -> None:
    """1408 = 11 x 128 inputs of down_proj."""
    for target, option in (("trtllm", "build it with --ep 8"), ("sglang", "--ep-size 8")):
        notes = plan(MOONLIGHT, "int4", "8xH800-80GB", target=target).warnings
        assert [note for note in notes if option in note and "1408 inputs" in note], target
    assert not any("--ep" in note for note in plan(MOONLIGHT, "int4", "1xH800-80GB").warnings)


@pytest.mark.heavy
def test_fp8_tiles_are_cut_beyond_16_gpus() -> None:
    tally = tally_of(DEEPSEEK_V3, recipe_of())
    for target in ("vllm", "sglang"):
        assert not list(split_refusals(tally, target, 16)), target
    at_32 = [refusal.part for refusal in split_refusals(tally, "vllm", 32)]
    assert any("shared_experts with 2048 inputs as fp8-block on 32 GPUs" in part for part in at_32)


def test_tensorrt_llm_divides_its_mlps_among_fewer_gpus_and_only_attention_can_be_cut() -> None:
    """Kimi-K2's 64 heads of 192: on 64 GPUs each would get one and a half tiles."""
    for config, most in ((DEEPSEEK_V3, 64), (KIMI_K2, 32)):
        schemes = tally_of(config, load_recipe("int4")).schemes
        for tp in (1, 8, 16, 32, 64):
            found = trtllm_refusals(config, schemes, "mixed", tp, mtp=False)
            assert bool(found) == (tp > most), (tp, found)
            assert not trtllm_refusals(config, schemes, "single", tp, mtp=False)
    assert found[0].sentence() == (
        "trtllm cannot load model.layers.0.self_attn.q_b_proj as fp8-block: its outputs, 192 for "
        "each of 64 ranks, are no multiple of 128. Use --dialect single or --tp 32."
    )
