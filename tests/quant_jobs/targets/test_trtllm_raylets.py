"""TensorRT-LLM engines built over raylets, killed or not: the bytes of a build in one process."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from support.building import TASK, BuildProcess
from support.quantizing import contents
from support.raylets import Raylets
from support.small_engines import whole
from support.trtllm_directories import SHAPE, make_artifact, make_source

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

NUM_LAYERS = 12
NUM_FILES = NUM_LAYERS + 1


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve layers, INT4 experts, static input scales."""
    root = tmp_path_factory.mktemp("artifact")
    make_source(root / "source", **(SHAPE | {"layers": NUM_LAYERS}))
    make_artifact(root / "source", "w4a8", root / "w4a8")
    return root / "w4a8"


def start(
    cluster: Raylets | None, artifact: Path, output: Path, workers: int, *more: object
) -> BuildProcess:
    return BuildProcess(
        cluster,
        output,
        *("-m", "quant_jobs", "build", "--checkpoint", artifact, "--output", output),
        *("--target", "trtllm", "--tp", 4, "--ep", 2, "--workers", workers, "--json", *more),
    )


def answer(process: BuildProcess) -> dict[str, Any]:
    code, out, err = process.end()
    assert code == 0, err
    result: dict[str, Any] = json.loads(out)
    return result


@pytest.fixture(scope="module")
def expected(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """An undisturbed build without Ray."""
    output = tmp_path_factory.mktemp("plain") / "out"
    answer(start(None, artifact, output, 0))
    return contents(output)


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_any_number_of_workers_builds_the_same_bytes_and_reads_every_byte_once(
    cluster: Raylets, artifact: Path, tmp_path: Path, expected: dict[str, bytes], workers: int
) -> None:
    result = answer(start(cluster, artifact, tmp_path / "out", workers))
    assert whole(tmp_path / "out") == expected
    files = artifact.glob("model-*.safetensors")
    assert result["bytes_read"] <= sum(path.stat().st_size for path in files)


@pytest.mark.slow
def test_a_build_that_is_killed_three_times_ends_in_the_same_bytes(
    cluster: Raylets, artifact: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    output = tmp_path / "out"
    killed = []
    for parts in (1, 4, 8):
        process = start(cluster, artifact, output, 2)
        process.wait_for(lambda process=process, parts=parts: process.num_parts >= parts)
        process.kill()
        killed.append(process.num_parts)
    assert killed[0] < NUM_FILES
    answer(start(cluster, artifact, output, 3))
    assert whole(output) == expected


def test_a_killed_worker_and_a_killed_raylet_cost_no_byte(
    cluster: Raylets, artifact: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    output = tmp_path / "out"
    process = start(cluster, artifact, output, 3)
    process.wait_for(lambda: bool(cluster.processes(TASK)))
    stopped = cluster.processes(TASK)[0]
    os.kill(stopped, signal.SIGSTOP)  # so that its file is in hand when its node dies
    index = cluster.index_of(stopped)
    process.wait_for(lambda: process.num_parts >= 2)
    cluster.kill_node(index)
    code, _, err = process.end()
    assert code == 0, err
    assert "lost the worker or node that had file " in err
    assert whole(output) == expected


@pytest.mark.slow
def test_a_lost_file_is_made_again_by_the_same_command(
    cluster: Raylets, artifact: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    output = tmp_path / "out"
    answer(start(cluster, artifact, output, 2))
    lost = output / "model-layer-00005.safetensors"
    lost.unlink()
    result = answer(start(cluster, artifact, output, 2, "--stage", tmp_path / "{node}" / "engine"))
    assert whole(output) == expected
    assert [node["copied_bytes"] for node in result["stage"]["nodes"]] == [result["bytes"]] * 3
    for node in cluster.node_ids:
        assert whole(tmp_path / node / "engine") == expected


@pytest.mark.slow
def test_a_checkpoint_that_is_damaged_is_named_whichever_worker_finds_it(
    cluster: Raylets, artifact: Path, tmp_path: Path
) -> None:
    path = artifact / "model-layer-00007.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        code, _, err = start(cluster, artifact, tmp_path / "out", 3).end()
    finally:
        path.write_bytes(content)
    assert code == 2
    last = err.splitlines()[-1]
    assert last.startswith("error: tensor model.layers.7.")
    assert f" in {path} is damaged: " in last
    assert "Traceback" not in err
