"""What all commands share: errors as one sentence, exit codes, output, progress with an ETA.

Exit codes: 0 success; 1 the answer is no (a plan does not fit, a gate fails); 2 the user's mistake,
with one sentence that names it and says what to change.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import NoReturn

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from deepseek.errors import IntServeError
from deepseek.text import printable


def run(app: typer.Typer) -> NoReturn:
    """Run a typer application; an IntServeError becomes one line on stderr and exit code 2."""
    try:
        app()
    except IntServeError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    sys.exit(0)


def make_app(help_text: str) -> typer.Typer:
    """A typer application with our defaults: plain tracebacks for bugs, help without arguments."""
    return typer.Typer(
        help=help_text,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )


def make_console(*, stderr: bool = False) -> Console:
    """A console for tables and lines that may hold names of others: nothing in a text is markup or
    the code of an emoji, and no word is colored by what it looks like."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def print_line(console: Console, text: str, style: str | None = None) -> None:
    """Print one line, never wrapped; what a terminal would obey in it is escaped."""
    console.print(printable(text), soft_wrap=True, style=style)


def show_lines(lines: Iterable[str]) -> None:
    """Print lines on stdout; what a terminal would obey in them is escaped."""
    for line in lines:
        typer.echo(printable(line))


def make_progress() -> Progress:
    """A progress line on stderr with elapsed time and ETA; stdout stays machine-readable."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        console=make_console(stderr=True),
    )
