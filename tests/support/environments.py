"""Environments of other projects' tools: a venv for each file of pins in `tests/interop/`, and the
modules of npm that `tests/interop/node/` locks.

Made when a test first asks, kept in `.cache/interop/` under a name that follows from the pins, and
made anew when they change. Nothing of them is in this project's own environment or its constraints.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INTEROP = ROOT / "tests" / "interop"
CACHE = ROOT / ".cache" / "interop"


#: A comment in a file of pins: they are complete, and pip adds nothing to them, although a package
#: asks for more.
COMPLETE = "# pip install --no-deps."


def environment(tool: str) -> Path:
    """The Python of the environment of `tests/interop/TOOL.txt`.

    Raises:
        CalledProcessError: pip cannot install what the file pins.
    """
    pins = INTEROP / f"{tool}.txt"

    def install(folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        words = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
        if COMPLETE in pins.read_text(encoding="utf-8"):
            words.append("--no-deps")
        subprocess.run([*words, "--requirement", pins], check=True)

    folder = _made_once(tool, _pinned(pins) + sys.version.encode(), install)
    return folder / "bin" / "python"


def _pinned(pins: Path) -> bytes:
    """A file of pins, and those that it includes (`-r OTHER.txt`)."""
    content = pins.read_bytes()
    included = (line.removeprefix("-r ") for line in content.decode().splitlines())
    others = (name for name in included if (pins.parent / name).is_file())
    return content + b"".join(_pinned(pins.parent / name) for name in others)


def node_environment() -> Path:
    """A folder whose `node_modules` is what `tests/interop/node/package-lock.json` says.

    Raises:
        CalledProcessError: npm cannot install it.
    """
    names = ("package.json", "package-lock.json")

    def install(folder: Path) -> None:
        folder.mkdir()
        for name in names:
            shutil.copy(INTEROP / "node" / name, folder)
        command = ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)

    locked = b"".join((INTEROP / "node" / name).read_bytes() for name in names)
    return _made_once("node", locked, install)


def _made_once(tool: str, pins: bytes, install: Callable[[Path], None]) -> Path:
    folder = CACHE / f"{tool}-{hashlib.sha256(pins).hexdigest()[:12]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{tool}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two test runs one makes it and the other waits
        if not (folder / "ready").exists():
            for outdated in CACHE.glob(f"{tool}-*"):
                shutil.rmtree(outdated)
            install(folder)
            (folder / "ready").touch()
    return folder


def run_in(tool: str, script: str, *words: object, **variables: str) -> None:
    """Run a script of `tests/interop/` in a tool's environment. It can import the other scripts
    there and nothing else of this project. `variables` are further environment variables.

    Raises:
        AssertionError: it failed; with what it said.
    """
    run_checked([environment(tool), "-E", "-s", INTEROP / script, *words], **variables)


def run_checked(command: Sequence[object], timeout_s: float = 900, **variables: str) -> str:
    """Run a command to its end, and give its stdout.

    Raises:
        AssertionError: it failed; with what it said.
        TimeoutExpired: it did not end in time; it is killed.
    """
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
        env={**os.environ, **variables},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
