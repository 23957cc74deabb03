"""YAML of a user is read as it looks, or refused in one sentence, whatever it is."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from deepseek.untrusted import UnusableFileError
from deepseek.yaml_files import MAX_DEPTH, MAX_YAML_BYTES, read_yaml_mapping

FEW = 1000
#: Nine lists of nine aliases each of the one before: 9^9 values, as many as a gigabyte of text.
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)
#: Deep only through its aliases.
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 1000))

REFUSED = {
    "a key twice": ("a: 1\nb: 2\na: 3", "gives the key 'a' twice (line 3, column 1)"),
    "a nested key twice": ("a: {b: 1, b: 2}", "gives the key 'b' twice (line 1, column 11)"),
    "billion laughs": (BOMB, f"holds more than {FEW} values (line "),
    "merged laughs": (BOMB + "b:\n  <<: [" + "{c: *a4}, " * 9 + "]\n", "holds more than"),
    "aliases in depth": (CHAIN, f"is nested deeper than {MAX_DEPTH} levels (line "),
    "an alias of itself": ("a: &a [x, *a]", "has an alias for something that the alias is part of"),
    "deep": ("a: " + "[" * 100_000, f"is nested deeper than {MAX_DEPTH} levels"),
    "deep mappings": ("a: " + "{a: " * 50_000, f"is nested deeper than {MAX_DEPTH} levels"),
    "long": ("a: [" + "x, " * FEW + "]", f"holds more than {FEW} values"),
    "base 60": ("a: 1:30", "holds 1:30, which YAML reads as a number of base 60 or 8 (line 1,"),
    "base 60, a fraction": ("a: 1:30.5", "which YAML reads as a number of base 60"),
    "base 8": ("a: 010", "which YAML reads as a number of base 60 or 8"),
    "no digits": ("a: 0x_", "holds 0x_, which YAML reads as a number without digits (line 1,"),
    "no binary digits": ("a: -0b_", "holds -0b_, which YAML reads as a number without digits"),
    "a date": ("a: 2024-01-01", "holds 2024-01-01, which YAML reads as a date"),
    "infinity": ("a: .inf", "holds .inf, which is no finite number (line 1, column 4)"),
    "overflow": ("a: 1.0e+400", "holds 1.0e+400, which is no finite number"),
    "NaN": ("a: [1, .nan]", "holds .nan, which is no finite number (line 1, column 8)"),
    "5000 digits": ("a: " + "9" * 5000, "which YAML reads as an integer of more than 100 digits"),
    "a number as key": ("5: x", "has a key '5' that is no string (line 1, column 1)"),
    "a boolean as key": ("on: x", "has a key 'on' that is no string"),
    "a list as key": ("? [1]\n: x", "has a key that is no string"),
    "a list as merged key": ("<<: {[1]: 2}", "has a key that is no string"),
    "a Python object": ("a: !!python/object:os.system {}", "uses the YAML type 'python/object:os."),
    "a tag of its own": ("a: !foo 1", "uses the YAML type '!foo'"),
    "bytes": ("a: !!binary aGk=", "uses the YAML type 'binary'"),
    "a set": ("a: !!set {x}", "uses the YAML type 'set'"),
    "null": ("null", "must hold a mapping of keys to values, not nothing"),
    "nothing": ("", "must hold a mapping of keys to values, not nothing"),
    "a list": ("- a", "must hold a mapping of keys to values, not a list"),
    "a string": ("text", "must hold a mapping of keys to values, not one value"),
    "two documents": ("a: 1\n---\nb: 2", "is not valid YAML: but found another document"),
    "a NUL": ("a: \0", "is not valid YAML: unacceptable character #x0000"),
    "a surrogate": ('a: "\\ud800"', "holds half of a surrogate pair"),
    "an unknown alias": (
        "a: *x",
        "is not valid YAML: found undefined alias 'x' (line 1, column 4)",
    ),
    "not closed": ("a: [", "is not valid YAML: "),
    "a tab": ("a:\n\t- b", "is not valid YAML: found character '\\t'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_in_one_sentence_that_says_where(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepseek.yaml_files.MAX_NODES", FEW)  # so many take a second to read
    text, message = REFUSED[case]
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(UnusableFileError) as caught:
        read_yaml_mapping(path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    masked = caught.value.masked
    assert "'" not in masked, "for a file of secrets nothing is quoted from it"
    assert not re.search(r"holds (?!a |more |half )", masked)
    assert re.findall(r"\(line.*\)", masked) == re.findall(r"\(line.*\)", str(caught.value))


VALUES: list[tuple[str, Any]] = [
    ("1", 1),
    ("-0x1F", -31),
    ("1_000", 1000),
    ("0", 0),
    ("0.5", 0.5),
    ("1.5e-3", 0.0015),
    ("yes", True),
    ("~", None),
    ("'1:30'", "1:30"),
    ("1e-3", "1e-3"),
    ("[a, {b: c}]", ["a", {"b": "c"}]),
    (">-\n  two\n  lines\n", "two lines"),
    ("é", "é"),
]


@pytest.mark.parametrize(("text", "value"), VALUES, ids=[text for text, _ in VALUES])
def test_values_are_pyyamls(tmp_path: Path, text: str, value: object) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"\ufeffa: {text}", encoding="utf-8")
    assert read_yaml_mapping(path) == {"a": value}


def test_aliases_and_merged_keys_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("x: &x {p: 1, q: [2]}\ny: {<<: *x, p: 3}\nz: *x\n")
    x = {"p": 1, "q": [2]}
    assert read_yaml_mapping(path) == {"x": x, "y": {"p": 3, "q": [2]}, "z": x}


def test_other_encodings_and_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    for data, message in (
        (b"a: \xff", r"is not UTF-8 text \(byte 3\); convert it to UTF-8"),
        ("a: 1".encode("utf-16"), r"is not UTF-8 text \(byte 0\)"),
        (b"a: 1\n" + b"#" * MAX_YAML_BYTES, f"more than the {MAX_YAML_BYTES} that such a file"),
    ):
        path.write_bytes(data)
        with pytest.raises(UnusableFileError, match=message):
            read_yaml_mapping(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnusableFileError, match="is a pipe, not a regular file"):
        read_yaml_mapping(tmp_path / "pipe")
    with pytest.raises(UnusableFileError, match="is a device, not a regular file"):
        read_yaml_mapping(Path("/dev/zero"))
