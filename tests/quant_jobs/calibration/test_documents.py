"""Kinds of calibration files: each is read as what it is; what is wrong is told with its place."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file
from support.chat_templates import write_tokenizer
from support.quantizing import SmallModel, make_small_model
from support.synthetic import write_checkpoint

from deepseek.errors import CalibrationError
from quant_jobs.calibration.documents import kind_of
from quant_jobs.calibration.token_blocks import TokenBlocks, load_token_blocks

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ {'user': ' w10 ', 'tool': ' w12 '}.get(m.role, ' w11 ') }}{{ m.content }}"
    "{% if m.role == 'assistant' %} {{ eos_token }}{% endif %}{% endfor %}"
    "{% if tools %} w13{% endif %}"
)
#: The ids of TEXT, and of one conversation with it.
TEXT, IDS = "w20 w21 w22 w23", [20, 21, 22, 23]
CHAT = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": TEXT}]
CHAT_IDS = [10, *IDS, 11, *IDS, 1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config, a tokenizer of words `w3` to `w95` with BOS 0 and EOS 1, and a chat template."""
    directory = tmp_path_factory.mktemp("chat") / "model"
    write_checkpoint(directory)
    write_tokenizer(directory, chat_template=TEMPLATE)
    return directory


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return make_small_model(tmp_path_factory.mktemp("small"))


def lines(*records: Any) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def load(model: Path, path: Path, content: bytes, num_tokens: int) -> TokenBlocks:
    """One block of so many tokens behind BOS, of a file with this content."""
    path.write_bytes(content)
    return load_token_blocks(path, model, 1, num_tokens + 1)


def refusal(model: Path, path: Path, content: bytes | None = None) -> str:
    """The sentence about a file, which is one line."""
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CalibrationError) as error:
        load_token_blocks(path, model, 1, 9)
    assert "\n" not in str(error.value)
    return str(error.value).replace(f"{path.parent}/", "")


@pytest.mark.parametrize(
    "name", ["a.txt", "a.TXT", "a.text", "a.Md", "without"]
)  # fmt: skip
def test_plain_text_is_read_whatever_the_case_of_its_ending(
    model: Path, tmp_path: Path, name: str
) -> None:
    blocks = load(model, tmp_path / name, TEXT.encode(), 4)
    assert blocks.ids.tolist() == [[0, *IDS]]


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.json"])
def test_records_line_by_line(model: Path, tmp_path: Path, name: str) -> None:
    content = lines({"text": TEXT, "id": 1}, {"text": "w5"})
    blocks = load(model, tmp_path / name, content, 6)
    assert blocks.ids.tolist() == [[0, *IDS, 1, 5]]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("under_data", [False, True])
def test_a_list_of_records_is_found_in_json(
    model: Path, tmp_path: Path, indent: int | None, mark: bytes, under_data: bool
) -> None:
    records: Any = [{"text": TEXT, "n": [{"]": "}"}]}, {"text": 'w5 w6 "]}\\'}, {"text": "w7"}]
    if under_data:
        records = {"version": "1", "a": [{"data": 1}], "n": 1.5, "data": records, "end": "x"}
    content = mark + json.dumps(records, indent=indent).encode()
    blocks = load(model, tmp_path / "a.json", content, 9)
    assert blocks.ids[0, :8].tolist() == [0, *IDS, 1, 5, 6]
    assert blocks.ids[0, 9] == 1  # `"]}\` is one unknown word; EOS follows


@pytest.mark.parametrize(
    ("record", "ids"),
    [
        ({"text": TEXT, "messages": CHAT, "input_ids": [7]}, IDS),
        ({"messages": CHAT, "prompt": "w9", "text": None}, CHAT_IDS),
        ({"messages": CHAT, "tools": [{"type": "function"}]}, [*CHAT_IDS, 13]),
        ({"messages": CHAT, "tools": '[{"type": "function"}]'}, [*CHAT_IDS, 13]),
        ({"messages": CHAT, "tools": []}, CHAT_IDS),
        (
            {"conversations": [{"from": "human", "value": TEXT}, {"from": "gpt", "value": TEXT}]},
            CHAT_IDS,
        ),
        ({"conversations": CHAT}, CHAT_IDS),
        ({"messages": [{"from": "tool", "value": "w5"}]}, [12, 5]),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "w5 "},
                            {"type": "text", "text": "w6"},
                        ],
                    }
                ]
            },
            [10, 5, 6],
        ),
        ({"input_ids": [*IDS, 95]}, [*IDS, 95]),
        ({"input_ids": [0, *IDS, 2, 2], "attention_mask": [1, 1, 1, 1, 1, 0, 0]}, IDS),
        ({"prompt": "w20 w21", "completion": " w22 w23"}, IDS),
        ({"prompt": "w20 w21", "response": " w22 w23", "output": "w9"}, IDS),
        ({"prompt": TEXT}, IDS),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, CHAT_IDS),
    ],
)
def test_what_a_record_may_say(
    model: Path, tmp_path: Path, record: dict[str, Any], ids: list[int]
) -> None:
    blocks = load(model, tmp_path / "a.jsonl", lines(record), len(ids))
    assert blocks.ids.tolist() == [[0, *ids]]


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"text": None}, "'text' is null; give it a value, or leave the record out"),
        ({"text": ["w5"]}, "'text' is a list, not a string"),
        ({"instruction": "a", "output": "b"}, "has 'instruction', 'output'; each record must be"),
        ({}, "has no key; each record must be"),
        ([], "a list in place of an object"),
        (3, "a number in place of an object"),
        ({"messages": []}, "'messages' is an empty list"),
        ({"messages": "hi"}, "'messages' is a string, not a list of messages"),
        ({"messages": ["hi"]}, "messages[0] is a string, not an object with role and content"),
        ({"messages": [{"content": "hi"}]}, 'messages[0] has neither a "role" nor a "from"'),
        ({"messages": [{"role": "user"}]}, 'messages[0] has no "content"; give it a string'),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content is a number"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0] is a part of type 'image_url'",
        ),
        ({"conversations": [{"from": "alien", "value": ""}]}, "by 'alien', which is none of assis"),
        ({"messages": CHAT, "tools": "{"}, "'tools' is a string that is not JSON"),
        ({"messages": CHAT, "tools": ["add"]}, "'tools' must be a list of objects"),
        ({"input_ids": []}, "'input_ids' is an empty list"),
        ({"input_ids": "1"}, "'input_ids' is a string, not a list of ids"),
        ({"input_ids": [1, True]}, "input_ids[1] is a boolean, not an id"),
        ({"input_ids": [1, 2.0]}, "input_ids[1] is 2.0, not an id"),
        ({"input_ids": [1, None]}, "input_ids[1] is null, not an id"),
        ({"input_ids": [5, 6, -1]}, "id -1 (number 2) is none of the model's 0 to 95"),
        ({"input_ids": [5, 96]}, "id 96 (number 1) is none of the model's 0 to 95"),
        ({"input_ids": [5, 10**4000]}, "id of more than 64 bits (number 1) is none of the"),
        ({"input_ids": [5], "attention_mask": [1, 1]}, "'attention_mask' must be a list of 1"),
        ({"prompt": "a", "completion": []}, "'prompt' is a string and 'completion' is a list"),
        ({"prompt": {}}, "'prompt' is an object, not a string or a list"),
        ({"text": "\ud800"}, "'text' holds half of a surrogate pair (character 0)"),
        ({"messages": [{"role": "user", "content": "\udfff"}]}, "half of a surrogate pair"),
        ({"messages": [{"role": "user", "content": "", "x": eval("[" * 66 + "]" * 66)}]}, "nested"),
    ],
)
def test_what_a_record_may_not_say_is_told_with_file_and_line(
    model: Path, tmp_path: Path, record: Any, sentence: str
) -> None:
    told = refusal(model, tmp_path / "a.jsonl", lines({"text": "w5"}, {"text": ""}, record))
    assert told.startswith("a.jsonl, line 3: ")
    assert sentence in told


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"{", "line 2: not JSON"),
        (b'{"text": "\xe9"}', "line 2: not UTF-8 text (its byte 10)"),
        (b'{"text": ' + b"[" * 200_000, "line 2: nested too deeply"),
        (b'{"input_ids": [' + b"9" * 5000 + b"]}", "line 2: not JSON (Exceeds the limit (4300"),
        (b"\n" + lines({"text": "w5"}), "line 2: not JSON (a blank line before others)"),
        (b'{"text": "\x00"}', "line 2: not JSON"),
    ],
)
def test_a_line_that_is_no_json_is_told_with_its_number(
    model: Path, tmp_path: Path, content: bytes, sentence: str
) -> None:
    told = refusal(model, tmp_path / "a.jsonl", lines({"text": "w5"}) + content)
    assert sentence in told


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"3", "holds neither a list nor an object of JSON"),
        (b"[]", "is empty"),
        (b"[1]", "byte 1: element 1 is not an object"),
        (b'[{"text": "a"} {"text": "a"}]', "byte 15: is not JSON: a comma or the list's end after"),
        (b'[{"text": "a"}, {"text": "a', "ends within element 2; the file is cut off"),
        (b'[{"text": "a"},', "byte 15: element 2 is not an object"),
        (b'[{"text": ' + b"[" * 2_000_000, "element 1 is nested deeper than 64 levels"),
        (b'[{"text": "a"}, {"text": 3}]', "a.json, element 2: 'text' is a number"),
        (b'{\n"text": ["a"]}', 'has no list under the key "data"'),
        (b'{"text": ["a"]}', "line 1: 'text' is a list, not a string"),
        (b'{\n"data": {"text": "a"}}', 'has no list under the key "data"'),
    ],
)
def test_a_list_that_is_malformed_is_told_with_its_place(
    model: Path, tmp_path: Path, content: bytes, sentence: str
) -> None:
    assert sentence in refusal(model, tmp_path / "a.json", content)


def test_a_line_too_long_is_refused_before_it_is_parsed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quant_jobs.calibration.json_documents.MAX_DOCUMENT_BYTES", 1000)
    content = lines({"text": "w5"}) + b'{"text": "' + b"w5 " * 400
    told = refusal(model, tmp_path / "a.jsonl", content)
    assert "line 2: has more than 1000 bytes; split the document" in told
    monkeypatch.setattr("quant_jobs.calibration.json_documents._CHUNK_BYTES", 500)
    told = refusal(model, tmp_path / "a.json", b"[" + content.split(b"\n")[1])
    assert "element 1 has more than 1000 bytes; split it" in told


def test_blank_lines_at_the_end_and_a_byte_order_mark_are_no_text(
    model: Path, tmp_path: Path
) -> None:
    plain = load(model, tmp_path / "a.txt", b"\xef\xbb\xbf" + TEXT.encode(), 4)
    records = load(
        model, tmp_path / "a.jsonl", b"\xef\xbb\xbf" + lines({"text": TEXT}) + b"\r\n\n", 4
    )
    assert plain.ids.tolist() == records.ids.tolist() == [[0, *IDS]]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.txt", TEXT.encode("utf-16-le"), "is not text: byte 1 is NUL; if it is UTF-16, convert"),
        ("a.txt", TEXT.encode() + b" \xe9t\xe9", "is not UTF-8 text (byte 16)"),
        ("a.csv", b"text", "has the ending .csv, which says nothing about its content; rename it"),
        ("a.v2", b"text", "to one of .txt, .text, .md, .ndjson, .jsonl, .json, .parquet, .safet"),
        ("a.jsonl.gz", b"\x1f\x8b", "is compressed (.gz); unpack it"),
        ("a.txt.ZST", b"", "is compressed (.zst); unpack it"),
        ("a.parquet", b"PAR1" + b"\xff" * 900 + b"PAR1", "is not a Parquet file, or is damaged"),
        ("a.safetensors", b"\xff" * 99, "is not a safetensors file"),
        ("a.safetensors", b"", "is empty"),
    ],
)
def test_a_file_that_is_something_else_is_refused(
    model: Path, tmp_path: Path, name: str, content: bytes, sentence: str
) -> None:
    told = refusal(model, tmp_path / name, content)
    assert told.startswith(name)
    assert sentence in told


def to_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (os.mkfifo, "a pipe"),
        (os.mkdir, "a directory"),
        (lambda p: p.symlink_to("/dev/zero"), "a dev"),
    ],
)
def test_what_is_no_regular_file_is_refused_at_once(
    model: Path, tmp_path: Path, make: Callable[[Path], None], kind: str
) -> None:
    path = tmp_path / "a.txt"
    make(path)
    assert f"a.txt is {kind}" in refusal(model, path)


def test_the_rows_of_a_table_are_records(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.Parquet"
    pq.write_table(pa.table({"n": [1, 2], "text": [TEXT, "w5"]}), path)
    assert load_token_blocks(path, model, 1, 7).ids.tolist() == [[0, *IDS, 1, 5]]
    pq.write_table(pa.table({"messages": [CHAT, CHAT], "x": [1, 2]}), path)
    blocks = load_token_blocks(path, model, 1, 23)
    assert blocks.ids.tolist() == [[0, *CHAT_IDS, *CHAT_IDS]]
    pq.write_table(pa.table({"input_ids": [[5, 6], [7]]}), path)
    assert load_token_blocks(path, model, 1, 5).ids.tolist() == [[0, 5, 6, 1, 7]]
    mixed = pa.table({"text": [TEXT, None], "messages": [None, CHAT]})
    pq.write_table(mixed, path)
    assert load_token_blocks(path, model, 1, 17).ids.tolist() == [[0, *IDS, 1, *CHAT_IDS]]


def test_what_is_wrong_in_a_table_is_told_with_its_row(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"content": ["a"], "n": [1]}), path)
    assert "has the columns 'content', 'n'; name one of them text, mess" in refusal(model, path)
    pq.write_table(pa.table({"text": ["w5", None]}), path)
    assert "a.parquet, row 2: 'text' is null" in refusal(model, path)
    pq.write_table(pa.table({"text": [1, 2]}), path)
    assert "a.parquet, row 1: 'text' is a number" in refusal(model, path)
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    assert "a.parquet has no rows" in refusal(model, path)
    offsets = pa.py_buffer(np.array([0, 2], "<i4").tobytes())
    damaged = pa.Array.from_buffers(pa.string(), 1, [None, offsets, pa.py_buffer(b"\xff\xfe")])
    pq.write_table(pa.table({"text": damaged}), path)
    assert "a.parquet, row 1: cannot be decoded" in refusal(model, path)
    pq.write_table(pa.table({"text": ["w5"] * 100}), path)
    path.write_bytes(path.read_bytes()[:-30])
    assert "is not a Parquet file, or is damaged" in refusal(model, path)


def test_a_table_of_a_few_bytes_that_holds_gigabytes_is_sampled(
    model: Path, tmp_path: Path
) -> None:
    """200,000 rows of 300 KB are 60 GB; the file has 0.1 MB."""
    path = tmp_path / "a.parquet"
    text = f"{TEXT} w30 " * 15_000
    rows = pa.DictionaryArray.from_arrays(pa.array([0] * 200_000, pa.int32()), pa.array([text]))
    pq.write_table(pa.table({"text": rows}), path)
    assert path.stat().st_size < 1 << 20
    blocks = load_token_blocks(path, model, 4, 6)
    assert blocks.ids.tolist() == [[0, *IDS, 30]] * 4


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_ready_ids_are_read_from_safetensors(
    model: Path, tmp_path: Path, dtype: type[np.generic]
) -> None:
    path = tmp_path / "a.safetensors"
    ids = np.arange(40).astype(dtype) % 90 + 5
    save_file({"input_ids": ids, "other": np.ones(3)}, path)
    assert load_token_blocks(path, model, 2, 21).ids[:, 1:].flatten().tolist() == ids.tolist()
    rows = np.array([[0, 5, 6], [7, 8, 1], [9, 2, 2]], dtype)
    mask = np.array([[1, 1, 1], [1, 1, 1], [1, 0, 0]], dtype)
    save_file({"input_ids": rows, "attention_mask": mask}, path)
    # BOS is taken off, EOS stands once between rows, and padding is left out
    assert load_token_blocks(path, model, 1, 8).ids.tolist() == [[0, 5, 6, 1, 7, 8, 1, 9]]


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"ids": np.ones(9)}, "holds 'ids'; it must hold the tensor 'input_ids'"),
        ({"input_ids": np.ones(9)}, "input_ids is float64 [9]; it must be int32 or int64"),
        ({"input_ids": np.ones((2, 2, 2), np.int64)}, "input_ids is int64 [2, 2, 2]; it must be"),
        ({"input_ids": np.ones(0, np.int64)}, "input_ids holds no ids"),
        ({"input_ids": np.arange(9) - 3}, "input_ids[0:9]: id -3 (number 0) is none of the"),
        ({"input_ids": np.full((3, 3), 96)}, "row 1: id 96 (number 0) is none of the model's"),
        (
            {"input_ids": np.ones((3, 3), np.int64), "attention_mask": np.ones((3, 2), np.int64)},
            "attention_mask is int64 [3, 2], but input_ids is int64 [3, 3]",
        ),
    ],
)
def test_what_is_wrong_with_ready_ids_is_told(
    model: Path, tmp_path: Path, tensors: dict[str, Any], sentence: str
) -> None:
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    assert sentence in refusal(model, path)


def test_ready_ids_need_no_tokenizer_and_text_says_that_they_would_not(
    small: SmallModel, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_bytes((small.directory / "config.json").read_bytes())
    blocks = load(model, tmp_path / "a.jsonl", lines({"input_ids": [5, 6]}), 2)
    assert blocks.ids.tolist() == [[0, 5, 6]]
    told = refusal(model, tmp_path / "b.jsonl", lines({"text": "w5"}))
    assert (
        "tokenizer.json is absent; the model directory must hold its tokenizer, or the file" in told
    )


def test_a_conversation_without_a_chat_template_is_refused_with_its_place(
    small: SmallModel, tmp_path: Path
) -> None:
    told = refusal(small.directory, tmp_path / "a.jsonl", lines({"messages": CHAT}))
    assert told.startswith("a.jsonl, line 1: a conversation, but ")
    assert "has no chat template; put a chat_template.jinja there, or give text" in told


def test_what_a_chat_template_refuses_is_told_with_its_place(model: Path, tmp_path: Path) -> None:
    directory = tmp_path / "model"
    write_checkpoint(directory)
    write_tokenizer(directory, chat_template="{{ raise_exception('no\\n system turn') }}")
    told = refusal(directory, tmp_path / "a.jsonl", lines({"messages": CHAT}))
    assert told.startswith("a.jsonl, line 1: the chat template in ")
    assert told.endswith("refuses these messages: no system turn")


def test_eos_stands_once_between_documents_and_bos_only_at_the_head_of_a_block(
    model: Path, tmp_path: Path
) -> None:
    """The template writes BOS, and EOS after a reply; ids may have both. A text ends in nothing."""
    records = [
        {"messages": CHAT},
        {"messages": CHAT[:1]},
        {"input_ids": [0, 5, 1]},
        {"text": "w6"},
        {"input_ids": [7]},
    ]
    ids = [*CHAT_IDS, 10, *IDS, 1, 5, 1, 6, 1, 7]
    blocks = load(model, tmp_path / "a.jsonl", lines(*records), len(ids))
    assert blocks.ids.tolist() == [[0, *ids]]


def test_a_chat_template_that_writes_the_date_writes_the_same_one_every_day(
    tmp_path: Path,
) -> None:
    directory = tmp_path / "model"
    write_checkpoint(directory)
    template = "w{{ strftime_now('%d') | int + 10 }} w{{ strftime_now('%m') | int + 20 }} w95"
    write_tokenizer(directory, chat_template=template)
    blocks = load(directory, tmp_path / "a.jsonl", lines({"messages": CHAT}), 3)
    assert blocks.ids.tolist() == [[0, 11, 21, 95]]


def test_kinds_are_known_before_a_file_is_there() -> None:
    assert kind_of(Path("nowhere.NDJSON")) == "jsonl"
    with pytest.raises(CalibrationError, match=r"nowhere\.docx has the ending \.docx"):
        kind_of(Path("nowhere.docx"))
