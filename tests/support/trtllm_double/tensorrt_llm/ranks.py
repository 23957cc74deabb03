"""The child processes that stand for ranks. A step needs an answer from all of them, so a rank that
is killed or stopped hangs the engine, as it hangs the real one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tensorrt_llm.faults import Faults
from tensorrt_llm.journal import record

_PROGRAM = Path(__file__).parent / "rank.py"


class RankDied(RuntimeError):
    """A rank's process has ended."""


class Ranks:
    """`world` processes, started on construction and not yet ready."""

    def __init__(self, world: int, files: Sequence[Path], faults: Faults) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self.pids: list[int] = []
        for rank in range(world):
            task = {
                "rank": rank,
                "files": [str(path) for path in files[rank::world]],
                "load_s": faults.load_s,
                "orphan": faults.orphan_ranks,
                "die": faults.die_before_ready == rank,
            }
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(_PROGRAM), json.dumps(task)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                env={"OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_SIZE": str(world)},
            )
            self._processes.append(process)
            self.pids.append(process.pid)
            if faults.orphan_ranks:
                assert process.stdout is not None
                self.pids[-1] = int(_read_line(process.stdout.fileno()))
                process.wait()
        record("ranks", pids=self.pids)

    def wait_ready(self) -> None:
        """Wait until all are ready.

        Raises:
            RankDied: one has ended before that.
        """
        self._read_all(b"r")

    def step(self) -> None:
        """Have every rank take part in a step.

        Raises:
            RankDied: one has ended. One that is stopped is waited for.
        """
        for rank, process in enumerate(self._processes):
            assert process.stdin is not None
            try:
                process.stdin.write(b"s")
            except BrokenPipeError:
                raise self._died(rank) from None
        self._read_all(b"s")

    def dead(self) -> list[int]:
        """Ranks whose process has ended, or is a zombie."""
        return [rank for rank, pid in enumerate(self.pids) if not _is_alive(pid)]

    def stop(self) -> None:
        """Tell all to end, and wait for those that are children."""
        for process in self._processes:
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(b"q")
            process.stdin.close()
            process.wait()
            process.stdout.close()

    def kill(self) -> None:
        """End all at once, as an aborted MPI session does."""
        for pid in self.pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.stop()

    def _read_all(self, expected: bytes) -> None:
        for rank, process in enumerate(self._processes):
            assert process.stdout is not None
            if process.stdout.read(1) != expected:
                raise self._died(rank)

    def _died(self, rank: int) -> RankDied:
        return RankDied(f"rank {rank} (pid {self.pids[rank]}) has ended")


def _read_line(descriptor: int) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(descriptor, 1)
        if not piece:
            raise RankDied("a rank has ended before it told its pid")
        line += piece
    return line


def _is_alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"
