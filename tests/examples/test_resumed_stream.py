"""The example of docs/reliability.md runs as written there, and prints what is quoted there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def printed(root: Path) -> str:
    command = [sys.executable, "examples/resumed_stream.py"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    return done.stdout


def test_the_client_reads_one_whole_stream_across_the_kill(printed: str) -> None:
    before, kill, after = printed.partition("--- SIGKILL to replica ")
    assert kill
    ids = re.findall(r'"id":"(cmpl-[0-9a-f]{32})"', printed)
    assert len(set(ids)) == 1
    assert min(before.count("data: "), after.count("data: ")) >= 3
    assert "The answer is whole: 'The tokens of this answer come from two processes.'" in after


def test_the_trace_has_the_lost_replica_and_the_one_that_went_on(printed: str) -> None:
    tree = printed.partition("The trace of the request:")[2]
    killed = re.findall(r"SIGKILL to replica (\w+)", printed)
    lost = re.findall(r"^  engine\.lost .* replica=(\w+) output_tokens=(\d+)$", tree, re.MULTILINE)
    resumed = re.findall(
        r"^  \* resumed .* replica=(\w+) attempt=2 output_tokens=(\d+)$", tree, re.MULTILINE
    )
    generated = re.findall(r"^  engine\.generate .* replica=(\w+) output_tokens=50$", tree, re.M)
    assert [name for name, _ in lost] == killed
    assert generated == [name for name, _ in resumed] != killed
    assert lost[0][1] == resumed[0][1]
    assert 5 <= int(lost[0][1]) < 50
