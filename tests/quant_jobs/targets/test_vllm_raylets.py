"""vLLM engines built over raylets: the bytes of a build in one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.building import BuildProcess
from support.quantizing import contents
from support.raylets import Raylets
from support.vllm_builds import build_vllm_engine, make_vllm_artifact

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]


def test_workers_on_other_nodes_build_the_same_bytes(cluster: Raylets, tmp_path: Path) -> None:
    artifact = make_vllm_artifact(tmp_path, "int8-weight-only", layers=4)
    build_vllm_engine(artifact.directory, tmp_path / "plain")
    output = tmp_path / "engine"
    process = BuildProcess(
        cluster,
        output,
        *("-m", "quant_jobs", "build", "--checkpoint", artifact.directory, "--output", output),
        *("--target", "vllm", "--tp", 2, "--workers", 3, "--json"),
    )
    code, out, err = process.end()
    assert code == 0, err
    assert json.loads(out)["target"] == "vllm"
    assert contents(output) == contents(tmp_path / "plain")
