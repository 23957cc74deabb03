"""What the page about an engine says in words."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from deepseek.config import ModelConfig
from deepseek.recipe import ActivationFormat, load_recipe
from quant_jobs.reports.findings import ACTIVATIONS, rule_rows


@pytest.mark.parametrize(
    ("recipe", "activations"),
    [
        ("w4a8", "static fp8 per tensor"),
        ("int8", "dynamic int8 per token"),
        ("int4", "none"),
    ],
)
def test_the_rules_say_how_activations_are_quantized(
    recipe: str, activations: str, tiny_model: Path
) -> None:
    rows = rule_rows(load_recipe(recipe), ModelConfig.from_directory(tiny_model))
    quantized = [row for row in rows if row.algorithm != "carried through"]
    assert quantized
    assert {row.activations for row in quantized} == {activations}
    assert {row.activations for row in rows if row not in quantized} <= {"none"}


def test_every_activation_format_has_its_own_words() -> None:
    assert set(ACTIVATIONS) == set(get_args(ActivationFormat))
    assert len(set(ACTIVATIONS.values())) == len(ACTIVATIONS)
