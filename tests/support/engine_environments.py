"""A Python environment whose `tensorrt_llm` is the double, as `make engine-env` makes one whose
`tensorrt_llm` is NVIDIA's: what a configuration's `python` names where everything else is real."""

from __future__ import annotations

import site
import venv
from pathlib import Path

from support.trtllm_doubles import DOUBLE_PATH


def make_double_environment(folder: Path) -> Path:
    """Make it in a folder and return its Python. It sees the packages of this environment, of which
    the double needs torch."""
    venv.EnvBuilder(symlinks=True).create(folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    paths = [*DOUBLE_PATH, *site.getsitepackages()]
    (packages / "double.pth").write_text("".join(f"{path}\n" for path in paths))
    return folder / "bin" / "python"
