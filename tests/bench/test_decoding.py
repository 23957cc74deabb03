"""What bench/peers_decode.py and bench/served_decode.py are made of."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from bench.decoding.ds3 import DS3, made_once
from bench.decoding.vocabulary import tokenizer_files
from deepseek.inventory import tensors


def test_ds3_has_the_parameters_that_its_figures_are_given_for() -> None:
    specs = list(tensors(DS3))
    active = DS3.num_experts_per_tok / DS3.n_routed_experts
    per_token = sum(
        spec.numel * (1 if spec.expert is None else active)
        for spec in specs
        if spec.role != "embed_tokens"
    )
    assert round(sum(spec.numel for spec in specs) / 1e6) == 706
    assert round(per_token / 1e6) == 189


def test_every_token_of_the_vocabulary_is_reached_by_a_merge_and_is_whole_text() -> None:
    size = 12_000
    tokenizer = Tokenizer.from_str(tokenizer_files(size, 64)["tokenizer.json"])
    assert tokenizer.get_vocab_size() == size
    for token in (258, 9_282, 9_283, size - 1):
        text = tokenizer.decode([token])
        assert text.isascii()
        assert text.isprintable()
        assert tokenizer.encode(text).ids == [token]
    assert len(tokenizer.decode([size - 1])) == 3


def test_a_vocabulary_that_cannot_be_filled_is_refused() -> None:
    with pytest.raises(AssertionError, match="do not hold all bytes"):
        tokenizer_files(257, 64)


def test_what_a_killed_process_left_is_made_again_and_what_is_whole_is_kept(
    tmp_path: Path,
) -> None:
    half = tmp_path / "thing.half"
    half.mkdir()
    (half / "of the killed").touch()

    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "whole").touch()

    folder = made_once(tmp_path / "thing", make)
    assert [path.name for path in folder.iterdir()] == ["whole"]
    made_once(folder, lambda _: pytest.fail("it is there already"))
