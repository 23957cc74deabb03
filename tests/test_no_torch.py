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
    "serve_app.gating",
)


@pytest.mark.parametrize("module", MODULES)
def test_reading_documents_brings_no_torch(module: str, root: Path) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
