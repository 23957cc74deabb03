"""Engines of many files built on raylets, some of which die: the bytes of an undisturbed build."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from pathlib import Path

import pytest
from support.building import ROOT, TASK, BuildProcess
from support.file_makers import KEYS, NUM_FILES, SmallMaker, build
from support.quantizing import contents
from support.raylets import Raylets

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, bytes]:
    """The files of an undisturbed build in this process."""
    (tmp_path / "undisturbed").mkdir()
    build(tmp_path / "plain", SmallMaker(tmp_path / "undisturbed"))
    return contents(tmp_path / "plain")


class Build(BuildProcess):
    """A build of the small files."""

    def __init__(self, cluster: Raylets, folder: Path, workers: int, *options: object) -> None:
        self.log = folder / "log"
        self.log.mkdir(exist_ok=True)
        program, output = ROOT / "tests" / "support" / "file_makers.py", folder / "out"
        super().__init__(cluster, output, program, output, workers, self.log, *options)

    def made(self, key: str) -> int:
        """How often a file was made."""
        path = self.log / key
        return path.read_text().count("made") if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_gives_the_same_bytes(
    cluster: Raylets, tmp_path: Path, expected: dict[str, bytes], workers: int
) -> None:
    running = Build(cluster, tmp_path, workers)
    code, _, err = running.end()
    assert code == 0, err
    assert contents(running.output) == expected
    assert f"{workers} at a time on 3 CPUs of 3 nodes\n" in err
    assert [running.made(key) for key in KEYS] == [1] * NUM_FILES


def test_a_driver_killed_at_three_points_goes_on_with_what_was_recorded(
    cluster: Raylets, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    for parts in (1, 5, 9):
        running = Build(cluster, tmp_path, 2, "--seconds", 0.2)
        running.wait_for(lambda running=running, parts=parts: running.num_parts >= parts)
        running.kill()
        # The kill may take a moment to reach the tasks, and makes nothing of them count.
        assert parts <= running.num_parts < NUM_FILES
    code, _, err = Build(cluster, tmp_path, 3).end()
    assert code == 0, err
    assert contents(running.output) == expected
    # Each kill costs at most the two files in hand.
    assert NUM_FILES <= sum(running.made(key) for key in KEYS) <= NUM_FILES + 6


@pytest.mark.slow
def test_a_driver_that_is_asked_to_end_says_so_and_leaves_nothing_half_written(
    cluster: Raylets, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    running = Build(cluster, tmp_path, 2, "--seconds", 0.5)
    running.wait_for(lambda: running.num_parts >= 2)
    running.process.terminate()
    code, _, err = running.end()
    assert code == 143
    assert err.splitlines()[-1].startswith("stopped by SIGTERM; nothing is half-written, run the")
    code, _, err = Build(cluster, tmp_path, 2).end()
    assert code == 0, err
    assert contents(running.output) == expected


@pytest.mark.slow
def test_a_killed_worker_is_reported_and_its_file_made_again(
    cluster: Raylets, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    running = Build(cluster, tmp_path, 2, "--seconds", 0.5)
    running.wait_for(lambda: running.num_parts >= 2 and bool(cluster.processes(TASK)))
    os.kill(random.Random(1).choice(cluster.processes(TASK)), signal.SIGKILL)
    code, _, err = running.end()
    assert code == 0, err
    assert err.count("lost the worker or node that had file ") == 1, err
    assert "1 tasks were lost with their workers or nodes, and run again\n" in err
    assert contents(running.output) == expected


@pytest.mark.slow  # `test_trtllm_raylets.py` kills one in the default run
def test_a_killed_raylet_costs_no_byte(
    cluster: Raylets, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    # Longer than a worker takes to notice that its raylet is gone.
    running = Build(cluster, tmp_path, 3, "--seconds", 2.5)
    running.wait_for(lambda: running.num_parts >= 3)
    cluster.kill_node(0)
    code, _, err = running.end()
    assert code == 0, err
    assert "lost the worker or node that had file " in err
    assert contents(running.output) == expected


@pytest.mark.parametrize("has_begun", [True, False], ids=["begun", "not begun"])
def test_a_worker_that_freezes_while_its_node_dies_is_given_up(
    cluster: Raylets, tmp_path: Path, expected: dict[str, bytes], has_begun: bool
) -> None:
    """As on a machine that is suspended: the connection to it stays, and no answer comes. Of a task
    that had not begun nobody knows on which node it is."""
    running = Build(cluster, tmp_path, 3, "--seconds", 0.5)
    running.wait_for(lambda: running.num_parts >= 1 and bool(cluster.processes(TASK)))
    frozen = cluster.processes(TASK)[0]
    os.kill(frozen, signal.SIGSTOP)
    try:
        if not has_begun:
            for path in (running.output / ".build").glob("node-*"):
                path.unlink(missing_ok=True)
        cluster.kill_node(cluster.index_of(frozen))
        code, _, err = running.end()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(frozen, signal.SIGKILL)  # being stopped, it may outlive its raylet
    assert code == 0, err
    assert "lost the worker or node that had file " in err
    assert contents(running.output) == expected


@pytest.mark.slow
def test_an_error_of_the_maker_is_one_sentence_and_what_was_built_stays(
    cluster: Raylets, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    running = Build(cluster, tmp_path, 2, "--damaged", "00006")
    code, _, err = running.end()
    assert (code, err.splitlines()[-1]) == (2, "error: layer 00006 is damaged; quantize it again")
    assert running.num_parts >= 6
    running = Build(cluster, tmp_path, 2)
    code, _, err = running.end()
    assert code == 0, err
    assert contents(running.output) == expected
    assert [running.made(key) for key in KEYS] == [1] * NUM_FILES


def test_a_file_that_always_ends_its_worker_ends_the_build_in_one_sentence(
    cluster: Raylets, tmp_path: Path
) -> None:
    running = Build(cluster, tmp_path, 2, "--deadly", "00003")
    code, _, err = running.end()
    assert code == 2
    assert err.count("lost the worker or node that had file 00003 ") == 3
    last = err.splitlines()[-1]
    assert last.startswith("error: the task that builds file 00003 was lost 4 times with its worke")
    assert "Traceback" not in err
