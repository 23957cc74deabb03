"""A sharded build as a process of its own on a cluster, to be watched and killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from support.raylets import Raylets

ROOT = Path(__file__).resolve().parents[2]
#: Title of a process that is building a file.
TASK = "ray::_run_task"


class BuildProcess:
    """`python WORDS`, which builds in `output`; on this machine alone where `cluster` is None."""

    def __init__(self, cluster: Raylets | None, output: Path, *words: object) -> None:
        self.output = output
        address = {} if cluster is None else {"RAY_ADDRESS": cluster.address}
        self.process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=ROOT,
            env={**os.environ, **address},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @property
    def num_parts(self) -> int:
        """Files that are recorded as built."""
        return len(list(self.output.glob(".build/part-*.json")))

    def wait_for(self, reached: Callable[[], bool]) -> None:
        """Until something holds of the build, which is at work."""
        deadline = time.monotonic() + 120
        while not reached():
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def end(self) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        out, err = self.process.communicate(timeout=240)
        return self.process.returncode, out, err

    def kill(self) -> None:
        """SIGKILL the driver."""
        self.process.kill()
        self.process.communicate()
