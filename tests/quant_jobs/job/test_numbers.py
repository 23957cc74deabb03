"""A job on a source with numbers that cannot be: one sentence, before anything is made of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from support.chain import Ended
from support.quantizing import SmallModel, changed_model, make_small_model, small_recipe
from torch import Tensor

from deepseek.artifact.tensors import layer_file

pytestmark = pytest.mark.heavy

MTP, LAYER = "model.layers.3.", "model.layers.1."
#: Tensor, value put at its end, what the sentence says, files that may have been written before.
CASES = [
    ("lm_head.weight", math.inf, "holds infinity at [95, 255]", ()),
    (f"{MTP}enorm.weight", math.nan, "holds NaN at [255]", ()),
    (f"{LAYER}mlp.gate.weight", math.nan, "holds NaN at [7, 255]", (0,)),
    (f"{LAYER}mlp.gate.e_score_correction_bias", math.nan, "holds NaN at [7]", (0,)),
    (f"{LAYER}mlp.experts.3.up_proj.weight", math.nan, "holds NaN at [127, 255]", (0,)),
    (f"{LAYER}mlp.experts.3.up_proj.weight_scale_inv", 0.0, "holds 0 at [0, 1]", (0,)),
    (f"{LAYER}mlp.experts.3.up_proj.weight_scale_inv", -1e-4, "holds -0.0001 at [0, 1]", (0,)),
]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return make_small_model(tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize(("name", "value", "message", "written"), CASES, ids=range(len(CASES)))
def test_the_command_ends_in_one_sentence_that_names_the_tensor(
    small: SmallModel,
    command: Callable[..., Ended],
    tmp_path: Path,
    name: str,
    value: float,
    message: str,
    written: tuple[int, ...],
) -> None:
    def damage(stored: dict[str, Tensor]) -> None:
        stored[name].view(-1)[-1] = value

    damaged = changed_model(small, tmp_path / "damaged", damage)
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(yaml.safe_dump(small_recipe("int4").model_dump(mode="json")))
    ended = command(
        *("quantize", "--model", damaged.directory, "--recipe", recipe, "--workers", 0),
        *("--calibration", damaged.text, "--output", output),
    )
    assert ended.code == 2
    sentence = ended.err.splitlines()[-1]
    assert sentence.startswith(f"error: {damaged.directory}")
    assert f"tensor {name} {message}; " in sentence
    assert "Traceback" not in ended.err
    published = {layer for layer in range(3) if (output / layer_file(layer)).exists()}
    assert published <= set(written)


def test_extreme_but_finite_numbers_are_quantized(
    small: SmallModel, command: Callable[..., Ended], tmp_path: Path
) -> None:
    def stretch(stored: dict[str, Tensor]) -> None:
        expert = f"{LAYER}mlp.experts.3."
        stored[f"{expert}up_proj.weight"].view(torch.uint8)[0, :4] = torch.tensor(
            [0x01, 0x80, 0x7E, 0xFE],
            dtype=torch.uint8,  # subnormal, -0, 448, -448
        )
        stored[f"{expert}gate_proj.weight_scale_inv"][0, 0] = 2.0**-126
        stored[f"{LAYER}input_layernorm.weight"][:2] = torch.tensor([1e-40, -0.0])

    stretched = changed_model(small, tmp_path / "stretched", stretch)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(small_recipe("int4-all").model_dump(mode="json")))
    ended = command(
        *("quantize", "--model", stretched.directory, "--recipe", recipe, "--workers", 0),
        *("--calibration", stretched.text, "--output", tmp_path / "out"),
    )
    assert ended.code == 0, ended.err
