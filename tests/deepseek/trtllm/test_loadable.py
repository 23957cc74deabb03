"""What TensorRT-LLM cannot load gets one sentence before anything is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.plans import recipe_of
from support.synthetic import V3_2, config_dict

from deepseek.artifact.ranks import require_ranks
from deepseek.config import ModelConfig
from deepseek.errors import DeployError
from deepseek.inventory import linears
from deepseek.models import MOONLIGHT
from deepseek.recipe import Recipe, builtin_recipes, load_recipe, source_scheme
from deepseek.trtllm.layout import Dialect
from deepseek.trtllm.loadable import NO_INT8_TILES, check_loadable, problems
from deepseek.trtllm.versions import EngineVersion

EXPERTS = "model.layers.*.mlp.experts.*"
SOURCE = {"match": "*", "weights": "source"}
INT4 = {"match": EXPERTS, "weights": "int4", "group_size": 128}
#: Built-in recipes with linears that no dialect holds.
NOT_FOR_TENSORRT_LLM = {
    *("int8", "int8-smoothquant", "int8-weight-only", "int8-asym", "int8-block", "int4-all"),
    *("int4-all-awq", "int4-all-gptq", "int4-asym", "int4-a8", "int4-a8-gptq", "int8-head"),
}
#: Head dimensions and widths of DeepSeek-V3, in small.
WIDE: dict[str, Any] = {
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "moe_intermediate_size": 1024,
    "intermediate_size": 1024,
}


def model(**overrides: Any) -> ModelConfig:
    return ModelConfig.from_dict(config_dict(**{"layers": 3, "experts": 8} | WIDE | overrides))


def check(
    config: ModelConfig,
    recipe: Recipe | str | None = "int4",
    dialect: Dialect = "mixed",
    ranks: tuple[int, int] = (8, 8),
    *,
    mtp: bool = False,
    version: EngineVersion = "1.2.1",
) -> None:
    """`recipe` None is the source as it is."""
    if recipe is None:
        schemes = {
            spec.module: source_scheme(config)
            for layer in range(config.num_layers_with_mtp)
            for spec in linears(config, layer)
        }
    else:
        loaded = load_recipe(recipe) if isinstance(recipe, str) else recipe
        schemes = loaded.resolve(config)
    check_loadable(config, schemes, dialect, require_ranks(*ranks), mtp=mtp, version=version)


@pytest.mark.parametrize("ranks", [(1, 1), (8, 8), (8, 1), (4, 2), (8, 4)])
@pytest.mark.parametrize("dialect", ["mixed", "single"])
@pytest.mark.parametrize("recipe", ["int4", "int4-gptq", "w4a8", "int8-experts"])
def test_what_build_makes_of_such_a_model_loads(
    recipe: str, dialect: Dialect, ranks: tuple[int, int]
) -> None:
    check(model(), recipe, dialect, ranks)
    check(model(fp8=False), recipe, dialect, ranks)


def test_so_does_a_release_and_an_mtp_layer_that_is_kept() -> None:
    for fp8 in (True, False):
        check(model(fp8=fp8), None, "released")
        check(model(fp8=fp8), None, "released", mtp=True)
        check(model(fp8=fp8), mtp=True)


def test_a_model_without_a_query_latent_loads_as_far_as_its_widths_go() -> None:
    """Moonlight: an expert of 1408 = 11 x 128 is whole on one rank only."""
    config = replace(MOONLIGHT, num_hidden_layers=2)
    check(config, ranks=(8, 8))
    with pytest.raises(DeployError, match=r"352 of an expert's 1408 inner .* use --ep 8$"):
        check(config, ranks=(8, 2))
    check(config, "int8-experts", ranks=(2, 1))  # 704 = 11 x 64


EXPERTS_ONLY = "IntServe builds INT8 and INT4 for routed experts only there; give every other"
#: What is asked of `model()` -> the sentence after "trtllm cannot load ".
SENTENCES: list[tuple[dict[str, Any], str]] = [
    (
        {"recipe": "int8"},
        "model.layers.0.self_attn.q_a_proj and 71 more as int8-a8: TensorRT-LLM 1.2 has no INT8 "
        "W8A8 kernels on Hopper; use the recipe int8-experts or int4, or serve it with vLLM",
    ),
    (
        {"recipe": "int8-weight-only"},
        f"model.layers.0.self_attn.q_a_proj and 23 more as int8: {EXPERTS_ONLY} linear "
        "`weights: source`, as the recipes int4 and int8-experts do, and quantize again",
    ),
    (
        {"recipe": "int4-all", "dialect": "single"},
        f"model.layers.0.self_attn.q_a_proj and 23 more as int4-g128: {EXPERTS_ONLY}",
    ),
    (
        {"recipe": recipe_of(SOURCE, INT4 | {"weights": "int4-asym"})},
        "model.layers.1.mlp.experts.0.gate_proj and 47 more as int4-asym-g128: its kernels for "
        "INT8 and INT4 experts take no zero points; give them `weights: int4` and quantize again",
    ),
    (
        {"recipe": recipe_of(SOURCE, INT4 | {"group_size": 64})},
        "model.layers.1.mlp.experts.0.gate_proj and 47 more as int4-g64: its INT4 experts (W4AFP8) "
        "are symmetric with groups of 128 only; give them group_size 128 and quantize again",
    ),
    (
        {"recipe": recipe_of(SOURCE, INT4, {"match": "*.experts.3.up_proj", "weights": "bf16"})},
        "model.layers.1.mlp.experts.0.gate_proj as int4 and model.layers.1.mlp.experts.3.up_proj "
        "as bf16 in the experts of layer 1: it holds them as one module, which has one format; "
        "give them one format in the recipe and quantize again",
    ),
    (
        {"recipe": recipe_of(SOURCE, INT4, {"match": "*.q_a_proj", "weights": "bf16"})},
        "model.layers.0.self_attn.q_a_proj as bf16 and model.layers.0.self_attn.kv_a_proj_with_mqa "
        "as fp8-block in model.layers.0.self_attn.qkv_a_proj: it holds them as one module",
    ),
    (
        {
            "recipe": recipe_of(SOURCE, INT4, {"match": "*.2.mlp.experts.*", "weights": "int8"}),
            "dialect": "single",
        },
        "model.layers.2.mlp.experts.0.gate_proj as int8 and model.layers.1.mlp.experts.0.gate_proj "
        "as int4 in the dialect single: it has one quantization for all routed experts; use "
        "--dialect mixed",
    ),
    (
        {"recipe": None, "dialect": "single"},
        "model.layers.1.mlp.experts.0.gate_proj as fp8-block in the dialect single: it is one "
        "quantization, INT4 or INT8, of all routed experts; use --dialect mixed",
    ),
    (
        {"dialect": "released"},
        "routed experts as int4 in the dialect released: it is an unquantized source as it is; "
        "use --dialect mixed",
    ),
    (
        {"dialect": "single", "mtp": True},
        "the MTP layer in the dialect single: its experts stay as released, and all experts have "
        "one format there; leave out --mtp, or use --dialect mixed",
    ),
    (
        {"ranks": (3, 1)},
        "16 attention heads on 3 ranks: every rank holds whole heads; use --tp 2",
    ),
    (
        {"ranks": (32, 8)},
        "16 attention heads on 32 ranks: every rank holds whole heads; use --tp 16",
    ),
]


@pytest.mark.parametrize(("asked", "sentence"), SENTENCES)
def test_what_does_not_load_is_named_with_what_to_change(
    asked: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(DeployError) as caught:
        check(model(), **asked)
    assert str(caught.value).startswith(f"trtllm cannot load {sentence}")


#: Shapes that differ from `model()`, and what is asked -> the sentence.
SHAPES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        V3_2,
        {},
        "the indexer: the loader makes garbage of an FP8 linear that its config does not list, "
        "without an error, and its names of the indexer were not checked; serve it with vLLM or "
        "SGLang",
    ),
    ({"num_nextn_predict_layers": 0}, {"mtp": True}, "an MTP layer: the model has none; leave out"),
    (
        {"n_routed_experts": 6, "n_group": 2},
        {"ranks": (8, 4)},
        "6 routed experts in 4 groups: every group holds equally many experts; use --ep 2",
    ),
    (
        {"moe_intermediate_size": 512},
        {"ranks": (8, 1)},
        "routed experts as int4 on --tp 8 --ep 1: 64 of an expert's 512 inner channels for each "
        "of 8 ranks are no multiple of 128; use --ep 2",
    ),
    (
        {"moe_intermediate_size": 1152, "n_routed_experts": 4},
        {"ranks": (16, 4), "dialect": "single"},
        "routed experts as int4 on --tp 16 --ep 4: 288 of an expert's 1152 inner channels for each "
        "of 4 ranks are no multiple of 128; use a smaller --tp",
    ),
    (
        {"moe_intermediate_size": 256},
        {"recipe": "int8-experts", "ranks": (8, 1)},
        "routed experts as int8 on --tp 8 --ep 1: 32 of an expert's 256 inner channels for each of "
        "8 ranks are no multiple of 64; use --ep 2",
    ),
    (
        {"qk_nope_head_dim": 64},
        {},
        "model.layers.0.self_attn.kv_b_proj as fp8-block: the outputs of a head for keys "
        "(qk_nope_head_dim), 64, are no multiple of 128; use --dialect single",
    ),
    (
        {"v_head_dim": 64},
        {},
        "model.layers.0.self_attn.kv_b_proj as fp8-block: the outputs of a head for values "
        "(v_head_dim), 64, are no multiple of 128; use --dialect single",
    ),
    (
        {"q_lora_rank": 192},
        {},
        "model.layers.0.self_attn.q_a_proj as fp8-block: its outputs, 192, are no multiple of 128; "
        "use --dialect single",
    ),
    (
        {"kv_lora_rank": 192},
        {"recipe": recipe_of(SOURCE)},
        "model.layers.0.self_attn.kv_b_proj as fp8-block: its inputs, 192, are no multiple of 128; "
        "use --dialect single",
    ),
    (
        {"qk_rope_head_dim": 32},
        {},
        "model.layers.0.self_attn.q_b_proj as fp8-block: its outputs, 320 for each of 8 ranks, are "
        "no multiple of 128; use --dialect single or --tp 4",
    ),
    (
        {"intermediate_size": 1088},
        {"dialect": "single"},
        "a dense MLP 1088 wide: it takes multiples of 128 beside quantized linears; serve it with "
        "vLLM",
    ),
]


@pytest.mark.parametrize(("shapes", "asked", "sentence"), SHAPES)
def test_what_a_rank_would_get_a_part_of_is_refused(
    shapes: dict[str, Any], asked: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(DeployError) as caught:
        check(model(**shapes), **asked)
    assert str(caught.value).startswith(f"trtllm cannot load {sentence}")


def test_the_advice_to_use_the_dialect_single_works() -> None:
    for shapes, asked, sentence in SHAPES:
        if "use --dialect single" in sentence and asked.get("recipe") is None:
            check(model(**shapes), dialect="single")


def test_a_release_whose_kv_b_is_dequantized_on_loading_may_have_narrow_heads() -> None:
    """The tiny example; TensorRT-LLM 1.2 keeps the tiles, 1.3 makes BF16 of them."""
    config = model(qk_nope_head_dim=64, qk_rope_head_dim=64)
    check(config, None, "released", version="1.3.0rc29")
    with pytest.raises(DeployError, match="qk_nope_head_dim"):
        check(config, None, "released", version="1.2.1")


def test_the_example_model_loads_in_the_dialect_single(tiny_model: Path) -> None:
    config = ModelConfig.from_directory(tiny_model)
    check(config, "w4a8", "single", (2, 2))
    with pytest.raises(DeployError, match="qk_nope_head_dim"):
        check(config, "w4a8", "mixed", (1, 1))


@pytest.mark.parametrize(
    ("tp", "ep", "sentence"),
    [
        (8, 3, "--ep 3 does not divide --tp 8: .*; use --ep 2$"),
        (8, 16, "--ep 16 does not divide --tp 8: .*; use --ep 8$"),
        (0, 1, "--tp 0 --ep 1: both must be at least 1"),
        (8, -1, "--tp 8 --ep -1: both must be at least 1"),
    ],
)
def test_ranks_that_cannot_be_grouped_are_refused(tp: int, ep: int, sentence: str) -> None:
    with pytest.raises(DeployError, match=sentence):
        require_ranks(tp, ep)


@pytest.mark.parametrize("recipe", builtin_recipes())
def test_whoever_asks_for_all_problems_of_a_recipe_gets_them(recipe: str) -> None:
    """Formats that no kernel takes are named once, and ask for nothing of the ranks."""
    config = model()
    schemes = load_recipe(recipe).resolve(config)
    ranks = require_ranks(8, 8)
    found = list(problems(config, schemes, "mixed", ranks, mtp=False, version="1.2.1"))
    assert len({problem.sentence() for problem in found}) == len(found)
    if recipe == "int8-block":
        assert [problem.reason for problem in found] == [NO_INT8_TILES]
    assert bool(found) == (recipe in NOT_FOR_TENSORRT_LLM)
