"""The file of API keys: who may read it, and that what cannot be used is told before a start."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from deepseek.errors import ConfigError
from deepseek.untrusted import UnusableFileError
from serve_app.config import ServeConfig, load_config
from serve_app.key_file import read_key_bytes

ECHO = {"pools": {"default": {"engine": {"kind": "echo"}}}}


def write(tmp_path: Path, data: bytes, mode: int = 0o600) -> Path:
    path = tmp_path / "keys"
    path.write_bytes(data)
    path.chmod(mode)
    return path


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o440])
def test_a_file_that_is_closed_to_others_is_read_whole(tmp_path: Path, mode: int) -> None:
    data = os.urandom(300_000)
    assert read_key_bytes(write(tmp_path, data, mode)) == data


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o660, 0o666, 0o777, 0o602])
def test_a_file_that_others_can_use_is_refused(tmp_path: Path, mode: int) -> None:
    path = write(tmp_path, b"sk-CANARY\n", mode)
    with pytest.raises(UnusableFileError, match=rf"^has mode {mode:04o}: .*; chmod 600 it$"):
        read_key_bytes(path)


def test_a_file_of_any_size_costs_no_more_than_the_limit(tmp_path: Path) -> None:
    with pytest.raises(UnusableFileError, match="has over 1048576 bytes"):
        read_key_bytes(write(tmp_path, b"CANARY" * 200_000))


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(tmp_path / "nothing")
    for path in (pipe, link, tmp_path, tmp_path / "absent"):
        with pytest.raises(UnusableFileError):
            read_key_bytes(path)


@pytest.mark.parametrize(
    ("data", "mode", "sentence"),
    [
        (None, 0o600, "cannot be read"),
        (b"sk-CANARY\n", 0o644, "has mode 0644"),
        (b"# only a comment\n", 0o600, "holds no key"),
        (b"sk-CANARY two\n", 0o600, "holds in line 1 what no header carries"),
        (b"keys: []\n", 0o600, "is wrong at keys"),
        (b"keys: [{name: a, key: sk-CANARY}, {name: a, key: sk-other}]\n", 0o600, "the name a"),
    ],
)
def test_the_command_refuses_a_file_that_it_cannot_use_before_it_starts(
    tmp_path: Path, data: bytes | None, mode: int, sentence: str
) -> None:
    path = tmp_path / "keys" if data is None else write(tmp_path, data, mode)
    with pytest.raises(ConfigError, match=sentence) as refused:
        load_config(None, ECHO | {"keys": {"file": str(path)}})
    assert str(refused.value).startswith(str(path))
    assert "CANARY" not in str(refused.value)


@pytest.mark.parametrize(
    "keys",
    [
        *("sk-CANARY", ["sk-CANARY"], {"sk-CANARY": 1}, {"inline": "sk-CANARY"}),
        *({"inline": ["sk-CANARY x"]}, {"inline": [["sk-CANARY"]]}, {"inline": {"sk-CANARY": 1}}),
        *({"variable": "sk-CANARY"}, {"inline": ["sk-CANARY"], "file": ["sk-CANARY"]}),
    ],
)
def test_no_mistake_in_the_configuration_shows_a_key(keys: object) -> None:
    given = ECHO | {"keys": keys}
    with pytest.raises(ConfigError) as refused:
        load_config(None, given)
    assert "CANARY" not in str(refused.value)
    with pytest.raises((ConfigError, ValidationError)) as shown:  # as Serve reads a deploy file
        ServeConfig.model_validate(given)
    assert "CANARY" not in str(shown.value)


def test_the_command_refuses_a_variable_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ECHO | {"keys": {"variable": "SOME_KEYS"}}
    monkeypatch.delenv("SOME_KEYS", raising=False)
    with pytest.raises(ConfigError, match=r"^the environment variable SOME_KEYS is not set; set"):
        load_config(None, settings)
    monkeypatch.setenv("SOME_KEYS", "sk-one")
    load_config(None, settings)
