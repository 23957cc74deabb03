"""Where only documents are read, torch is not imported: it alone takes seconds to load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MODULES = (
    "deepseek.artifact.built_engine",
    "deepseek.artifact.engine_manifest",
    "deepseek.artifact.manifest",
    "deepseek.artifact.verdict",
    "deepseek.files",
    "deepseek.trtllm.lint",
    "quant_jobs.__main__",
    "quant_jobs.evaluation.limits",
    "quant_jobs.evaluation.record",
    "quant_jobs.gate",
    "serve_app.app",
    "serve_app.gating",
)


@pytest.mark.parametrize("module", MODULES)
def test_reading_documents_brings_no_torch(module: str, root: Path) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_deploying_the_embedded_engine_brings_no_torch(root: Path, tmp_path: Path) -> None:
    code = """
import sys
from serve_app.app import engine_factory
from serve_app.config import ServeConfig
from serve_app.gating import check_tensors
engine = {"kind": "embedded", "directory": sys.argv[1]}
config = ServeConfig.model_validate({"pools": {"default": {"engine": engine}}})
engine_factory(config.pool)
check_tensors(config.pool.directory, "embedded", digests=False)
print("torch" in sys.modules)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
