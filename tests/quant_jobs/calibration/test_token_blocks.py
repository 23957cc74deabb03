"""Token blocks: the tokenizer's ids, spread over the files; malformed input is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from support.quantizing import SmallModel, make_small_model, small_recipe

from deepseek.errors import ArtifactError, CalibrationError
from deepseek.source.synthetic import Size, synthesize, synthetic_config
from quant_jobs.calibration.token_blocks import CalibrationSource, load_token_blocks
from quant_jobs.job.job import finished, plan_job
from quant_jobs.quantize import run_quantize
from quant_jobs.reports.job_report import REPORT_FILE


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


def words(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


@pytest.fixture
def three_files(tmp_path: Path) -> list[Path]:
    """Text of nothing but w10, w20 and w30, 400 tokens each."""
    paths = [tmp_path / f"{number}.txt" for number in (10, 20, 30)]
    for path in paths:
        path.write_text(words(*[int(path.stem)] * 400), encoding="utf-8")
    return paths


@pytest.mark.parametrize(
    ("weights", "num_blocks", "shares"),
    [
        ((1, 1, 1), 9, (3, 3, 3)),
        ((1, 1, 1), 10, (4, 3, 3)),
        ((0.7, 0.2, 0.1), 10, (7, 2, 1)),
        ((5, 3, 1), 7, (4, 2, 1)),  # 3.89, 2.33, 0.78: the largest remainders take what is left
        ((1e-3, 2e-3, 4e-3), 16, (2, 5, 9)),
    ],
)
def test_files_share_the_blocks_by_weight(
    small: SmallModel,
    three_files: list[Path],
    weights: tuple[float, ...],
    num_blocks: int,
    shares: tuple[int, ...],
) -> None:
    sources = [CalibrationSource(*pair) for pair in zip(three_files, weights, strict=True)]
    blocks = load_token_blocks(sources, small.directory, num_blocks, 21)
    assert blocks.ids.shape == (num_blocks, 21)
    expected = [number for number, share in zip((10, 20, 30), shares, strict=True)
              for _ in range(share)]  # fmt: skip
    assert blocks.ids[:, 0].tolist() == [0] * num_blocks
    assert blocks.ids[:, 1].tolist() == expected
    assert [source.blocks for source in blocks.sources] == list(shares)
    assert [source.tokens for source in blocks.sources] == [20 * share for share in shares]
    assert blocks.sources[0].sha256 == hashlib.sha256(three_files[0].read_bytes()).hexdigest()


def test_a_file_gives_the_same_blocks_alone_and_among_others(
    small: SmallModel, three_files: list[Path]
) -> None:
    alone = load_token_blocks(small.text, small.directory, 3, 51)
    listed = load_token_blocks([CalibrationSource(small.text, 0.3)], small.directory, 3, 51)
    assert listed.digest == alone.digest
    sources = [CalibrationSource(three_files[0]), CalibrationSource(small.text, 3)]
    mixed = load_token_blocks(sources, small.directory, 4, 51)
    assert torch.equal(mixed.ids[1:], alone.ids)


def test_the_digest_of_one_plain_file_is_what_it_always_was(tiny_model: Path) -> None:
    """Artifacts and unfinished runs of earlier versions identify this data by its digest."""
    blocks = load_token_blocks(tiny_model / "calibration.txt", tiny_model, 32, 512)
    assert blocks.digest == "6dd7fb63223d9719e13ffa6c1cfe23b0b1303cf4c3fb319b555c213c9523c14b"


def test_json_lines_are_packed_with_eos_between_documents(
    small: SmallModel, tmp_path: Path
) -> None:
    path = tmp_path / "text.jsonl"
    documents = [words(*[20 + number] * (5 + number)) for number in range(9)]
    lines = [json.dumps({"text": text, "url": "somewhere"}) for text in documents]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    ids = [1]
    for number in range(9):
        ids += [*[20 + number] * (5 + number), 1]
    blocks = load_token_blocks(path, small.directory, 4, 17)
    assert blocks.ids[:, 1:].flatten().tolist() == ids[1:65]


def test_a_line_may_hold_any_character_but_a_line_feed(small: SmallModel, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    text = "w1\u2028w2\x85w3\u2029"
    path.write_text(json.dumps({"text": text}, ensure_ascii=False) + "\r\n" +
                    json.dumps({"text": "w4\nw5"}), encoding="utf-8")  # fmt: skip
    blocks = load_token_blocks(path, small.directory, 1, 7)
    assert blocks.ids.tolist() == [[0, 1, 2, 3, 1, 4, 5]]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("w1 w2", "text.jsonl, line 2: not JSON"),
        ("", "text.jsonl, line 2: not JSON"),
        ('["w1"]', "line 2: a list in place of an object; each record must be"),
        ('{"messages": []}', "line 2: 'messages' is an empty list"),
        ('{"text": 3}', "line 2: 'text' is a number, not a string"),
    ],
)
def test_a_malformed_line_is_refused_by_number(
    small: SmallModel, tmp_path: Path, line: str, sentence: str
) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(f'{{"text": "w1"}}\n{line}\n{{"text": "w1"}}\n')
    with pytest.raises(CalibrationError, match=sentence):
        load_token_blocks(path, small.directory, 1, 16)


def test_shares_that_cannot_be_dealt_are_refused(
    small: SmallModel, three_files: list[Path]
) -> None:
    def load(*sources: CalibrationSource, num_blocks: int = 4) -> None:
        load_token_blocks(sources, small.directory, num_blocks, 48)

    first, second, _ = three_files
    with pytest.raises(CalibrationError, match=r"20.txt gives none of the 4 blocks at weight 0.01"):
        load(CalibrationSource(first), CalibrationSource(second, 0.01))
    with pytest.raises(CalibrationError, match="10.txt is given twice"):
        load(CalibrationSource(first), CalibrationSource(first.parent / "." / first.name, 2))
    with pytest.raises(CalibrationError, match="name at least one file"):
        load()
    with pytest.raises(
        CalibrationError, match=r"20.txt has 400 tokens.*need 470; .* or lower its weight"
    ):
        load(CalibrationSource(first), CalibrationSource(second, 4), num_blocks=12)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("a.txt", CalibrationSource(Path("a.txt"))),
        ("a.txt=2", CalibrationSource(Path("a.txt"), 2.0)),
        ("dir/x=y/a.jsonl=0.25", CalibrationSource(Path("dir/x=y/a.jsonl"), 0.25)),
        ("dir/x=y/a.txt", CalibrationSource(Path("dir/x=y/a.txt"))),
    ],
)
def test_a_weight_stands_behind_the_last_equals_sign(given: str, wanted: CalibrationSource) -> None:
    assert CalibrationSource.parse(given) == wanted


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_a_weight_that_is_no_share_is_refused(weight: str) -> None:
    with pytest.raises(CalibrationError, match="weight must be a positive number"):
        CalibrationSource.parse(f"a.txt={weight}")


@pytest.mark.heavy
def test_a_job_records_its_files_and_is_bound_to_them(
    small: SmallModel, three_files: list[Path], tmp_path: Path
) -> None:
    """On a synthetic model with a worker in this process: manifest and report."""
    model = tmp_path / "model"
    synthesize(model, synthetic_config(Size(layers=2, experts=4), "small"))
    sources = [CalibrationSource(three_files[0], 3), CalibrationSource(small.text)]
    output = tmp_path / "out"
    job = plan_job(model, small_recipe("int8"), sources, output)
    manifest = run_quantize(model, small_recipe("int8"), sources, output, 0, lambda _: None)
    assert manifest.calibration is not None
    assert [(file.weight, file.blocks) for file in manifest.calibration.files] == [(3, 3), (1, 1)]
    report = json.loads((output / REPORT_FILE).read_text())["calibration"]["sources"]
    assert [file["name"] for file in report] == [str(source.path) for source in sources]
    assert [file["sha256"] for file in report] == [
        file.sha256 for file in manifest.calibration.files
    ]
    assert str(tmp_path) not in (output / "intserve.json").read_text()

    assert finished(job) == manifest
    weights = [CalibrationSource(source.path, 2 * source.weight) for source in sources]
    with pytest.raises(ArtifactError, match="with another calibration text"):
        finished(plan_job(model, small_recipe("int8"), weights, output))
