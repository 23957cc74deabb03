"""What SGLang's layouts can hold, and what its groups are called for: from shapes alone."""

from __future__ import annotations

from typing import Any

import pytest
from support.synthetic import V3_2, config_dict

from deepseek.artifact.engine_manifest import RankLayout
from deepseek.artifact.ranks import require_ranks
from deepseek.config import ModelConfig
from deepseek.errors import DeployError
from deepseek.models import DEEPSEEK_V3
from deepseek.recipe import Recipe, Scheme, load_recipe, parse_recipe
from deepseek.sglang.layout import Dialect, fitting_dialect, require_dialect, stored_schemes
from deepseek.sglang.loadable import check_loadable
from deepseek.sglang.quant_config import sglang_quantization_config

GATE = {"max_perplexity_ratio": 1.1, "max_mean_kl": 0.1, "min_top1": 0.9}
TINY = ModelConfig.from_dict(config_dict(layers=3))
INT4: dict[str, Any] = {"weights": "int4", "group_size": 128}
INT8: dict[str, Any] = {"weights": "int8", "activations": "int8"}


def recipe_of(*rules: dict[str, Any]) -> Recipe:
    return parse_recipe(
        {"name": "t", "description": "", "rules": list(rules), "gate": GATE}, where="test"
    )


def refusal(
    recipe: Recipe | str, tp: int = 1, ep: int = 1, *, dialect: Dialect | None = None
) -> str:
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    schemes = recipe.resolve(TINY)
    with pytest.raises(DeployError) as refused:
        check_loadable(
            TINY,
            schemes,
            dialect or fitting_dialect(schemes),
            RankLayout(tp=tp, ep=ep),
            mtp=False,
        )
    return str(refused.value)


@pytest.mark.heavy
@pytest.mark.parametrize("recipe", ["int4-all", "w4a8"])
def test_deepseek_v3_loads_on_one_node_and_two(recipe: str) -> None:
    schemes = load_recipe(recipe).resolve(DEEPSEEK_V3)
    dialect = fitting_dialect(schemes)
    for tp in (8, 16):
        check_loadable(DEEPSEEK_V3, schemes, dialect, RankLayout(tp=tp, ep=tp), mtp=False)


@pytest.mark.parametrize(
    ("rules", "says"),
    [
        (
            [INT4 | {"match": "*.experts.*"}, INT4 | {"match": "*.q_a_proj"}],
            "it holds model.layers.0.self_attn.qkv_a_proj as one module",
        ),
        (
            [INT4 | {"match": "*.experts.*"}, {"match": "*.experts.*.up_proj", "weights": "int8"}],
            "it holds the experts of layer 1 as one module",
        ),
    ],
)
def test_what_it_fuses_has_one_format(rules: list[dict[str, Any]], says: str) -> None:
    assert says in refusal(recipe_of(*rules))


def test_a_layout_of_its_own_has_no_exceptions() -> None:
    said = refusal(recipe_of(INT8 | {"match": "*"}, {"match": "*.o_proj", "weights": "source"}))
    assert said.startswith("sglang cannot load model.layers.0.self_attn.o_proj and 2 others as ")
    assert "w8a8_int8 is INT8 with INT8 inputs for every linear, without exceptions" in said


def test_ranks_that_would_cut_groups_or_tiles_are_refused() -> None:
    narrow = ModelConfig.from_dict(config_dict(layers=2))
    schemes = load_recipe("int4").resolve(narrow)
    with pytest.raises(DeployError) as refused:
        check_loadable(narrow, schemes, "w4afp8", RankLayout(tp=2, ep=1), mtp=False)
    assert "q_b_proj as fp8-block: its outputs, 96 for each of 2 ranks, are" in str(refused.value)
    assert "heads on 4 ranks: every rank holds whole heads; use --tp 2" in refusal("int4", 4, 1)


@pytest.mark.parametrize(("tp", "ep"), [(0, 1), (4, 0), (-1, 1)])
def test_ranks_are_positive(tp: int, ep: int) -> None:
    with pytest.raises(DeployError, match="both must be at least 1"):
        require_ranks(tp, ep)


def test_an_indexer_is_refused() -> None:
    config = ModelConfig.from_dict(config_dict(layers=3, **V3_2))
    schemes = load_recipe("int4").resolve(config)
    with pytest.raises(DeployError, match="the indexer: DeepSeek-V3.2's indexer is fused there"):
        check_loadable(config, schemes, "compressed-tensors", RankLayout(tp=1, ep=1), mtp=False)


@pytest.mark.parametrize("name", ["", "mixed", "released", "w4afp8 ", "W4AFP8", "x" * 300])
def test_an_unknown_dialect_is_named_with_those_that_exist(name: str) -> None:
    with pytest.raises(DeployError, match="is unknown to target sglang; use one of w4afp8, ") as e:
        require_dialect(name)
    assert len(str(e.value)) < 300


def owners(recipe: Recipe, config: ModelConfig) -> dict[str, str]:
    """Format of every fused name and kv_b_proj, found as SGLang finds it."""
    from pathlib import Path

    from deepseek.sglang.loader_config import _read_groups

    stored = stored_schemes(config, recipe.resolve(config), "compressed-tensors")
    raw = sglang_quantization_config(config, stored, "compressed-tensors")
    assert raw is not None
    quant = _read_groups(Path("config.json"), raw)
    found = {}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        mlp = f"{prefix}.mlp.shared_experts" if config.is_moe(layer) else f"{prefix}.mlp"
        for name, parts in (
            (f"{mlp}.gate_up_proj", ("gate_proj", "up_proj")),
            (
                f"{prefix}.self_attn.fused_qkv_a_proj_with_mqa",
                ("q_a_proj", "kv_a_proj_with_mqa"),
            ),
            (f"{prefix}.self_attn.kv_b_proj", ("kv_b_proj",)),
        ):
            method = quant.linear(name, parts, "MergedColumnParallelLinear")
            found[name] = f"{method.kind}{method.bits or ''}"
    return found


@pytest.mark.parametrize(
    "rules",
    [
        [INT4 | {"match": "*.experts.*"}],
        [INT4 | {"match": "*"}],
        [INT4 | {"match": "*.experts.*"}, INT8 | {"match": "*.mlp.gate_proj"},
         INT8 | {"match": "*.mlp.up_proj"}],
        [INT4 | {"match": "*.experts.*"}, INT8 | {"match": "*.shared_experts.gate_proj"},
         INT8 | {"match": "*.shared_experts.up_proj"}],
        [INT4 | {"match": "*.experts.*"}, {"match": "*.q_a_proj", "weights": "bf16"},
         {"match": "*.kv_a_proj_with_mqa", "weights": "bf16"}],
        [INT4 | {"match": "*.experts.*"},
         {"match": "model.layers.2.mlp.shared*", "weights": "bf16"}],
    ],
)  # fmt: skip
def test_a_fused_linear_has_the_group_of_its_parts(rules: list[dict[str, Any]]) -> None:
    recipe = recipe_of(*rules)
    schemes = stored_schemes(TINY, recipe.resolve(TINY), "compressed-tensors")
    parts = {"gate_up_proj": "gate_proj", "fused_qkv_a_proj_with_mqa": "q_a_proj"}
    for name, found in owners(recipe, TINY).items():
        parent, _, role = name.rpartition(".")
        assert found == kind_of(schemes[f"{parent}.{parts.get(role, role)}"]), name


def kind_of(scheme: Scheme) -> str:
    match scheme.weights:
        case "fp8-block":
            return "fp8"
        case "bf16":
            return "bf16"
    return f"w8a8{scheme.bits}" if scheme.activations == "int8" else f"wna16{scheme.bits}"
