"""A small model in which the input of one routed expert is far larger than those of the others."""

from __future__ import annotations

from pathlib import Path

from support.quantizing import SmallModel, changed_model, make_small_model
from torch import Tensor

#: The expert whose `down_proj` has that input, and how many times larger it is than as drawn.
OUTLIER_LAYER, OUTLIER_EXPERT, OUTLIER_FACTOR = 2, 5, 64.0


def outlier_model(folder: Path) -> Path:
    """The model of `make_small_model` in FOLDER/model, with a text for calibration in
    FOLDER/text.txt, but one expert's `up_proj` is 64 times as large and its `down_proj` 1/64: the
    same function, whose input of `down_proj` is an outlier of its layer."""
    return outlier_small_model(folder).directory


def outlier_small_model(folder: Path, factor: float = OUTLIER_FACTOR) -> SmallModel:
    """`outlier_model` with its text. A power of two as `factor` changes no value but by itself."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = make_small_model(folder / "plain")
    expert = f"model.layers.{OUTLIER_LAYER}.mlp.experts.{OUTLIER_EXPERT}"

    def move(stored: dict[str, Tensor]) -> None:
        stored[f"{expert}.up_proj.weight_scale_inv"] *= factor
        stored[f"{expert}.down_proj.weight_scale_inv"] /= factor

    model = changed_model(plain, folder / "model", move)
    text = folder / "text.txt"
    text.write_bytes(plain.text.read_bytes())
    return SmallModel(model.directory, text)
