"""The matrix: total, free of dead rows, true to the known facts, and its advice works."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest
import yaml
from support.plans import recipe_of
from support.synthetic import V3_2, config_dict

from cluster.deployability import Refusal, check, examine, find_row, served_schemes
from cluster.hardware import GpuGeneration
from cluster.matrix import BF16, FORMATS, FP8, INDEXER, KV_CACHE, KV_FORMATS, PARTS, ROWS, TARGETS
from deepseek.config import ModelConfig
from deepseek.errors import DeployError
from deepseek.recipe import Recipe, builtin_recipes, load_recipe
from deepseek.trtllm.loadable import EXPERTS_ONLY

GENERATIONS: tuple[GpuGeneration, ...] = ("sm80", "sm90", "cpu")


@pytest.fixture(scope="module")
def config(tiny_model: Path) -> ModelConfig:
    return ModelConfig.from_directory(tiny_model)


@pytest.fixture(scope="module")
def refusals(config: ModelConfig):
    def ask(recipe: Recipe | str, target: str, gpu: GpuGeneration = "sm90") -> list[Refusal]:
        loaded = load_recipe(recipe) if isinstance(recipe, str) else recipe
        schemes = served_schemes(config, loaded.resolve(config))
        return check(schemes, loaded.kv_cache, target, gpu)

    return ask


def cells():
    yield from product(TARGETS, GENERATIONS, sorted(PARTS), sorted(FORMATS))
    yield from product(TARGETS, GENERATIONS, sorted(INDEXER), sorted(BF16 | FP8))
    yield from product(TARGETS, GENERATIONS, [KV_CACHE], sorted(KV_FORMATS))


def test_every_cell_has_a_row_and_every_row_a_cell() -> None:
    used = {find_row(*cell) for cell in cells()}
    assert used == set(ROWS)


def test_every_refusal_says_why_and_what_to_change() -> None:
    for row in ROWS:
        assert row.source
        if not row.loads:
            for words in (row.text, row.change):
                assert words, row
                assert not words.endswith("."), row


#: recipe -> targets on Hopper that load it as it stands.
LOADS = {
    "int8": {"vllm", "sglang"},
    "int8-smoothquant": {"vllm", "sglang"},
    "int8-weight-only": {"vllm"},
    "int8-experts": {"trtllm", "vllm"},
    "int4": {"trtllm", "vllm", "sglang"},
    "int4-all": {"vllm"},
    "int4-asym": {"vllm"},
    "int4-gptq": {"trtllm", "vllm", "sglang"},
    "int4-awq": {"trtllm", "vllm", "sglang"},
    "int4-all-gptq": {"vllm"},
    "int4-all-awq": {"vllm"},
    "int8-asym": set(),
    "int8-block": {"sglang"},
    "w4a8": {"trtllm", "sglang"},
}


@pytest.mark.parametrize("fp8", [True, False])
def test_where_deepseek_v3_2_loads(fp8: bool) -> None:
    """Its indexer stays as released: beside INT8, SGLang would need two layouts for FP8 tiles; for
    TensorRT-LLM it is refused. No engine has kernels for its attention below Hopper."""
    config = ModelConfig.from_dict(config_dict(fp8=fp8, **V3_2))

    def loads(name: str, gpu: GpuGeneration) -> set[str]:
        recipe = load_recipe(name)
        schemes = served_schemes(config, recipe.resolve(config))
        return {t for t in TARGETS if not check(schemes, recipe.kv_cache, t, gpu)}

    assert loads("int8", "sm90") == ({"vllm"} if fp8 else {"vllm", "sglang"})
    assert loads("int4", "sm90") == {"vllm", "sglang"}
    assert loads("int4", "cpu") == loads("int8", "cpu") == {"embedded"}
    assert loads("int8", "sm80") == set()
    recipe = load_recipe("int8")
    schemes = served_schemes(config, recipe.resolve(config))
    (refusal,) = check(schemes, "bf16", "vllm", "sm80")
    form = "fp8-block" if fp8 else "bf16"
    assert refusal.sentence() == (
        f"vllm cannot load indexer as {form}: its sparse attention has kernels for Hopper and "
        "later only. Use Hopper GPUs."
    )


def test_the_table_below_names_every_built_in_recipe() -> None:
    assert set(LOADS) == set(builtin_recipes())


@pytest.mark.parametrize("name", LOADS)
def test_where_the_built_in_recipes_load_on_hopper(name: str, refusals) -> None:
    found = {t for t in ("trtllm", "vllm", "sglang") if not refusals(name, t)}
    assert found == LOADS[name]
    assert not refusals(name, "embedded", "cpu")


@pytest.mark.parametrize(("recipe", "form"), [("int8", "int8-a8"), ("int8-block", "int8-block-a8")])
def test_tensorrt_llm_has_no_int8_w8a8(refusals, recipe: str, form: str) -> None:
    (refusal,) = refusals(recipe, "trtllm")
    assert refusal.part == f"every linear as {form}"
    assert "no INT8 W8A8" in refusal.reason


@pytest.mark.parametrize("gpu", ["sm80", "sm90"])
def test_int8_tiles_are_sglangs_alone_among_the_gpu_engines(refusals, gpu: GpuGeneration) -> None:
    assert not refusals("int8-block", "sglang", gpu)
    (refusal,) = refusals("int8-block", "vllm", gpu)
    assert refusal.part == "every linear as int8-block-a8"
    assert "none per tile" in refusal.reason
    assert refusal.change == "Use the recipe int8, or --target sglang"
    (refusal,) = refusals("int8-block", "transformers", gpu)
    assert refusal.part == "routed_experts as int8-block-a8"


def test_sglang_takes_no_int8_tiles_beside_other_formats(refusals) -> None:
    recipe = recipe_of(
        {"match": "*", "weights": "int8-block", "activations": "int8"},
        {"match": "*.o_proj", "weights": "int8", "activations": "int8"},
    )
    (refusal,) = refusals(recipe, "sglang", "sm80")
    assert refusal.part == "int8-a8 and int8-block-a8 in one model"
    assert "W8A8 INT8 in tiles (blockwise_int8)" in refusal.reason


def test_tensorrt_llm_reads_mla_projections_only_as_bf16_or_fp8_blocks(refusals) -> None:
    rest, refusal = refusals("int8-weight-only", "trtllm")
    assert refusal.part == "kv_a_proj_with_mqa, kv_b_proj and q_a_proj as int8"
    assert '{match: "*.kv_b_proj", weights: source}' in refusal.change
    assert rest.part == "dense_mlp, o_proj, q_b_proj and shared_experts as int8"


def test_tensorrt_llm_is_built_int8_and_int4_for_routed_experts_only(refusals) -> None:
    for weights in ({"weights": "int8"}, {"weights": "int4", "group_size": 128}):
        experts = {"match": "*.mlp.experts.*"} | weights
        rest = {"match": "*", "weights": "source"}
        for form in ("source", "bf16"):
            assert not refusals(recipe_of(rest | {"weights": form}, experts), "trtllm")
        (refusal,) = refusals(recipe_of(rest, experts, {"match": "*.o_proj"} | weights), "trtllm")
        assert refusal.reason == EXPERTS_ONLY
        assert refusal.evidence == "inferred"
        assert '{match: "*.o_proj", weights: source}' in refusal.change


@pytest.mark.parametrize(
    ("kv_cache", "gpu", "loads"),
    [
        ("bf16", "sm90", {"trtllm", "vllm", "sglang", "transformers"}),
        ("fp8", "sm90", {"trtllm", "vllm", "sglang"}),
        ("int8", "sm90", set()),
        ("fp8", "sm80", set()),
        ("bf16", "cpu", {"embedded", "transformers"}),
        ("int8", "cpu", {"embedded"}),
        ("fp8", "cpu", set()),
    ],
)
def test_where_kv_formats_load(
    kv_cache: str, gpu: GpuGeneration, loads: set[str], refusals
) -> None:
    recipe = recipe_of(kv_cache=kv_cache)
    assert {t for t in TARGETS if not refusals(recipe, t, gpu)} == loads


@pytest.mark.parametrize("target", ["trtllm", "vllm", "sglang"])
@pytest.mark.parametrize("name", LOADS)
def test_following_the_advice_on_recipe_rules_makes_it_load(
    name: str, target: str, refusals
) -> None:
    recipe = load_recipe(name)
    for _ in range(3):
        found = refusals(recipe, target)
        rules = [
            yaml.safe_load(rule)
            for refusal in found
            for rule in re.findall(r"\{match:[^}]*\}", refusal.change)
        ]
        if not rules:
            break
        kept = [rule.model_dump(exclude_defaults=True) for rule in recipe.rules]
        recipe = recipe_of(*kept, *rules)
    assert not found or "--target" in found[0].change, [r.sentence() for r in found]


def test_static_fp8_activations_load_for_routed_experts_in_groups_of_128_only(refusals) -> None:
    rest = {"match": "*", "weights": "source"}
    w4a8 = {"weights": "int4", "group_size": 128, "activations": "fp8"}
    everywhere = recipe_of({"match": "*", **w4a8})
    narrow = recipe_of(rest, {"match": "*.mlp.experts.*", **w4a8, "group_size": 64})
    for recipe in (everywhere, narrow):
        for target in ("trtllm", "vllm", "sglang"):
            assert refusals(recipe, target), target
        assert not refusals(recipe, "embedded", "cpu")
    assert refusals("w4a8", "sglang", "sm80")
    (refusal,) = refusals("w4a8", "vllm")
    assert "refuses static ones" in refusal.reason


def test_zero_points_of_8_bits_load_in_vllm_on_hopper_outside_the_experts_and_qkv_a(
    refusals,
) -> None:
    parts = [refusal.part for refusal in refusals("int8-asym", "vllm")]
    assert parts == ["kv_a_proj_with_mqa and q_a_proj as int8-asym", "routed_experts as int8-asym"]
    dense = recipe_of(
        {"match": "*", "weights": "int8"}, {"match": "*.o_proj", "weights": "int8-asym"}
    )
    assert not refusals(dense, "vllm")
    assert refusals(dense, "vllm", "sm80")
    assert refusals(dense, "sglang")


def test_measured_kv_scales_are_said_to_be_read_by_nobody(config: ModelConfig) -> None:
    schemes = served_schemes(config, load_recipe("int4").resolve(config))
    for target, words in (("vllm", "kv_latent_amax"), ("trtllm", "calibrated KV scales are")):
        assert any(words in note for note in examine(schemes, "fp8", target, "sm90").notes)


def test_fused_linears_need_one_format(refusals) -> None:
    recipe = recipe_of(
        {"match": "*", "weights": "source"},
        {"match": "*.q_a_proj", "weights": "bf16"},
        {"match": "*.layers.2.mlp.experts.3.down_proj", "weights": "bf16"},
    )
    for target in ("trtllm", "vllm", "sglang"):
        parts = [refusal.part for refusal in refusals(recipe, target)]
        assert parts == [
            "q_a_proj with kv_a_proj_with_mqa of layer 0 and 3 more",
            "all routed experts of layer 2",
        ]
    assert not refusals(recipe, "embedded", "cpu")


def test_sglang_takes_one_layout_per_model(refusals) -> None:
    mixed = recipe_of(
        {"match": "*", "weights": "source"},
        {"match": "*.mlp.experts.*", "weights": "int8", "activations": "int8"},
    )
    (refusal,) = refusals(mixed, "sglang")
    assert refusal.part == "fp8-block and int8-a8 in one model"
    assert not refusals(mixed, "vllm")
    small_groups = recipe_of(
        {"match": "*", "weights": "source"},
        {"match": "*.mlp.experts.*", "weights": "int4", "group_size": 32},
    )
    assert refusals(small_groups, "sglang")
    assert not refusals(small_groups, "vllm")


def test_ampere_is_refused_once_and_not_part_by_part(refusals) -> None:
    (refusal,) = refusals("int4-asym", "trtllm", "sm80")
    assert refusal.part == "anything on this hardware"


def test_the_mtp_layer_counts_only_when_it_is_served(config: ModelConfig) -> None:
    schemes = load_recipe("int8").resolve(config)
    assert check(schemes, "bf16", "sglang", "sm90")  # its FP8 blocks beside W8A8
    assert not check(served_schemes(config, schemes), "bf16", "sglang", "sm90")
    assert len(served_schemes(config, schemes, mtp=True)) == len(schemes)


def test_conditions_are_told_although_it_loads(config: ModelConfig) -> None:
    schemes = served_schemes(config, load_recipe("int4").resolve(config))
    found = examine(schemes, "fp8", "trtllm", "sm90")
    assert not found.refusals
    assert any("W4AFP8" in note and "the dialect single" in note for note in found.notes)
    assert any("constant scale 1" in note for note in found.notes)


def test_an_unknown_target_gets_one_sentence(config: ModelConfig) -> None:
    with pytest.raises(DeployError, match="target 'tgi' is unknown; use one of trtllm, vllm"):
        check({}, "bf16", "tgi", "sm90")
