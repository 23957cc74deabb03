"""The matrix: total, free of dead rows, true to the known facts."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
from support.plans import recipe_of
from support.synthetic import V3_2, config_dict

from cluster.deployability import ARTIFACT_ROWS, ROWS, check, examine, find_row, served_schemes
from cluster.hardware import GpuGeneration
from cluster.matrix import (
    BF16,
    ENGINE_VERSIONS,
    FORMATS,
    FP8,
    HEAD,
    HEAD_FORMATS,
    INDEXER,
    KV_CACHE,
    KV_FORMATS,
    PARTS,
    TARGETS,
    Handed,
    Refusal,
)
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
    yield from product(GENERATIONS, sorted(PARTS), sorted(FORMATS))
    yield from product(GENERATIONS, sorted(INDEXER), sorted(BF16 | FP8))
    yield from product(GENERATIONS, sorted(HEAD), sorted(HEAD_FORMATS))
    yield from product(GENERATIONS, [KV_CACHE], sorted(KV_FORMATS))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("handed", ["engine", "artifact"])
def test_every_cell_has_a_row_and_every_row_a_cell(target: str, handed: Handed) -> None:
    rows = (ROWS if handed == "engine" else ARTIFACT_ROWS).get(target, ())
    used = {
        find_row(target, gpu, part, form, version, handed=handed)
        for version in ENGINE_VERSIONS[target]
        for gpu, part, form in cells()
        if rows
    }
    assert used == set(rows)


ALL_ROWS = [row for table in (ROWS, ARTIFACT_ROWS) for rows in table.values() for row in rows]


def test_every_refusal_says_why_and_what_to_change() -> None:
    for row in ALL_ROWS:
        assert row.source
        if not row.loads:
            for words in (row.text, row.change):
                assert words, row
                assert not words.endswith("."), row


def test_no_row_claims_more_than_its_evidence() -> None:
    """What was executed names its test; what loads on a GPU says what is known of its kernels."""
    for row in ALL_ROWS:
        assert (row.evidence == "executed") == bool(row.test), row
        assert set(row.versions) <= set(ENGINE_VERSIONS[row.target]), row
        needs_kernels = row.loads and row.target not in ("transformers", "embedded")
        assert bool(row.kernels) == needs_kernels, row


#: recipe -> GPU engines on Hopper that load what is built of it.
LOADS = {
    "int8": {"vllm", "sglang"},
    "int8-smoothquant": {"vllm", "sglang"},
    "int8-weight-only": {"vllm", "sglang"},
    "int8-experts": {"trtllm", "vllm", "sglang"},
    "int4": {"trtllm", "vllm", "sglang"},
    "int4-all": {"vllm", "sglang"},
    "int4-asym": {"vllm"},
    "int4-gptq": {"trtllm", "vllm", "sglang"},
    "int4-awq": {"trtllm", "vllm", "sglang"},
    "int4-all-gptq": {"vllm", "sglang"},
    "int4-all-awq": {"vllm", "sglang"},
    "int8-asym": set(),
    "int8-block": {"sglang"},
    "w4a8": {"trtllm", "sglang"},
    "int4-a8": set(),
    "int4-a8-gptq": set(),
    "int8-head": {"vllm"},
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


def test_tensorrt_llm_has_no_int8_w8a8(refusals) -> None:
    (refusal,) = refusals("int8", "trtllm")
    assert refusal.part == "every linear as int8-a8"
    assert "no INT8 W8A8" in refusal.reason
    assert refusal.change == (
        'Use the recipe int8-experts or int4, or add to this one {match: "*", weights: source} '
        'and {match: "*.mlp.experts.*", weights: int8}'
    )


@pytest.mark.parametrize("gpu", ["sm80", "sm90"])
def test_int8_tiles_are_served_by_sglang_and_not_by_vllm(refusals, gpu: GpuGeneration) -> None:
    assert not refusals("int8-block", "sglang", gpu)
    by_vllm = refusals("int8-block", "vllm", gpu)
    assert by_vllm
    for refusal in by_vllm:
        assert refusal.part.endswith("as int8-block-a8")
        assert "recipe int8" in refusal.change
    assert not refusals("int8-block", "transformers", gpu)  # for looking, not for serving


def test_sglang_takes_no_int8_tiles_beside_other_formats(refusals) -> None:
    recipe = recipe_of(
        {"match": "*", "weights": "int8-block", "activations": "int8"},
        {"match": "*.o_proj", "weights": "int8", "activations": "int8"},
    )
    (refusal,) = refusals(recipe, "sglang", "sm80")
    assert refusal.part == "int8-a8 and int8-block-a8 in one model"
    assert "one layout for the whole model" in refusal.reason
    assert "(blockwise_int8)" in refusal.reason


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
        ("fp8", "cpu", {"embedded"}),
    ],
)
def test_where_kv_formats_load(
    kv_cache: str, gpu: GpuGeneration, loads: set[str], refusals
) -> None:
    recipe = recipe_of(kv_cache=kv_cache)
    assert {t for t in TARGETS if not refusals(recipe, t, gpu)} == loads


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
    for target, words in (
        ("vllm", "kv_latent_amax"),
        ("sglang", "one scale, which is 1"),
        ("trtllm", "calibrated KV scales are"),
    ):
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
    packed = recipe_of(
        {"match": "*", "weights": "source"},
        {"match": "*.mlp.experts.*", "weights": "int4", "group_size": 32},
        {"match": "*.o_proj", "weights": "int8"},
    )
    assert not refusals(packed, "sglang")
    beside_bf16 = recipe_of(
        {"match": "*", "weights": "bf16"},
        {"match": "*.mlp.experts.*", "weights": "int4", "group_size": 128, "activations": "fp8"},
    )
    (refusal,) = refusals(beside_bf16, "sglang")  # w4afp8 has every other linear in FP8 blocks
    assert refusal.part == "bf16 and int4-g128-afp8 in one model"


def test_transformers_reads_an_artifact_by_one_scheme_for_the_experts_and_one_for_the_rest(
    config: ModelConfig,
) -> None:
    two = recipe_of(
        {"match": "*", "weights": "source"},
        {"match": "*.mlp.experts.*", "weights": "int8"},
        {"match": "*.o_proj", "weights": "int8"},
    )
    schemes = served_schemes(config, two.resolve(config))
    assert not check(schemes, "bf16", "transformers", "cpu")  # what is built for it has one
    found = examine(schemes, "bf16", "transformers", "cpu", handed="artifact")
    (refusal,) = found.refusals
    assert refusal.part == "fp8-block and int8 in one model"


def test_the_artifact_itself_is_another_question_than_what_is_built_of_it(
    config: ModelConfig,
) -> None:
    def artifact(name: str, target: str) -> list[str]:
        schemes = served_schemes(config, load_recipe(name).resolve(config))
        found = examine(schemes, "bf16", target, "sm90", handed="artifact")
        return [refusal.reason for refusal in found.refusals]

    (reason,) = artifact("int8", "sglang")
    assert "on NPUs only" in reason
    (reason,) = artifact("w4a8", "sglang")
    assert "refuses static ones" in reason
    for name in ("int8", "int8-asym", "int4-asym"):
        assert artifact(name, "transformers"), name
    for name in ("int4", "int4-gptq", "int4-awq", "int8-experts"):
        assert artifact(name, "sglang") == []
        assert artifact(name, "vllm") == artifact(name, "transformers") == []
    assert "layouts of its own" in artifact("int4", "trtllm")[0]


def test_a_version_of_the_target_has_rows_of_its_own(config: ModelConfig) -> None:
    schemes = served_schemes(config, load_recipe("int4").resolve(config))
    notes = {
        version: examine(schemes, "bf16", "trtllm", "sm90", version).notes
        for version in ENGINE_VERSIONS["trtllm"]
    }
    assert "smoke-tested on the exact wheel" in notes["1.2.1"][0]
    assert "#18393" in notes["1.3.0rc29"][0]


@pytest.mark.parametrize(
    ("target", "version", "sentence"),
    [
        ("vllm", "0.11.0", "vllm '0.11.0' is not known to us; use --engine-version 0.32.0"),
        ("trtllm", "1.3.0rc20", "DeepSeek-V3 hangs in its warm-up"),
        ("embedded", "1", "--engine-version means nothing to target embedded; leave it out"),
    ],
)
def test_an_unknown_version_gets_one_sentence(target: str, version: str, sentence: str) -> None:
    with pytest.raises(DeployError, match=sentence.replace("(", "[(]")):
        check({}, "bf16", target, "sm90", version)


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
