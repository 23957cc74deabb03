"""The file of API keys: what it may hold, and who may read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepseek.errors import ConfigError
from serve_app.config import load_config
from serve_app.key_file import read_key_file


def write(tmp_path: Path, data: bytes, mode: int = 0o600) -> Path:
    path = tmp_path / "keys"
    path.write_bytes(data)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o440])
def test_one_key_a_line_and_comments_and_empty_lines_are_none(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path, b"# alice\nsk-one\r\n\n  sk-two==  \n#sk-three\n", mode)
    keys = read_key_file(path)
    assert [key.get_secret_value() for key in keys] == ["sk-one", "sk-two=="]
    assert "sk-one" not in repr(keys)


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o660, 0o666, 0o777, 0o602])
def test_a_file_that_others_can_use_is_refused(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ConfigError, match=rf"keys has mode {mode:04o}: .*; chmod 600 it$"):
        read_key_file(write(tmp_path, b"sk-CANARY\n", mode))


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "holds no key; write one a line"),
        (b"\n# CANARY\n", "holds no key; write one a line"),
        (b"good\nCANARY two\n", "holds in line 2 what no header carries"),
        ("CANARY\u00e9".encode(), "holds in line 1 what no header carries"),
        (b"CANARY\xff", "UTF-8"),
        (b"CANARY\x00", "holds in line 1"),
        (b"CANARY" * 200_000, "has over 1048576 bytes"),
    ],
)
def test_what_holds_no_keys_is_refused_and_not_shown(
    tmp_path: Path, data: bytes, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence) as refused:
        read_key_file(write(tmp_path, data))
    assert "CANARY" not in str(refused.value)


def test_the_command_refuses_a_file_that_it_cannot_use_before_it_starts(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(ConfigError, match=str(path)):
            load_config(None, {"echo": {}, "api_keys_file": path})


def test_keys_of_the_file_and_of_the_settings_are_both_right(tmp_path: Path) -> None:
    path = write(tmp_path, b"from-file\n")
    config = load_config(None, {"echo": {}, "api_keys": ["inline"], "api_keys_file": path})
    assert [key.get_secret_value() for key in config.all_keys()] == ["inline", "from-file"]
