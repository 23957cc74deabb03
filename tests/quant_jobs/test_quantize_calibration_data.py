"""Text to token blocks: the tokenizer's own ids, spread over the file, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.quantizing import SmallModel, make_small_model

from deepseek.errors import CalibrationError
from quant_jobs.calibration_data import load_token_blocks


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return make_small_model(tmp_path_factory.mktemp("small"))


@pytest.mark.filterwarnings("ignore:.*sequence length is longer")
def test_ids_are_those_of_transformers_autotokenizer(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    path = tiny_model / "calibration.txt"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model, local_files_only=True)
    theirs = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    pieces = len(theirs) // 127
    ours = load_token_blocks(path, tiny_model, pieces, 128)
    assert ours.ids[:, 0].tolist() == [tokenizer.bos_token_id] * pieces
    assert ours.ids[:, 1:].flatten().tolist() == theirs[: pieces * 127]


def test_blocks_open_with_bos_and_are_spread_over_the_text(small: SmallModel) -> None:
    words = small.text.read_text().split()
    blocks = load_token_blocks(small.text, small.directory, 3, 51)
    assert blocks.ids.shape == (3, 51)
    assert blocks.num_tokens == 153
    for row, start in zip(blocks.ids.tolist(), (0, 200, 400), strict=True):
        assert row == [0, *(int(word[1:]) for word in words[start : start + 50])]


def test_the_digest_names_the_ids_and_their_shape(small: SmallModel, tmp_path: Path) -> None:
    def digest(path: Path, num_blocks: int, block_tokens: int) -> str:
        return load_token_blocks(path, small.directory, num_blocks, block_tokens).digest

    same = tmp_path / "spaces.txt"
    same.write_text(small.text.read_text().replace(" ", "\n"), encoding="utf-8")
    assert digest(same, 4, 48) == digest(small.text, 4, 48)
    assert digest(small.text, 4, 49) != digest(small.text, 4, 48)
    other = tmp_path / "other.txt"
    other.write_text("w7 " + small.text.read_text(), encoding="utf-8")
    assert digest(other, 4, 48) != digest(small.text, 4, 48)


def test_a_short_text_is_refused_with_what_it_has_and_needs(
    small: SmallModel, tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("w1 " * 100, encoding="utf-8")
    with pytest.raises(CalibrationError, match=r"has 100 tokens.* need 188.* num_blocks to 2"):
        load_token_blocks(short, small.directory, 4, 48)
    with pytest.raises(CalibrationError, match="block_tokens below 101"):
        load_token_blocks(short, small.directory, 1, 200)
    load_token_blocks(short, small.directory, 2, 48)
    load_token_blocks(short, small.directory, 1, 100)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"", "is empty"), (b" \n\t ", "is empty"), (b"w1 w2 \xff\xfe", r"not UTF-8 text \(byte 6\)")],
)
def test_empty_and_binary_files_are_refused(
    small: SmallModel, tmp_path: Path, content: bytes, sentence: str
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=sentence):
        load_token_blocks(path, small.directory, 1, 16)


def test_an_absent_file_and_an_absent_tokenizer_are_refused(
    small: SmallModel, tmp_path: Path
) -> None:
    with pytest.raises(CalibrationError, match="nowhere.txt cannot be read"):
        load_token_blocks(tmp_path / "nowhere.txt", small.directory, 1, 16)
    (tmp_path / "config.json").write_bytes((small.directory / "config.json").read_bytes())
    with pytest.raises(CalibrationError, match="tokenizer.json is absent"):
        load_token_blocks(small.text, tmp_path, 1, 16)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CalibrationError, match="is not a tokenizer"):
        load_token_blocks(small.text, tmp_path, 1, 16)


def test_blocks_longer_than_the_model_are_refused(small: SmallModel) -> None:
    with pytest.raises(CalibrationError, match="block_tokens 257 is more than the model's 256"):
        load_token_blocks(small.text, small.directory, 1, 257)
