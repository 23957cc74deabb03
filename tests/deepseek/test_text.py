"""What others wrote cannot act on a terminal, a log or a sentence."""

from __future__ import annotations

import io
import pickle

import pytest
from rich.console import Console

from deepseek.cli import make_console, print_line, show_lines
from deepseek.errors import CheckpointError, IntServeError
from deepseek.text import MAX_TEXT, MAX_WORD, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a plain name, with é and …", "a plain name, with é and …"),
        ("\x1b[2J\x1b[31mred", r"\x1b[2J\x1b[31mred"),
        ("a\nerror: b\r\tc", r"a\nerror: b\r\tc"),
        ("to the \u202eleft", r"to the \u202eleft"),
        ("line\u2028apart\x85", r"line\u2028apart\x85"),
        ("\x9b1m, the 8-bit form", r"\x9b1m, the 8-bit form"),
        ("not UTF-8 \udcff", r"not UTF-8 \udcff"),
        ("[bold]no markup[/]", "[bold]no markup[/]"),
    ],
)
def test_what_a_terminal_would_obey_becomes_an_escape(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert printable(shown) == shown


@pytest.mark.parametrize("text", ["x" * 1_000_000, "\x1b" * 1_000_000, "word " * 300_000])
def test_a_sentence_is_short_however_long_the_name(text: str) -> None:
    shown = printable(f"tensor {text} is damaged")
    assert len(shown) <= MAX_TEXT
    assert shown.startswith("tensor ")
    assert shown.endswith(" is damaged")
    assert max(map(len, shown.split())) <= MAX_WORD
    assert printable(shown) == shown


def test_an_error_is_printable_wherever_it_is_shown() -> None:
    error = CheckpointError("tensor \x1b]0;title\x07 is\nmissing")
    shown = r"tensor \x1b]0;title\x07 is\nmissing"
    assert str(error) == shown
    assert str(pickle.loads(pickle.dumps(error))) == shown  # over the actor hop
    assert str(IntServeError(f"{error}; correct it")) == f"{shown}; correct it"


def test_lines_and_tables_take_no_markup_and_no_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    show_lines(["PASS \x1b[31m[red]int8[/]", "two"])
    assert capsys.readouterr().out == "PASS \\x1b[31m[red]int8[/]\ntwo\n"
    print_line(make_console(), "[/closing] of :smile: \x1b[0m", style="bold")
    assert capsys.readouterr().out == "[/closing] of :smile: \\x1b[0m\n"
    # The console that the lines were printed on before:
    with pytest.raises(Exception, match="closing tag"):
        Console(file=io.StringIO()).print("[/closing]")
