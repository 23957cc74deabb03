"""The whole path to TensorRT-LLM replicas, as its page shows it: from a model to streams that
survive the death of an engine, and a fleet that grows and shrinks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_from_the_model_to_streams_that_survive_in_one_command(root: Path, tmp_path: Path) -> None:
    told = tmp_path / "told.json"
    output = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "bench/trtllm_path.py", "--output", str(output), "--json", str(told)],
        cwd=root,
        env=os.environ | {"PYTHONPATH": f"{root}:{root / 'tests'}"},
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads(told.read_text())
    assert report["verdict"] == "pass"
    assert report["complete"] == report["streams"] == 6
    assert report["resumed"] > 0
    assert report["under_load_complete"] == report["under_load"] > 12
    assert report["left_behind"] == report["violations"] == []
