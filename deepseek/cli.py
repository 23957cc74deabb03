"""What all commands share: errors as one sentence, exit codes, output, progress with an ETA.

Exit codes: 0 success; 1 the answer is no (a plan does not fit, a gate fails); 2 the user's mistake,
with one sentence that names it and says what to change; 130 and 143 stopped by SIGINT, SIGTERM.
"""

from __future__ import annotations

import contextlib
import errno
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import NoReturn

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from deepseek.errors import IntServeError
from deepseek.text import printable


class _Stopped(BaseException):
    """SIGINT or SIGTERM. Not an Exception: only what cleans up may see it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def run(app: typer.Typer) -> NoReturn:
    """Run a typer application. An IntServeError becomes one line on stderr and exit code 2, and so
    does an error of the operating system that names a file or a failing device. SIGINT and SIGTERM
    end the command in order, with one line and the exit code of a shell, 130 or 143."""
    try:
        with _stopping():
            app()
    except IntServeError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except OSError as error:
        if error.filename is None and error.errno not in _DEVICE_ERRORS:
            raise
        _report(error)
        sys.exit(2)
    except _Stopped as stopped:
        name = signal.Signals(stopped.signum).name
        sys.stderr.write(
            f"stopped by {name}; nothing is half-written, run the same command again to go on\n"
        )
        sys.exit(128 + stopped.signum)
    sys.exit(0)


#: What happens to files anywhere, whatever the program does.
_DEVICE_ERRORS = (
    *(errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),
    *(errno.EMFILE, errno.ENFILE),
)


def _report(error: OSError) -> None:
    place = "a file" if error.filename is None else str(error.filename)
    reason = (error.strerror or str(error)).lower()
    sys.stderr.write(
        f"error: {place} cannot be used ({reason}); correct that, then run the same command again\n"
    )


@contextlib.contextmanager
def _stopping() -> Iterator[None]:
    """Raise `_Stopped` in the main thread at SIGINT and SIGTERM, where nobody else handles them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: object) -> None:
        raise _Stopped(signum)

    before = {
        signum: signal.signal(signum, stop)
        for signum in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(signum) not in (signal.SIG_IGN, None)  # `nohup`, `command &`
    }
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


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
    the code of an emoji, and no word is colored by what it looks like. What is no terminal gets
    plain lines without control codes."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def print_line(console: Console, text: str, style: str | None = None) -> None:
    """Print one line, never wrapped; what a terminal would obey in it is escaped."""
    console.print(printable(text), soft_wrap=True, style=style)


def show_lines(lines: Iterable[str]) -> None:
    """Print lines on stdout; what a terminal would obey in them is escaped."""
    for line in lines:
        typer.echo(printable(line))


def make_progress(remaining: ProgressColumn | None = None) -> Progress:
    """A progress line on stderr with elapsed time and ETA; stdout stays machine-readable.
    `remaining` shows the time that is left in place of rich's own column."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        remaining or TimeRemainingColumn(),
        # Files and layers of a large model take longer than the 30 s that rich looks back.
        speed_estimate_period=3600.0,
        console=make_console(stderr=True),
    )
