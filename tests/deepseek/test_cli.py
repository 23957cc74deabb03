"""How a command ends: one line and an exit code, whatever ends it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import errno, sys, time
from deepseek.cli import make_app, run
from deepseek.files import published_file
from pathlib import Path
app = make_app("help")
@app.command()
def write(path: Path) -> None:
    with published_file(path) as file:
        file.write(b"half")
        print("writing", flush=True)
        time.sleep(60)
@app.command()
def read(path: Path) -> None:
    path.read_bytes()
@app.command()
def fail() -> None:
    raise OSError(errno.EIO, "Input/output error")
@app.command()
def bug() -> None:
    raise OSError("a bug")
run(app)
"""


def command(root: Path, *words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, words)],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_command_says_so_in_one_line_and_leaves_nothing_half_written(
    root: Path, tmp_path: Path, signum: int, code: int
) -> None:
    process = command(root, "write", tmp_path / "file")
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    name = signal.Signals(signum).name
    assert err == (
        f"stopped by {name}; nothing is half-written, run the same command again to go on\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (("read", "/nowhere/a"), 2, "error: /nowhere/a cannot be used (no such file or directory)"),
        (("read", "/proc/self/mem"), 2, "error: a file cannot be used (input/output error)"),
        (("fail",), 2, "error: a file cannot be used (input/output error); correct that, then"),
        (("bug",), 1, "OSError: a bug"),
    ],
)
def test_an_error_of_the_system_is_a_sentence_and_a_bug_is_a_traceback(
    root: Path, words: tuple[str, ...], code: int, sentence: str
) -> None:
    process = command(root, *words)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "")
    assert err.splitlines()[-1].startswith(sentence)
    assert ("Traceback" in err) == (code == 1)
