"""Tokens that end a text come from config.json and generation_config.json; nothing else does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.synthetic import config_dict

from deepseek.config import ModelConfig
from deepseek.errors import ConfigError
from deepseek.stop_tokens import stop_token_ids


def read(directory: Path, generation: Any, eos: Any = 1) -> frozenset[int]:
    config = ModelConfig.from_dict(config_dict(eos_token_id=eos))
    if generation is not None:
        text = generation if isinstance(generation, str) else json.dumps(generation)
        (directory / "generation_config.json").write_text(text)
    return stop_token_ids(directory, config)


@pytest.mark.parametrize(
    ("generation", "eos", "expected"),
    [
        (None, 1, {1}),
        (None, [1, 7], {1, 7}),
        (None, None, set()),
        ({}, 1, {1}),
        ({"eos_token_id": None, "temperature": 0.6}, 1, {1}),
        ({"eos_token_id": 5}, 1, {1, 5}),
        ({"eos_token_id": [5, 1]}, [1, 7], {1, 5, 7}),
        ({"eos_token_id": [5]}, None, {5}),
    ],
)
def test_end_tokens_of_both_files_count(
    generation: Any, eos: Any, expected: set[int], tmp_path: Path
) -> None:
    assert read(tmp_path, generation, eos) == expected


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"eos_token_id": "5"}, "eos_token_id = '5' must be a token id or a list of token ids"),
        ({"eos_token_id": []}, r"eos_token_id = \[\] must be a token id"),
        ({"eos_token_id": [True]}, r"eos_token_id = \[True\] must be a token id"),
        ({"eos_token_id": [96]}, "eos_token_id 96 is no token of vocab_size 96"),
        ("[1]", "must hold a JSON object, not a list"),
        ("{", "is not valid JSON"),
    ],
)
def test_a_generation_config_that_says_nothing_clear_is_refused_by_name(
    generation: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(tmp_path, generation)
    assert "generation_config.json" in str(caught.value)
