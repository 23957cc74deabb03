"""Which tokens become blocks: all of a file is represented, at a cost that does not follow it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import save_file
from support.chat_templates import write_tokenizer
from support.synthetic import write_checkpoint

from deepseek.errors import CalibrationError
from quant_jobs.calibration import documents, encoding, json_documents, sampling
from quant_jobs.calibration.encoding import Encoder
from quant_jobs.calibration.token_blocks import TokenBlocks, load_token_blocks

#: Tests take files of this size for long ones.
LONG = 2000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sampled") / "model"
    write_checkpoint(directory)
    write_tokenizer(directory)
    return directory


@pytest.fixture(autouse=True)
def _long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "WHOLE_BYTES", LONG)


@pytest.fixture
def tokenized(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes in bytes of all that is tokenized."""
    sizes: list[int] = []
    plain = Encoder._tokenize

    def counting(self: Encoder, text: str, most: int | None) -> object:
        before = self.num_bytes
        result = plain(self, text, most)
        sizes.append(self.num_bytes - before)
        return result

    monkeypatch.setattr(Encoder, "_tokenize", counting)
    return sizes


def passages(count: int, words: int = 30) -> list[str]:
    """Passages of one word each; the word grows from w3 to w95 over all of them."""
    return [" ".join([f"w{3 + 93 * index // count}"] * words) for index in range(count)]


def write_text(path: Path, texts: list[str]) -> None:
    path.write_text("".join(text + "\n" for text in texts), encoding="utf-8")


def write_lines(path: Path, texts: list[str]) -> None:
    records = [json.dumps({"text": text, "id": n}) + "\n" for n, text in enumerate(texts)]
    path.write_text("".join(records), encoding="utf-8")


def write_list(path: Path, texts: list[str]) -> None:
    path.write_text(json.dumps([{"text": text} for text in texts]), encoding="utf-8")


def write_rows(path: Path, texts: list[str]) -> None:
    pq.write_table(pa.table({"text": texts}), path, row_group_size=300)


WRITERS = {
    "txt": write_text,
    "jsonl": write_lines,
    "json": write_list,
    "parquet": write_rows,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_blocks_of_a_long_file_are_spread_over_all_of_it(
    model: Path, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / f"a.{kind}"
    WRITERS[kind](path, passages(1000))
    blocks = load_token_blocks(path, model, 9, 21)
    heads = [row[1] for row in blocks.ids.tolist()]
    expected = [3 + 93 * place // 9 for place in range(9)]
    assert all(abs(head - word) <= 2 for head, word in zip(heads, expected, strict=True))
    for row in blocks.ids.tolist():
        assert row[0] == 0
        assert len(set(row[1:]) - {1}) <= 2  # one passage, or two neighbors


@pytest.mark.parametrize("kind", WRITERS)
def test_what_is_tokenized_follows_what_is_wanted_and_not_the_file(
    model: Path, tmp_path: Path, kind: str, tokenized: list[int]
) -> None:
    path = tmp_path / f"a.{kind}"
    for count in (300, 3000):
        WRITERS[kind](path, passages(count))
        tokenized.clear()
        load_token_blocks(path, model, 5, 21)
        assert sum(tokenized) <= 5 * (6 * 36 + 1)
    tokenized.clear()
    load_token_blocks(path, model, 20, 21)
    assert 4 * 5 * 60 < sum(tokenized) <= 20 * (6 * 36 + 1)


@pytest.mark.parametrize("kind", ["txt", "jsonl", "json"])
def test_the_blocks_do_not_depend_on_how_the_file_is_read(
    model: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"a.{kind}"
    WRITERS[kind](path, passages(500, words=7))
    expected = load_token_blocks(path, model, 12, 40).digest
    for size in (7, 300):
        monkeypatch.setattr(json_documents, "_CHUNK_BYTES", size)
        assert load_token_blocks(path, model, 12, 40).digest == expected


def test_rows_are_the_same_however_they_are_grouped(model: Path, tmp_path: Path) -> None:
    """As long as there are fewer groups than blocks; else blocks begin with groups."""
    digests = set()
    for size in (100, 333, 5000):
        path = tmp_path / f"{size}.parquet"
        pq.write_table(pa.table({"text": passages(500)}), path, row_group_size=size)
        digests.add(load_token_blocks(path, model, 12, 40).digest)
    assert len(digests) == 1
    path = tmp_path / "many.parquet"
    pq.write_table(pa.table({"text": passages(500)}), path, row_group_size=10)
    heads = load_token_blocks(path, model, 5, 21).ids[:, 1].tolist()
    assert heads == [3 + 93 * place // 5 for place in range(5)]


def test_text_without_lines_is_cut_between_characters(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("ü w5 " * 3000, encoding="utf-8")
    for count in (5, 6, 7, 8):  # starts on all bytes of the five
        blocks = load_token_blocks(path, model, count, 21)
        assert set(blocks.ids[:, 1:].flatten().tolist()) == {2, 5}


def test_blocks_do_not_overlap_where_a_file_is_just_long_enough(
    model: Path, tmp_path: Path
) -> None:
    """Every word stands once in 93: a block that was taken twice would show."""
    words = random.Random(1).choices(range(3, 96), k=6000)
    path = tmp_path / "a.txt"
    path.write_text("".join(f"w{word}       \n" for word in words), encoding="utf-8")
    blocks = load_token_blocks(path, model, 58, 101)  # 5800 of the 6000
    assert sampled(path, 58 * 100)
    place = 0
    for row in blocks.ids[:, 1:].tolist():
        place = find(words, row, place) + len(row)


def sampled(path: Path, wanted: int) -> bool:
    return path.stat().st_size > max(LONG, 8 * wanted)


def find(words: list[int], run: list[int], begin: int) -> int:
    for place in range(begin, len(words) - len(run) + 1):
        if words[place : place + len(run)] == run:
            return place
    raise AssertionError("a block overlaps the one before, or is no run of the text")


def test_what_was_skipped_gives_blocks_where_the_end_has_too_little(
    model: Path, tmp_path: Path
) -> None:
    """Two thirds of the file are one record's metadata."""
    path = tmp_path / "a.jsonl"
    texts = passages(60)
    write_lines(path, texts)
    size = path.stat().st_size
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"text": "w9", "page": "x" * 2 * size}) + "\n")
    blocks = load_token_blocks(path, model, 20, 41)
    assert blocks.ids.shape == (20, 41)
    heads = blocks.ids[:, 1].tolist()
    assert heads == sorted(heads)


def test_a_long_file_with_hardly_enough_tokens_gives_all_of_them(
    model: Path, tmp_path: Path
) -> None:
    """50 records of two words and EOS: 149 tokens, of which any other rule wastes some."""
    path = tmp_path / "a.jsonl"
    records = [json.dumps({"text": "w5 w6", "page": "x" * 500}) + "\n" for _ in range(50)]
    path.write_text("".join(records), encoding="utf-8")
    blocks = load_token_blocks(path, model, 7, 22)
    assert blocks.ids[:, 1:].flatten().tolist() == ([5, 6, 1] * 49)
    with pytest.raises(CalibrationError, match=r"has 149 tokens, but 8 .* lower num_blocks to 7$"):
        load_token_blocks(path, model, 8, 22)


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_a_file_of_few_long_documents_is_read_inside_of_them(
    model: Path, tmp_path: Path, kind: str, tokenized: list[int]
) -> None:
    """Three books, whose words w3 to w95 rise from the first page to the last."""
    path = tmp_path / f"a.{kind}"
    pages = passages(900)
    WRITERS[kind](path, [" ".join(pages[begin : begin + 300]) for begin in (0, 300, 600)])
    blocks = load_token_blocks(path, model, 15, 21)
    heads = blocks.ids[:, 1].tolist()
    expected = [3 + 93 * place // 15 for place in range(15)]
    off = [abs(head - word) for head, word in zip(heads, expected, strict=True)]
    assert sum(distance > 2 for distance in off) <= 2  # the next book began before the next place
    assert max(off) <= 93 // 15 + 2
    assert sum(tokenized) <= 15 * (6 * 36 + 1)


def test_rows_of_ready_ids_are_read_inside_too(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    ids = np.arange(2 * 5000).reshape(2, 5000) % 90 + 5
    save_file({"input_ids": ids}, path)
    blocks = load_token_blocks(path, model, 10, 21)
    flat = ids.flatten().tolist()
    assert blocks.ids[:, 1:].tolist() == [flat[n : n + 20] for n in range(0, 10_000, 1000)]
    save_file({"input_ids": ids.flatten()}, path)
    assert load_token_blocks(path, model, 10, 21).digest == blocks.digest


def test_a_file_of_blanks_is_refused_before_much_of_it_is_tokenized(
    model: Path, tmp_path: Path, tokenized: list[int]
) -> None:
    path = tmp_path / "a.txt"
    path.write_text(" " * 5_000_000, encoding="utf-8")
    with pytest.raises(CalibrationError, match="fewer tokens than one in 64 bytes where it was"):
        load_token_blocks(path, model, 4, 21)
    assert sum(tokenized) < 1_200_000


def test_of_a_long_document_only_the_head_is_tokenized(
    model: Path, tmp_path: Path, tokenized: list[int]
) -> None:
    path = tmp_path / "a.jsonl"
    write_lines(path, ["w5 " * 100_000, "w6 " * 100_000])
    blocks = load_token_blocks(path, model, 2, 21)
    assert blocks.ids[:, 1:].tolist() == [[5] * 20, [6] * 20]
    assert sum(tokenized) < 2 * (6 * 36 + 1) + 1


def test_text_of_long_words_is_read_further(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(("x" * 40 + "\n") * 500, encoding="utf-8")
    assert load_token_blocks(path, model, 5, 21).ids[:, 1:].unique().tolist() == [2]


def test_only_the_places_that_are_read_must_be_well_formed(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_lines(path, passages(400))
    content = path.read_bytes().split(b"\n")
    broken = [*content[:17], b"{", *content[18:]]
    path.write_bytes(b"\n".join(broken))
    load_token_blocks(path, model, 4, 21)
    broken = [*content[:198], *[b"{" * len(line) for line in content[198:205]], *content[205:]]
    path.write_bytes(b"\n".join(broken))
    with pytest.raises(CalibrationError, match=r"a\.jsonl, line (199|20\d): not JSON"):
        load_token_blocks(path, model, 4, 21)


def by_hand(path: Path, num_blocks: int, length: int) -> torch.Tensor:
    """The rule for files that are tokenized whole: equal pieces, evenly chosen."""
    ids = [int(word[1:]) for word in path.read_text().split()]
    pieces = [ids[n : n + length] for n in range(0, len(ids) - length + 1, length)]
    chosen = [pieces[index * len(pieces) // num_blocks] for index in range(num_blocks)]
    return torch.tensor(chosen)


@pytest.mark.parametrize("count", [LONG // 4, LONG // 4 + 1])
def test_a_file_up_to_the_bound_is_cut_as_a_whole(
    model: Path, tmp_path: Path, count: int, tokenized: list[int]
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("w50 " * count, encoding="utf-8")
    load: Callable[[], TokenBlocks] = lambda: load_token_blocks(path, model, 4, 21)  # noqa: E731
    blocks = load()
    if path.stat().st_size <= LONG:
        assert tokenized == [path.stat().st_size]
        assert torch.equal(blocks.ids[:, 1:], by_hand(path, 4, 20))
    else:
        assert sum(tokenized) < 4 * (6 * 36 + 1)


def test_a_file_is_whole_up_to_eight_bytes_for_a_wanted_token(
    model: Path, tmp_path: Path, tokenized: list[int]
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("w50 " * 1600, encoding="utf-8")
    blocks = load_token_blocks(path, model, 40, 21)  # 800 tokens, 6400 bytes
    assert sum(tokenized) == 6400
    assert torch.equal(blocks.ids[:, 1:], by_hand(path, 40, 20))


def test_long_text_that_is_read_whole_is_tokenized_in_pieces(
    model: Path, tmp_path: Path, tokenized: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "MAX_PIECE_BYTES", 1000)
    path = tmp_path / "a.txt"
    words = [f"w{3 + index % 93}" for index in range(1600)]
    path.write_text("".join(word + (" ", "\n")[n % 9 == 8] for n, word in enumerate(words)))
    blocks = load_token_blocks(path, model, 40, 21)
    assert len(tokenized) > 5
    assert max(tokenized) <= 1000
    assert torch.equal(blocks.ids[:, 1:], by_hand(path, 40, 20))


def write_tokenizer_with(directory: Path, **changes: object) -> Path:
    write_checkpoint(directory)
    write_tokenizer(directory)
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return directory


PADDING = {"direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"}
TRUNCATION = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst"}


@pytest.mark.parametrize(
    "changes",
    [
        {"padding": {"strategy": {"Fixed": 3_000_000_000}, "pad_to_multiple_of": None, **PADDING}},
        {"padding": {"strategy": "BatchLongest", "pad_to_multiple_of": 3_000_000_000, **PADDING}},
        {"truncation": {"stride": 0, **TRUNCATION}},
        {"truncation": {"stride": 5, **TRUNCATION}},
    ],
)
def test_a_tokenizers_padding_and_truncation_do_not_apply(
    model: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    path = tmp_path / "a.txt"
    write_text(path, passages(10))
    expected = load_token_blocks(path, model, 4, 21).digest
    other = write_tokenizer_with(tmp_path / "model", **changes)
    assert load_token_blocks(path, other, 4, 21).digest == expected


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"normalizer": {"type": "Replace", "pattern": {"String": "w"}, "content": "x" * 65}},
         "tokenizer.json is not a tokenizer: its normalizer makes text more than 64 times longer"),
        ({"normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Replace", "pattern": {"String": "w"}, "content": "ww"}] * 7}},
         "its normalizer makes text more than 64 times longer"),
        ({"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "((("}}},
         "tokenizer.json is not a tokenizer: Cannot instantiate"),
        ({"pre_tokenizer": {**SPLIT, "pattern": {"Regex": "(w|5|w5)+(w|5|w5)+(w|5|w5)+$"}}},
         r"the tokenizer in .* fails \(Onig: Regex search error: retry-limit-in-match over\)"),
        ({"model": {"type": "WordLevel", "vocab": {"w5": 0}, "unk_token": "?"}},
         r"the tokenizer in .* fails \(WordLevel error: Missing \[UNK\]"),
        ({"model": {"type": "WordLevel", "vocab": {"<pad>": 4294967295}, "unk_token": "<pad>"}},
         "gives the id 4294967295, but the model has only 96 tokens"),
    ],
)  # fmt: skip
def test_a_hostile_tokenizer_is_refused_in_one_sentence(
    tmp_path: Path, changes: dict[str, object], sentence: str
) -> None:
    other = write_tokenizer_with(tmp_path / "model", **changes)
    path = tmp_path / "a.txt"
    path.write_text("w5" * 300 + "! ", encoding="utf-8")
    with pytest.raises(CalibrationError, match=sentence):
        load_token_blocks(path, other, 1, 9)


def test_a_tokenizer_is_no_pipe_and_no_link_to_elsewhere(model: Path, tmp_path: Path) -> None:
    import os

    path = tmp_path / "a.txt"
    write_text(path, passages(10))
    other = write_tokenizer_with(tmp_path / "model")
    file = other / "tokenizer.json"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(CalibrationError, match=r"tokenizer\.json is a pipe, not a regular file"):
        load_token_blocks(path, other, 1, 9)
    file.unlink()
    file.symlink_to(model / "tokenizer.json")
    with pytest.raises(CalibrationError, match="is a link to a file outside its directory"):
        load_token_blocks(path, other, 1, 9)


def test_the_bounds_are_what_the_decision_says() -> None:
    assert encoding.MAX_BYTES_PER_TOKEN == 64
    assert sampling._WHOLE_BYTES_PER_TOKEN == 8
