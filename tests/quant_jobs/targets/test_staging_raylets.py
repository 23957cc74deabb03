"""Copies of an engine on three raylets, each with a directory of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.disks import NotPermitted, mounted
from support.raylets import Raylets
from support.small_engines import make_small_engine, whole

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[3]
#: Title of a process that copies.
TASK = "ray::_copy_on_node"

PROGRAM = """
import sys
from pathlib import Path
from deepseek.errors import IntServeError
from quant_jobs.targets.staging import stage_engine

def note(line):
    print(line, file=sys.stderr, flush=True)

answer, sys.stdout = sys.stdout, sys.stderr
try:
    engine, local = map(Path, sys.argv[1:])
    report = stage_engine(engine, local, 2, lambda done, total: None, note=note)
    print(report.model_dump_json(), file=answer)
    report.check()
except IntServeError as error:
    sys.exit(f"error: {error}")
"""


def start(cluster: Raylets, engine: Path, local: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(engine), str(local)],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": cluster.address},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(reached: Callable[[], object]) -> None:
    deadline = time.monotonic() + 120
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_every_node_gets_its_own_copy(cluster: Raylets, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    manifest = make_small_engine(engine)
    for copied in (manifest.num_bytes, 0):
        process = start(cluster, engine, tmp_path / "{node}" / "engine")
        answer, err = process.communicate()
        assert process.returncode == 0, err
        report = json.loads(answer)
        assert report["engine_digest"] == manifest.digest
        assert {node["node"] for node in report["nodes"]} == set(cluster.node_ids)
        assert [node["copied_bytes"] for node in report["nodes"]] == [copied] * 3
        assert "joined" not in err
    for node in cluster.node_ids:
        assert whole(tmp_path / node / "engine") == whole(engine)


def test_a_node_that_cannot_is_named_and_spoils_no_other_copy(
    cluster: Raylets, tmp_path: Path
) -> None:
    engine, (first, second, third) = tmp_path / "engine", cluster.node_ids
    make_small_engine(engine)
    (tmp_path / first).write_text("in the way")
    try:
        with mounted(tmp_path / second, "size=200k"):
            process = start(cluster, engine, tmp_path / "{node}" / "engine")
            _, err = process.communicate()
    except NotPermitted as error:
        pytest.skip(str(error))
    assert process.returncode == 1
    assert whole(tmp_path / third / "engine") == whole(engine)
    last = err.splitlines()[-1]
    assert last.startswith("error: 2 of 3 nodes have no copy of the engine: node ")
    assert f"node {first[:12]} (" in last
    assert f"{tmp_path / first} is a file; --stage must name a directory" in last
    assert f"node {second[:12]} (" in last
    assert "needs 500.0 kB more of its disk, but only 204.8 kB are free" in last
    assert third[:12] not in last


@pytest.mark.slow
def test_a_node_that_joins_gets_a_copy_and_one_that_dies_is_reported(
    cluster: Raylets, tmp_path: Path
) -> None:
    engine = tmp_path / "engine"
    make_small_engine(engine, files=40, file_bytes=4_000_000)
    process = start(cluster, engine, tmp_path / "{node}" / "engine")
    wait_until(lambda: cluster.processes(TASK))
    stopped = cluster.processes(TASK)[0]
    os.kill(stopped, signal.SIGSTOP)
    index = cluster.index_of(stopped)
    dead = cluster.node_ids[index]
    cluster.add_node()
    wait_until((tmp_path / cluster.node_ids[-1] / "engine").is_dir)
    cluster.kill_node(index)
    answer, err = process.communicate()
    assert process.returncode == 0, err
    assert f"node {cluster.node_ids[-1][:12]} (" in err
    assert ") joined and gets a copy too\n" in err
    assert f"node {dead[:12]} (" in err
    assert ") left the cluster before its copy was whole\n" in err
    report = json.loads(answer)
    left = {node["node"]: node["has_left"] for node in report["nodes"]}
    assert left == {dead: True} | dict.fromkeys(cluster.node_ids, False)
    for node in cluster.node_ids:
        assert whole(tmp_path / node / "engine") == whole(engine)


@pytest.mark.slow
def test_a_copy_whose_worker_was_killed_goes_on(cluster: Raylets, tmp_path: Path) -> None:
    engine = tmp_path / "engine"
    make_small_engine(engine, files=40, file_bytes=4_000_000)
    process = start(cluster, engine, tmp_path / "{node}" / "engine")
    wait_until(lambda: cluster.processes(TASK))
    os.kill(cluster.processes(TASK)[0], signal.SIGKILL)
    answer, err = process.communicate()
    assert process.returncode == 0, err
    assert err.count(" lost its worker (") == 1, err
    assert len(json.loads(answer)["nodes"]) == 3
    for node in cluster.node_ids:
        assert whole(tmp_path / node / "engine") == whole(engine)
