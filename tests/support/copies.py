"""Copies of a small model as they are published, whose config.json is not true of the tensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from support.quantizing import SmallModel
from support.synthetic import config_dict, random_tensors, write_shards
from torch import Tensor

from deepseek.config import ModelConfig
from deepseek.formats import dequantize_fp8_block

#: The tensors of the MTP layer of a small model.
MTP = "model.layers.3."


def cast_to_bf16(stored: dict[str, Tensor]) -> None:
    """What the release's cast script does to the weights; it leaves config.json alone."""
    for name in [name for name in stored if f"{name}_scale_inv" in stored]:
        scales = stored.pop(f"{name}_scale_inv")
        stored[name] = dequantize_fp8_block(stored[name], scales).bfloat16()


def drop_mtp(stored: dict[str, Tensor]) -> None:
    """What `save_pretrained` of a model without an MTP layer writes."""
    for name in [name for name in stored if name.startswith(MTP)]:
        del stored[name]


#: Name of a copy -> what is done to the tensors, and the config.json that would be true of them.
COPIES: dict[str, tuple[tuple[Callable[[dict[str, Tensor]], None], ...], dict[str, object]]] = {
    "BF16, quantization_config left in": ((cast_to_bf16,), {"quantization_config": None}),
    "no MTP tensors": ((drop_mtp,), {"num_nextn_predict_layers": 0}),
    "both": (
        (cast_to_bf16, drop_mtp),
        {"quantization_config": None, "num_nextn_predict_layers": 0},
    ),
}


def write_copy(model: SmallModel, directory: Path, copy: str, *, told: bool = False) -> SmallModel:
    """A copy of the model; `told` with a config.json that is true of it."""
    directory.mkdir()
    raw = config_dict(layers=3, experts=8)
    changes, truth = COPIES[copy]
    (directory / "config.json").write_text(json.dumps(raw | truth if told else raw))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((model.directory / name).read_bytes())
    stored = random_tensors(ModelConfig.from_dict(raw))
    for change in changes:
        change(stored)
    write_shards(directory, stored)
    return SmallModel(directory, model.text)
