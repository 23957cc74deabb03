"""The README's step-by-step commands, executed as they stand there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def executed_block(readme: str) -> str:
    marked = re.search(
        r"<!-- executed by tests/test_readme\.py -->\n```sh\n(.*?)```", readme, flags=re.DOTALL
    )
    assert marked, "README.md lost its executed block"
    return marked.group(1)


@pytest.mark.ray
@pytest.mark.timeout(400)
def test_readme_steps_run_as_written(root: Path, tmp_path: Path) -> None:
    """Run in a copy that shares the sources, so that the checkout's runs/ stays untouched."""
    for name in ("examples", "quant_jobs", "deepseek", "cluster"):
        (tmp_path / name).symlink_to(root / name)
    script = executed_block((root / "README.md").read_text(encoding="utf-8"))
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    verdict = json.loads((tmp_path / "runs/readme/engine/gate.json").read_text(encoding="utf-8"))
    assert verdict["passed"] is True
    shutil.rmtree(tmp_path / "runs")


def test_the_tree_in_the_readme_exists(root: Path) -> None:
    readme = (root / "README.md").read_text(encoding="utf-8")
    tour = re.search(r"## A tour of the tree\n\n```\n(.*?)```", readme, flags=re.DOTALL)
    assert tour
    folder = ""
    for line in tour.group(1).splitlines():
        if not line.startswith(" "):
            folder = line.split()[0]
            assert (root / folder).exists(), folder
            continue
        for name in re.findall(r"(?<![\w/])([a-z_]+(?:\.py|/))(?= )", line):
            assert (root / folder / name).exists(), f"{folder}{name}"


def test_links_in_the_docs_lead_somewhere(root: Path) -> None:
    pages = [root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").rglob("*.md"))]
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
