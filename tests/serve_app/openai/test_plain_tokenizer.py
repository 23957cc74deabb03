"""Tokenizers that are opened without transformers are what transformers makes of them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.tokenizers_of_others import BOS, EOS, KINDS
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from serve_app.openai.plain_tokenizer import open_plainly

TEXTS = ["", "def f(): return 'x'", f"{BOS}a{EOS} b", "你好 e\u0301 <think>x</think>"]
#: Each value that a key may have where it is known; None leaves the key out.
CHOICES: dict[str, list[Any]] = {
    "add_bos_token": [None, True, False],
    "add_eos_token": [None, True],
    "bos_token": [None, BOS],
    "eos_token": [None, EOS],
    "pad_token": [None, EOS],
}
BASE = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 64}


def configs() -> Iterator[dict[str, Any]]:
    for values in itertools.product(*CHOICES.values()):
        chosen = dict(zip(CHOICES, values, strict=True))
        yield BASE | {key: value for key, value in chosen.items() if value is not None}


def files_of(tokenizer: str, config: dict[str, Any]) -> dict[str, bytes]:
    return {
        "tokenizer.json": tokenizer.encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
    }


def by_transformers(files: dict[str, bytes], folder: Path) -> Tokenizer:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    loaded = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    backend: Tokenizer = loaded.backend_tokenizer
    assert backend.encode_special_tokens == loaded.split_special_tokens is False
    assert len(loaded) == backend.get_vocab_size()
    return backend


def check_same(files: dict[str, bytes], folder: Path) -> None:
    ours, theirs = open_plainly(files), by_transformers(files, folder)
    assert ours is not None
    assert ours.to_str() == theirs.to_str()
    assert ours.encode_special_tokens == theirs.encode_special_tokens
    for text in TEXTS:
        for special in (True, False):
            encoded = ours.encode(text, add_special_tokens=special)
            assert encoded.ids == theirs.encode(text, add_special_tokens=special).ids


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_transformers_makes_of_it(kind: str, tmp_path: Path) -> None:
    plain, framed = KINDS[kind](), KINDS[kind]()
    framed.post_processor = processors.TemplateProcessing(
        f"{BOS} $A", special_tokens=[(BOS, framed.token_to_id(BOS))]
    )
    for config in configs():
        named = {"bos_token", "eos_token", "pad_token"} & config.keys()
        files = files_of(plain.to_str(), config)
        if kind == "stripping" and named:  # special tokens with properties of their own
            assert open_plainly(files) is None
        else:
            check_same(files, tmp_path)
    if kind != "stripping":
        check_same(files_of(framed.to_str(), config), tmp_path)


def test_the_example_model_needs_no_transformers(tiny_model: Path, tmp_path: Path) -> None:
    names = ("tokenizer.json", "tokenizer_config.json")
    check_same({name: (tiny_model / name).read_bytes() for name in names}, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"additional_special_tokens": ["<x>"]},
        {"split_special_tokens": True},
        {"add_prefix_space": True},
        {"bos_token": {"__type": "AddedToken", "content": BOS}},
        {"bos_token": "<nowhere>"},
        {"bos_token": ""},
        {"add_bos_token": 1},
        {"tokenizer_class": "LlamaTokenizerFast"},
        {"model_max_length": 1e30},
        {"something_new": None},
    ],
    ids=lambda change: json.dumps(change),
)
def test_what_is_not_known_is_left_to_transformers(change: dict[str, Any]) -> None:
    tokenizer = next(iter(KINDS.values()))().to_str()
    assert open_plainly(files_of(tokenizer, BASE)) is not None
    assert open_plainly(files_of(tokenizer, BASE | change)) is None


def test_other_files_and_settings_of_the_tokenizer_are_left_to_transformers() -> None:
    made = next(iter(KINDS.values()))()
    files = files_of(made.to_str(), BASE)
    assert open_plainly(files | {"special_tokens_map.json": b"{}"}) is None
    assert open_plainly({"tokenizer.json": files["tokenizer.json"]}) is None
    made.enable_padding(pad_token="<pad>")
    assert open_plainly(files_of(made.to_str(), BASE)) is None
    made.no_padding()
    made.enable_truncation(8)
    assert open_plainly(files_of(made.to_str(), BASE)) is None
