"""input_maxima.json: read strictly, and what counts as an outlier."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.synthetic import config_dict

from deepseek.artifact.input_maxima import (
    InputMaxima,
    InputOutlier,
    LayerMaxima,
    find_outliers,
    parse_input_maxima,
    quantizes_experts,
)
from deepseek.config import ModelConfig
from deepseek.errors import ArtifactError
from deepseek.recipe import Recipe, builtin_recipes, load_recipe

CONFIG = ModelConfig.from_dict(config_dict(layers=3, experts=4))
#: float32 values; an expert without tokens in both layers.
MAXIMA = InputMaxima(
    layers={
        1: LayerMaxima(gate_up=(1.5, 0.0, 2.25, 3.0), down=(0.125, 0.0, 1e-45, 0.5)),
        2: LayerMaxima(gate_up=(1.0, 1.0, 1.0, 1.0), down=(3.4028234663852886e38, 1.0, 1.0, 0.0)),
    }
)
PATH = Path("a/input_maxima.json")


def maxima(gate_up: tuple[float, ...], down: tuple[float, ...] = (1.0,)) -> InputMaxima:
    return InputMaxima(layers={3: LayerMaxima(gate_up=gate_up, down=down)})


def test_the_file_holds_the_values_as_they_are() -> None:
    data = MAXIMA.to_bytes()
    exact = MAXIMA.layers[1].model_copy(update={"down": (0.125, 0.0, 2.0**-149, 0.5)})
    whole = InputMaxima(layers=MAXIMA.layers | {1: exact})
    assert parse_input_maxima(whole.to_bytes(), CONFIG, PATH) == whole
    assert json.loads(data)["layers"]["1"]["gate_up"] == [1.5, 0.0, 2.25, 3.0]
    assert list(json.loads(data)) == ["format_version", "layers"]


def test_layers_are_in_the_order_of_their_numbers() -> None:
    layer = LayerMaxima(gate_up=(1.0,), down=(1.0,))
    data = InputMaxima(layers={10: layer, 9: layer}).to_bytes()
    assert list(json.loads(data)["layers"]) == ["9", "10"]


def layer_1(raw: dict[str, Any]) -> dict[str, Any]:
    return raw["layers"]["1"]  # type: ignore[no-any-return]


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another form": (lambda m: m.update(format_version=2), "has format_version 2, and only 1"),
    "no form": (lambda m: m.pop("format_version"), "has format_version None"),
    "the form as a float": (lambda m: m.update(format_version=1.0), "has format_version 1.0"),
    "a field more": (lambda m: m.update(mood=1), "has the unknown field mood"),
    "no layers": (lambda m: m.pop("layers"), "must map layers to maxima, not be null"),
    "layers as a list": (lambda m: m.update(layers=[1]), "not be a list"),
    "a layer too few": (lambda m: m["layers"].pop("2"), "lacks layer 2 of the model"),
    "a dense layer": (
        lambda m: m["layers"].update({"0": layer_1(m)}),
        "has a layer 0, which is no MoE layer of the model",
    ),
    "an MTP layer": (lambda m: m["layers"].update({"3": layer_1(m)}), "has a layer 3, which is no"),
    "a number written otherwise": (
        lambda m: m["layers"].update({"01": layer_1(m)}),
        "has a layer 01, which is no",
    ),
    "one input": (lambda m: layer_1(m).pop("down"), "exactly gate_up and down for layer 1"),
    "an input more": (lambda m: layer_1(m).update(up=[1]), "exactly gate_up and down for layer 1"),
    "an expert too few": (
        lambda m: layer_1(m)["down"].pop(),
        "has 3 values for down of layer 1, and the model has 4 routed experts",
    ),
    "no list": (lambda m: layer_1(m).update(down=7), "has a number for down of layer 1"),
    "a negative value": (
        lambda m: layer_1(m).update(down=[1.0, -0.5, 1.0, 1.0]),
        "has -0.5 for expert 1 in down of layer 1, which is no magnitude in float32",
    ),
    "a boolean": (lambda m: layer_1(m).update(down=[1.0, 1.0, True, 1]), "has True for expert 2"),
    "a string": (lambda m: layer_1(m).update(down=["1", 1, 1, 1]), "has '1' for expert 0"),
    "null": (lambda m: layer_1(m).update(down=[1, 1, 1, None]), "has None for expert 3"),
    "above float32": (lambda m: layer_1(m).update(down=[1, 1, 1, 1e39]), "has 1e+39 for expert 3"),
    "between two float32": (lambda m: layer_1(m).update(down=[1, 1, 1, 0.1]), "has 0.1 for expert"),
    "a huge integer": (lambda m: layer_1(m).update(down=[1, 1, 1, 10**400]), "for expert 3"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_file_of_another_model_or_form_is_refused_in_one_sentence(case: str) -> None:
    change, says = CHANGES[case]
    raw = json.loads(MAXIMA.to_bytes())
    layer_1(raw)["down"] = [0.125, 0.0, 0.25, 0.5]
    parse_input_maxima(json.dumps(raw).encode(), CONFIG, PATH)
    change(raw)
    with pytest.raises(ArtifactError) as refused:
        parse_input_maxima(json.dumps(raw).encode(), CONFIG, PATH)
    assert str(refused.value).startswith(f"{PATH} ")
    assert says in str(refused.value)
    assert "quant_jobs measure" in str(refused.value)
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity"])
def test_what_is_not_finite_is_refused(text: str) -> None:
    data = MAXIMA.to_bytes().replace(b"2.25", text.encode())
    with pytest.raises(ArtifactError, match=f"{text} is no JSON number"):
        parse_input_maxima(data, CONFIG, PATH)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ((1.0, 1.0, 1.0, 8.0), {}),  # 8 times the median is none
        ((1.0, 1.0, 1.0, 8.5), {3: 8.5}),
        ((1.0, 3.0, 17.0, 0.0), {}),  # the median of 1, 3 and 17 is 3
        ((0.0, 1.0, 1.0, 9.0), {3: 9.0}),  # an expert without tokens moves no median
        ((0.0, 0.0, 0.0, 9.0), {}),  # the only one that saw any
        ((0.0, 0.0, 0.0, 0.0), {}),
        ((1.0, 3.0, 1.0, 100.0), {3: 50.0}),  # of an even number: the mean of the middle two
        ((1.0, 1.0, 1.0, 10.0, 40.0), {3: 10.0, 4: 40.0}),
    ],
)
def test_an_outlier_is_more_than_8_times_the_median(
    values: tuple[float, ...], found: dict[int, float]
) -> None:
    assert {outlier.expert: outlier.ratio for outlier in find_outliers(maxima(values))} == found


def test_outliers_come_by_layer_input_and_expert() -> None:
    row = (1.0, 1.0, 1.0, 9.0)
    layer = LayerMaxima(gate_up=row, down=row)
    found = find_outliers(InputMaxima(layers={10: layer, 9: layer}))
    assert [(outlier.layer, outlier.input) for outlier in found] == [
        (9, "gate_up"),
        (9, "down"),
        (10, "gate_up"),
        (10, "down"),
    ]


def test_an_outlier_says_what_it_is() -> None:
    outlier = InputOutlier(layer=3, input="down", expert=17, ratio=31.234)
    assert outlier.describe() == (
        "layer 3, down input of expert 17: 31.2 times the median of its layer"
    )


@pytest.mark.parametrize("name", builtin_recipes())
def test_every_built_in_recipe_keeps_maxima(name: str) -> None:
    assert quantizes_experts(CONFIG, load_recipe(name).resolve(CONFIG))


def test_no_maxima_are_kept_where_no_expert_is_quantized() -> None:
    raw = load_recipe("int8-weight-only").model_dump(mode="json")
    raw["rules"] = [raw["rules"][0] | {"match": "*self_attn*"}]
    recipe = Recipe.model_validate(raw)
    assert not quantizes_experts(CONFIG, recipe.resolve(CONFIG))
