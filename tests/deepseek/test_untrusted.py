"""Files that others wrote: only regular files, only so large, only inside their directory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deepseek.untrusted import (
    MAX_DEPTH,
    UnusableFileError,
    parse_json,
    read_bytes,
    read_json_object,
)


def test_a_regular_file_is_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + '{"a": [1, "\u00e9"]}\r\n'.encode())
    assert read_json_object(path, root=tmp_path) == {"a": [1, "\u00e9"]}


def test_a_file_of_more_bytes_than_allowed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    path.write_bytes(b"x" * 101)
    with pytest.raises(UnusableFileError, match="has 101 bytes, more than the 100"):
        read_bytes(path, max_bytes=100)
    assert len(read_bytes(path, max_bytes=101)) == 101


@pytest.mark.timeout(10)
def test_pipes_devices_and_directories_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name, kind in {"pipe": "a pipe", "zero": "a device", "folder": "a directory"}.items():
        with pytest.raises(UnusableFileError, match=f"is {kind}, not a regular file"):
            read_bytes(tmp_path / name)


def test_a_link_is_followed_inside_its_directory_only(tmp_path: Path) -> None:
    model, secret = tmp_path / "model", tmp_path / "private.key"
    model.mkdir()
    secret.write_text("secret")
    (model / "real.txt").write_text("text")
    (model / "inside.txt").symlink_to("real.txt")
    (model / "outside.txt").symlink_to("../private.key")
    (model / "circle.txt").symlink_to("circle.txt")
    assert read_bytes(model / "inside.txt", root=model) == b"text"
    with pytest.raises(UnusableFileError, match="link to a file outside its directory"):
        read_bytes(model / "outside.txt", root=model)
    with pytest.raises(UnusableFileError, match="cannot be read"):
        read_bytes(model / "circle.txt", root=model)
    assert read_bytes(model / "outside.txt") == b"secret"  # named by the user: no root


def test_a_snapshot_of_the_hub_cache_may_link_to_its_own_blobs_only(tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "abcd").write_text("{}")
    (repository / "other").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/abcd")
    (snapshot / "index.json").symlink_to("../../other")
    assert read_bytes(snapshot / "config.json", root=snapshot) == b"{}"
    with pytest.raises(UnusableFileError, match="outside its directory"):
        read_bytes(snapshot / "index.json", root=snapshot)


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b'{"a": "\xff"}', "is not UTF-8 text .byte 7.; convert"),
        ('{"a": 1}'.encode("utf-16"), "is not UTF-8 text"),
        (b"[" * 10_000_000, f"is nested deeper than {MAX_DEPTH} levels"),
        (b"[" * 100 + b"]" * 100, f"is nested deeper than {MAX_DEPTH} levels"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"a": -Infinity}', "-Infinity is no JSON number"),
        (b'{"a": 1, "b": 2, "a": 3}', "key 'a' is given twice"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair in '.ud800'"),
        (b'{"\\udc00": 1}', "half of a surrogate pair"),
        (b'{"a": ' + b"1" * 5000 + b"}", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"null", "must hold a JSON object, not null"),
        (b"[]", "must hold a JSON object, not a list"),
    ],
)
def test_what_is_not_one_json_object_gets_one_sentence(
    tmp_path: Path, data: bytes, sentence: str
) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(data)
    with pytest.raises(UnusableFileError, match=sentence) as caught:
        read_json_object(path)
    assert "\n" not in str(caught.value)


def test_json_within_the_depth_keeps_its_values() -> None:
    data = b"[" * MAX_DEPTH + b"]" * MAX_DEPTH
    value, depth = parse_json(data), 1
    while value:
        (value,) = value
        depth += 1
    assert depth == MAX_DEPTH
    assert parse_json(b'"\\ud83d\\ude00"') == "\U0001f600"
