"""Environments of other projects' tools: a venv for each file of pins in `tests/interop/`.

Made when a test first asks, kept in `.cache/interop/` under a name that follows from the pins, and
made anew when they change. Nothing of them is in this project's own environment or its constraints.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INTEROP = ROOT / "tests" / "interop"
CACHE = ROOT / ".cache" / "interop"


def environment(tool: str) -> Path:
    """The Python of the environment of `tests/interop/TOOL.txt`.

    Raises:
        CalledProcessError: pip cannot install what the file pins.
    """
    pins = (INTEROP / f"{tool}.txt").read_bytes()
    digest = hashlib.sha256(pins + sys.version.encode()).hexdigest()[:12]
    folder = CACHE / f"{tool}-{digest}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{tool}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two test runs one makes it and the other waits
        if not (folder / "ready").exists():
            for outdated in CACHE.glob(f"{tool}-*"):
                shutil.rmtree(outdated)
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            install = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
            subprocess.run([*install, "--requirement", INTEROP / f"{tool}.txt"], check=True)
            (folder / "ready").touch()
    return folder / "bin" / "python"


def run_in(tool: str, script: str, *words: object) -> None:
    """Run a script of `tests/interop/` in a tool's environment, where nothing of this project can
    be imported.

    Raises:
        AssertionError: it failed; with what it said.
    """
    done = subprocess.run(
        [environment(tool), "-I", INTEROP / script, *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
