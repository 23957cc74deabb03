"""A recipe gives every linear its scheme, and no key of it is silently ignored."""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import pytest
from support.synthetic import V3_2, config_dict

from deepseek.config import ModelConfig
from deepseek.errors import RecipeError
from deepseek.inventory import linears
from deepseek.models import DEEPSEEK_V3
from deepseek.recipe import Recipe, Scheme, builtin_recipes, load_recipe, parse_recipe

GATE = {"max_perplexity_ratio": 1.1, "max_mean_kl": 0.1, "min_top1": 0.9}
FP8 = ModelConfig.from_dict(config_dict(layers=3))
BF16 = ModelConfig.from_dict(config_dict(layers=3, fp8=False))
V32 = ModelConfig.from_dict(config_dict(layers=3, **V3_2))
V32_BF16 = ModelConfig.from_dict(config_dict(layers=3, fp8=False, **V3_2))


TILES = {"match": "*", "weights": "int8-block", "activations": "int8"}


def raw_recipe(*rules: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": "t", "description": "", "rules": list(rules), "gate": GATE} | more


def recipe_of(*rules: dict[str, Any], **more: Any) -> Recipe:
    return parse_recipe(raw_recipe(*rules, **more), where="t.yaml")


@pytest.mark.heavy
@pytest.mark.parametrize("name", builtin_recipes())
@pytest.mark.parametrize("config", [DEEPSEEK_V3, FP8, BF16], ids=["v3", "fp8", "bf16"])
def test_every_built_in_recipe_resolves_every_linear(name: str, config: ModelConfig) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    schemes = recipe.resolve(config)
    modules = {
        spec.module
        for layer in range(config.num_layers_with_mtp)
        for spec in linears(config, layer)
    }
    named = {"lm_head"} if name.startswith("int4-a8") or name == "int8-head" else set()
    assert set(schemes) == modules | named
    assert all(scheme.weights != "source" for scheme in schemes.values())


def test_the_recipes_of_the_design_are_built_in() -> None:
    recipes = {"int8", "int8-weight-only", "int8-experts", "int4", "int4-all", "int4-asym"}
    assert recipes <= set(builtin_recipes())


def test_int8_experts_quantizes_routed_experts_as_int8_weight_only_does() -> None:
    experts, everything = (load_recipe(name) for name in ("int8-experts", "int8-weight-only"))
    for config, native in ((FP8, "fp8-block"), (BF16, "bf16")):
        schemes, every = experts.resolve(config), everything.resolve(config)
        for module, scheme in schemes.items():
            is_carried = int(module.split(".")[2]) >= config.num_hidden_layers
            if ".experts." in module and not is_carried:
                assert scheme == every[module]
                assert (scheme.weights, scheme.activations) == ("int8", "none")
            else:
                assert scheme.weights == native
    assert experts.gate == everything.gate


def test_int4_quantizes_routed_experts_and_keeps_the_rest_as_the_source_has_it() -> None:
    for config, native in ((FP8, "fp8-block"), (BF16, "bf16")):
        schemes = load_recipe("int4").resolve(config)
        assert schemes["model.layers.1.mlp.experts.2.up_proj"] == Scheme(
            weights="int4", group_size=128
        )
        assert schemes["model.layers.1.mlp.shared_experts.up_proj"].weights == native
        assert schemes["model.layers.0.mlp.up_proj"].weights == native
        assert schemes["model.layers.1.self_attn.o_proj"].weights == native


def test_the_last_rule_that_matches_wins() -> None:
    recipe = recipe_of(
        {"match": "*", "weights": "int8"},
        {"match": "*.experts.*", "weights": "int4", "group_size": 128},
        {"match": "model.layers.1.*", "weights": "int4-asym", "group_size": 64},
        {"match": "*.experts.3.down_proj", "weights": "source"},
    )
    schemes = recipe.resolve(FP8)
    assert schemes["model.layers.0.self_attn.o_proj"].label == "int8"
    assert schemes["model.layers.2.mlp.experts.0.up_proj"].label == "int4-g128"
    assert schemes["model.layers.1.mlp.experts.0.up_proj"].label == "int4-asym-g64"
    assert schemes["model.layers.1.mlp.experts.3.down_proj"].label == "fp8-block"
    assert schemes["model.layers.2.mlp.experts.3.down_proj"].label == "fp8-block"
    recipe.check_rules(FP8)
    reversed_rules = parse_recipe(
        recipe.model_dump() | {"rules": recipe.model_dump()["rules"][::-1]}, where="t"
    )
    assert {scheme.label for scheme in reversed_rules.resolve(FP8).values()} == {
        "int8",
        "fp8-block",  # MTP
    }


def test_linears_that_no_rule_matches_stay_as_the_source_has_them() -> None:
    recipe = recipe_of({"match": "*.o_proj", "weights": "int8"})
    schemes = recipe.resolve(FP8)
    assert schemes["model.layers.0.self_attn.o_proj"].weights == "int8"
    assert schemes["model.layers.0.self_attn.q_a_proj"].weights == "fp8-block"


def test_the_mtp_layer_is_carried_through_whatever_the_rules_say() -> None:
    schemes = load_recipe("int4-all").resolve(FP8)
    mtp = {s.weights for module, s in schemes.items() if module.startswith("model.layers.3.")}
    assert mtp == {"fp8-block"}


INT8_RULE = {"match": "*", "weights": "int8"}

REFUSED: list[tuple[dict[str, Any], str]] = [
    (raw_recipe({"match": "*", "weights": "int8"}, mood="good"), "unknown key 'mood'"),
    (raw_recipe({"match": "*", "weights": "int8", "bits": 8}), "unknown key 'rules.0.bits'"),
    (
        raw_recipe({"match": "*", "weights": "int8"}, gate=GATE | {"max_ppl": 2}),
        "unknown key 'gate.max_ppl'",
    ),
    (raw_recipe({"match": "*", "weights": "int3"}), "rules.0.weights: "),
    (raw_recipe({"weights": "int8"}), "rules.0.match: Field required"),
    (raw_recipe({"match": "*", "weights": "int8", "algorithm": "magic"}), "rules.0.algorithm: "),
    (raw_recipe({"match": "*", "weights": "int4"}), "weights int4 need group_size 32, 64 or 128"),
    (raw_recipe({"match": "*", "weights": "int4", "group_size": 100}), "need group_size 32"),
    (
        raw_recipe({"match": "*", "weights": "int8", "group_size": 128}),
        "group_size means nothing for weights int8",
    ),
    (
        raw_recipe({"match": "*", "weights": "bf16", "activations": "int8"}),
        "activations int8 need weights int8 or int8-block or int4 or int4-asym, not bf16",
    ),
    (
        raw_recipe({"match": "*", "weights": "int8-block"}),
        "weights int8-block need activations int8",
    ),
    (
        raw_recipe({"match": "*", "weights": "int8-block", "activations": "fp8"}),
        "activations fp8 need weights int4, not int8-block",
    ),
    (
        raw_recipe({**TILES, "group_size": 128}),
        "group_size means nothing for weights int8-block",
    ),
    (
        raw_recipe({**TILES, "algorithm": "awq"}),
        "awq searches the range of one output channel at a time",
    ),
    (
        raw_recipe({"match": "*", "weights": "int8", "algorithm": "smoothquant"}),
        "smoothquant needs activations int8",
    ),
    (
        raw_recipe({"match": "*", "weights": "int8", "smoothing": 0.7}),
        "smoothing means nothing without smoothquant",
    ),
    (
        raw_recipe(
            {
                "match": "*",
                "weights": "int8",
                "activations": "int8",
                "algorithm": "smoothquant",
                "smoothing": 1.5,
            }
        ),
        "rules.0.smoothing: ",
    ),
    (
        raw_recipe({"match": "*", "weights": "int8", "damping": 0.1}),
        "damping means nothing without gptq",
    ),
    (
        raw_recipe({"match": "*", "weights": "int8", "activations": "fp8"}),
        "activations fp8 need weights int4, not int8",
    ),
    (
        raw_recipe({"match": "*", "weights": "bf16", "algorithm": "gptq"}),
        "gptq means nothing for weights bf16",
    ),
    (
        raw_recipe({"match": "*", "weights": "int8", "algorithm": "awq", "clip": "mse"}),
        "awq searches its own clipping",
    ),
    (raw_recipe(), "rules: "),
    (raw_recipe({"match": "*", "weights": "int8"}, kv_cache="int2"), "kv_cache: "),
    (raw_recipe({"match": "*", "weights": "int8"}, name="Not A Name"), "name: "),
    (raw_recipe({"match": "*", "weights": "int8"}, calibration={"num_blocks": 0}), "num_blocks: "),
    (raw_recipe({"match": "*", "weights": "int8"}, gate={}), "gate.max_perplexity_ratio: "),
    (
        raw_recipe({"match": "*" * 17, "weights": "int8"}),
        "rules.0.match: Value error, a pattern may",
    ),
    (raw_recipe({"match": "a" * 257, "weights": "int8"}), "rules.0.match: "),
    (raw_recipe({"match": "", "weights": "int8"}), "rules.0.match: "),
    (raw_recipe(*[{"match": "*", "weights": "int8"}] * 1025), "rules: "),
    (raw_recipe(INT8_RULE, calibration={"num_blocks": 65537}), "calibration.num_blocks: "),
    (raw_recipe(INT8_RULE, calibration={"block_tokens": 163841}), "calibration.block_tokens: "),
    (
        raw_recipe(INT8_RULE, calibration={"num_blocks": True}),
        "num_blocks: Value error, Input should",
    ),
    (raw_recipe(INT8_RULE, expert_coverage={"floor_tokens": 1 << 25}), "floor_tokens: "),
    (raw_recipe(INT8_RULE, expert_coverage={"shrink_tokens": 1 << 25}), "shrink_tokens: "),
    (raw_recipe(INT8_RULE, gate=GATE | {"max_fallbacks": True}), "not be true, a boolean"),
    (raw_recipe(INT8_RULE, gate=GATE | {"max_fallbacks": 1 << 32}), "gate.max_fallbacks: "),
    (raw_recipe(INT8_RULE, gate=GATE | {"min_top1": False}), "min_top1: Value error, Input should"),
    *(
        (raw_recipe(INT8_RULE, gate=GATE | {name: value}), f"gate.{name}: Input should be a finite")
        for name in ("max_perplexity_ratio", "max_mean_kl", "min_top1", "max_starved_experts")
        for value in (math.inf, math.nan, "1e400")
    ),
]


@pytest.mark.parametrize(("raw", "message"), REFUSED, ids=range(len(REFUSED)))
def test_a_recipe_that_is_wrong_is_refused_in_one_sentence(
    raw: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(raw, where="t.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("t.yaml: ")
    assert "\n" not in str(caught.value)


def test_a_group_size_that_does_not_divide_the_inputs_names_the_linear() -> None:
    config = ModelConfig.from_dict(config_dict(moe_intermediate_size=96, fp8=False))
    recipe = recipe_of({"match": "*.experts.*", "weights": "int4", "group_size": 64})
    with pytest.raises(RecipeError, match=r"group_size 64 .* 96 inputs of .*\.down_proj"):
        recipe.resolve(config)
    recipe_of({"match": "*.experts.*", "weights": "int4", "group_size": 32}).resolve(config)


@pytest.mark.parametrize("match", ["*.q_proj", "model.layers.9.*", "lm_h*", "*.mlp.gate"])
def test_a_rule_without_effect_is_refused(match: str) -> None:
    """The last two: the head is matched by its whole name only, and the router never quantized."""
    recipe = recipe_of({"match": "*", "weights": "int8"}, {"match": match, "weights": "int8"})
    with pytest.raises(RecipeError, match="matches no linear of this model"):
        recipe.resolve(FP8)


STAR = {"match": "*", "weights": "int8"}
HEAD_INT8 = {"match": "lm_head", "weights": "int8", "activations": "int8"}


def test_the_head_stays_as_the_source_has_it_unless_a_rule_names_it() -> None:
    assert "lm_head" not in recipe_of(STAR).resolve(FP8)
    named = recipe_of(STAR, HEAD_INT8).resolve(FP8)
    assert list(named)[-1] == "lm_head"
    assert named.pop("lm_head").label == "int8-a8"
    assert named == recipe_of(STAR).resolve(FP8), "and the rule is about nothing else"
    again = recipe_of(HEAD_INT8, STAR)  # a star behind it takes nothing away
    assert again.resolve(FP8)["lm_head"].label == "int8-a8"
    again.check_rules(FP8)
    source = recipe_of(STAR, HEAD_INT8, {"match": "lm_head", "weights": "source"})
    assert "lm_head" not in source.resolve(FP8)
    with pytest.raises(RecipeError, match="'lm_head' decides nothing, because the later rule"):
        source.check_rules(FP8)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"weights": "fp8-block"}, "lm_head may have weights source, int8 or int4, with"),
        ({"weights": "int8-asym"}, "not int8-asym"),
        ({"weights": "bf16"}, "not bf16"),
        ({"weights": "int8-block", "activations": "int8"}, "not int8-block-a8"),
        ({"weights": "int4", "group_size": 128, "activations": "fp8"}, "not int4-g128-afp8"),
        ({"weights": "int8", "algorithm": "awq"}, "awq folds its scales into the tensor before"),
        (
            {"weights": "int8", "activations": "int8", "algorithm": "smoothquant"},
            "smoothquant folds its scales",
        ),
    ],
)
def test_what_the_head_cannot_be_is_refused_in_one_sentence(
    rule: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        recipe_of(STAR, {"match": "lm_head"} | rule)
    assert "\n" not in str(caught.value)


def test_a_group_size_must_divide_the_inputs_of_the_head_too() -> None:
    config = ModelConfig.from_dict(config_dict(hidden_size=96, fp8=False))
    head = {"match": "lm_head", "weights": "int4", "group_size": 64}
    with pytest.raises(RecipeError, match=r"group_size 64 .* 96 inputs of lm_head"):
        recipe_of({"match": "*.down_proj", "weights": "int8"}, head).resolve(config)


SHADOWED: list[tuple[list[dict[str, Any]], str]] = [
    ([{"match": "*.o_proj", "weights": "bf16"}, STAR], "'*.o_proj' .* later rule match '\\*' wins"),
    ([STAR, STAR], r"'\*' decides nothing, because the later rule match '\*' wins"),
    (
        [STAR, *({"match": f"*.layers.{n}.*", "weights": "bf16"} for n in (2, 0, 1))],
        r"'\*' decides nothing, because the later rule match '\*.layers.1.\*' and 2 more wins",
    ),
    (
        [
            {"match": "*.experts.3.*", "weights": "bf16"},
            {"match": "*.experts.*", "weights": "int8"},
        ],
        r"'\*.experts.3.\*' decides nothing, because the later rule match '\*.experts.\*' wins",
    ),
]


@pytest.mark.parametrize(("rules", "message"), SHADOWED, ids=range(len(SHADOWED)))
def test_a_rule_that_decides_no_linear_is_refused_with_the_one_that_does(
    rules: list[dict[str, Any]], message: str
) -> None:
    recipe = recipe_of(*rules)
    with pytest.raises(RecipeError, match=message) as caught:
        recipe.check_rules(FP8)
    assert "\n" not in str(caught.value)
    recipe.resolve(FP8)  # an artifact that was made so stays readable


@pytest.mark.parametrize("name", builtin_recipes())
def test_every_rule_of_a_built_in_recipe_decides_something(name: str) -> None:
    for config in (FP8, BF16):
        load_recipe(name).check_rules(config)


def test_a_rule_that_decides_a_single_linear_stays() -> None:
    recipe = recipe_of(
        STAR,
        *({"match": f"*.layers.{layer}.*", "weights": "bf16"} for layer in (0, 1)),
        {"match": "*.layers.2.mlp.*", "weights": "bf16"},
        {"match": "*.layers.2.self_attn.[!q]*", "weights": "bf16"},
        {"match": "*.layers.2.*.q_b_proj", "weights": "bf16"},
    )
    schemes = recipe.resolve(FP8)
    recipe.check_rules(FP8)
    assert [m for m, s in schemes.items() if s.weights == "int8"] == [
        "model.layers.2.self_attn.q_a_proj"
    ]


def test_patterns_of_many_stars_cost_no_time_worth_mentioning() -> None:
    """A glob is translated to a pattern without backtracking over its stars."""
    pattern = "*a" * 15 + "*b"
    recipe = recipe_of({"match": pattern, "weights": "int8"})
    spec = next(iter(linears(FP8, 0)))
    long = dataclasses.replace(spec, name="a" * 5000 + ".weight")
    assert recipe.scheme_for(long).weights == "source"


@pytest.mark.parametrize(
    ("config", "match"),
    [(FP8, "model.layers.3.*"), (V32, "*.indexer.*"), (V32, "*.indexer.wk"), (V32, "*.wq_b")],
)
def test_a_rule_for_what_stays_as_released_is_refused(config: ModelConfig, match: str) -> None:
    """Layer 3 is the MTP layer."""
    recipe = recipe_of({"match": "*", "weights": "int8"}, {"match": match, "weights": "int8"})
    words = "matches only linears of an MTP layer or an indexer, which stay as released; correct or"
    with pytest.raises(RecipeError, match=words):
        recipe.resolve(config)


@pytest.mark.parametrize(("config", "kept"), [(V32, "fp8-block"), (V32_BF16, "bf16")])
def test_no_rule_reaches_an_indexer(config: ModelConfig, kept: str) -> None:
    schemes = recipe_of({"match": "*", "weights": "int4", "group_size": 128}).resolve(config)
    indexer = {m: s.weights for m, s in schemes.items() if ".indexer." in m}
    assert len(indexer) == 2 * config.num_layers_with_mtp
    assert set(indexer.values()) == {kept}
    main = [s for m, s in schemes.items() if ".indexer." not in m and ".layers.3." not in m]
    assert {scheme.weights for scheme in main} == {"int4"}


def test_fp8_blocks_cannot_be_had_from_a_bf16_source() -> None:
    recipe = recipe_of({"match": "*.o_proj", "weights": "fp8-block"})
    with pytest.raises(RecipeError, match=r"o_proj asks for fp8-block, but the source is BF16"):
        recipe.resolve(BF16)
    assert recipe.resolve(FP8)["model.layers.0.self_attn.o_proj"].weights == "fp8-block"


def test_an_unknown_recipe_name_lists_the_built_in_ones() -> None:
    with pytest.raises(RecipeError, match="no recipe 'int5'; use a YAML file or one of int4, "):
        load_recipe("int5")


def test_a_recipe_may_be_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\ndescription: ''\nrules: [{match: '*', weights: int8}]\n"
        "gate: {max_perplexity_ratio: 1.1, max_mean_kl: 0.1, min_top1: 0.9}\n"
    )
    assert load_recipe(str(path)).rules[0].weights == "int8"


@pytest.mark.parametrize("text", ["rules: [", "name: !!python/object:os.system {}", "- a", ""])
def test_a_file_that_is_no_recipe_is_refused_in_one_sentence(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


VALID = "name: mine\ndescription: ''\nrules: [{match: '*', weights: int8}]\n" + (
    "gate: {max_perplexity_ratio: 1.1, max_mean_kl: 0.1, min_top1: 0.9}\n"
)
HOSTILE = {
    "a key twice": (VALID + "kv_cache: bf16\nkv_cache: int8\n", "gives the key 'kv_cache' twice"),
    "infinity": (VALID.replace("1.1", ".inf"), "holds .inf, which is no finite number"),
    "NaN": (VALID.replace("0.1", ".NaN"), "holds .NaN, which is no finite number"),
    "1e400": (VALID.replace("1.1", "1e400"), "gate.max_perplexity_ratio: Input should be a finite"),
    "null": ("null", "must hold a mapping of keys to values, not nothing"),
    "date": (VALID.replace("mine", "2024-01-01"), "holds 2024-01-01, which YAML reads as a date"),
    "boolean": (
        VALID + "calibration: {num_blocks: yes}\n",
        "num_blocks: Value error, Input should",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_yaml_reads_otherwise_than_it_looks_is_refused(tmp_path: Path, case: str) -> None:
    text, message = HOSTILE[case]
    path = tmp_path / "mine.yaml"
    path.write_text(VALID)
    load_recipe(str(path))
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path))
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_recipe_that_is_no_regular_file_is_refused_without_being_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, message in {
        tmp_path / "pipe": "is a pipe, not a regular file",
        tmp_path: "is a directory, not a regular file",
        Path("/dev/zero"): "is a device, not a regular file",
    }.items():
        with pytest.raises(RecipeError, match=f"{path} {message}"):
            load_recipe(str(path))
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(RecipeError, match="no recipe "):
            load_recipe(name)


@pytest.mark.parametrize("name", builtin_recipes())
def test_a_recipe_survives_the_manifest(name: str) -> None:
    recipe = load_recipe(name)
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
