"""The engine's environment, written down: what `pip install -r` makes it again from."""

from __future__ import annotations

import subprocess
from pathlib import Path

from deepseek.errors import DeployError

ROOT = Path(__file__).resolve().parent.parent.parent
REQUIREMENTS = ROOT / "serve_app" / "engines" / "requirements"


def write_lock(python: Path, version: str, path: Path) -> int:
    """Write the packages of an environment, with the index of the wheel's requirements file, and
    return how many there are.

    Raises:
        DeployError: the environment's pip does not say.
    """
    done = subprocess.run(
        [str(python), "-m", "pip", "freeze", "--disable-pip-version-check"],
        capture_output=True,
        text=True,
        check=False,
    )
    packages = sorted(
        {line for line in done.stdout.splitlines() if "==" in line or " @ " in line}, key=str.lower
    )
    if done.returncode or not packages:
        reason = done.stderr.strip().splitlines()[-1:] or ["no packages"]
        raise DeployError(f"{python} -m pip freeze says nothing: {reason[0]}")
    requirements = (REQUIREMENTS / f"trtllm-{version}.txt").read_text()
    indexes = [line for line in requirements.splitlines() if line.startswith("--")]
    head = [f"# The environment in which TensorRT-LLM {version} was smoked.", *indexes]
    path.write_text("\n".join([*head, *packages]) + "\n")
    return len(packages)
