"""A small model with a tokenizer and a text, and helpers for the tests of `quantize`."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.synthetic import random_tensors, write_checkpoint, write_shards
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from deepseek.config import ModelConfig
from deepseek.recipe import Recipe, load_recipe
from deepseek.tensor_files import read_header
from quant_jobs.reports.job_report import PAGE_FILE, REPORT_FILE

#: 1 dense and 2 MoE layers, then MTP.
NUM_LAYERS = 3


@dataclass(frozen=True)
class SmallModel:
    directory: Path
    text: Path

    @property
    def config(self) -> ModelConfig:
        return ModelConfig.from_directory(self.directory)


def make_small_model(root: Path, **changes: Any) -> SmallModel:
    """FP8 tiles, 8 experts in 2 groups, a word-level tokenizer, 600 words of text. `changes` are
    arguments of `write_checkpoint`."""
    directory = root / "model"
    write_checkpoint(directory, **{"layers": NUM_LAYERS, "experts": 8, **changes})
    return add_text(directory, root / "text.txt")


def add_text(directory: Path, text: Path, *, num_words: int = 600) -> SmallModel:
    """A word-level tokenizer for a checkpoint of 96 tokens, and words of text."""
    words = [f"w{index}" for index in range(96)]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    text.write_text(" ".join(random.Random(5).choices(words, k=num_words)), encoding="utf-8")
    return SmallModel(directory, text)


def changed_model(
    model: SmallModel, directory: Path, change: Callable[[dict[str, Tensor]], None]
) -> SmallModel:
    """The same model in another folder, `change` applied to its stored tensors."""
    directory.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (directory / name).write_bytes((model.directory / name).read_bytes())
    stored = random_tensors(model.config)
    change(stored)
    write_shards(directory, stored)
    return SmallModel(directory, model.text)


def starve_expert(model: SmallModel, root: Path, layer: int, expert: int) -> SmallModel:
    """The same model, but no token is ever routed to one expert: its correction bias is -9."""

    def starve(stored: dict[str, Tensor]) -> None:
        stored[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"][expert] = -9.0

    return changed_model(model, root / "starving", starve)


def small_recipe(name: str, **changes: object) -> Recipe:
    """A built-in recipe on 4 blocks of 48 tokens."""
    calibration = {"num_blocks": 4, "block_tokens": 48}
    content = load_recipe(name).model_dump(mode="json")
    return Recipe.model_validate(content | {"calibration": calibration} | changes)


def contents(output: Path) -> dict[str, bytes]:
    """Every file of an output, the reports of times and memory apart."""
    return {
        str(path.relative_to(output)): path.read_bytes()
        for path in sorted(output.rglob("*"))
        if path.is_file() and path.name not in (REPORT_FILE, PAGE_FILE)
    }


def flip_byte(file: Path, at: int = -5) -> None:
    """Flip one bit of a file."""
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def flip_source_byte(model: SmallModel, name: str) -> None:
    """Flip one bit in the middle of a source tensor, where the fingerprint does not look."""
    for shard in model.directory.glob("*.safetensors"):
        entry = read_header(shard).tensors.get(name)
        if entry is not None:
            flip_byte(shard, (entry.begin + entry.end) // 2)
            return
    raise AssertionError(f"no tensor {name}")
