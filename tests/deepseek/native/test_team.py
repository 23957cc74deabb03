"""A team of threads: phases whose work is uneven, threads that come late, and bodies that throw."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

native = pytest.importorskip("deepseek._native", reason="the extension was not built")

PHASES, COUNT = 40, 150
SUM = PHASES * COUNT * (PHASES * COUNT - 1) // 2


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_every_index_of_every_phase_runs_once_and_before_the_next_phase(threads: int) -> None:
    for _ in range(20):
        assert native._sum_in_phases(threads, PHASES, COUNT) == SUM


@pytest.mark.parametrize("threads", [2, 5])
def test_nobody_waits_for_a_thread_that_comes_late(threads: int) -> None:
    for late in range(threads):
        assert native._sum_in_phases(threads, PHASES, COUNT, late=late) == SUM


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("phase", [0, 13, PHASES - 1])
def test_what_a_body_throws_reaches_python_and_the_next_call_works(
    threads: int, phase: int
) -> None:
    for index in (0, COUNT // 2, COUNT - 1):
        with pytest.raises(RuntimeError, match="an index fails, as it was asked to"):
            native._sum_in_phases(threads, PHASES, COUNT, failing_phase=phase, failing=index)
    assert native._sum_in_phases(threads, PHASES, COUNT) == SUM


def test_phases_without_work_end() -> None:
    assert native._sum_in_phases(3, PHASES, 0) == 0


def test_a_team_has_a_thread() -> None:
    with pytest.raises(ValueError, match="at least one thread"):
        native._sum_in_phases(0, 1, 1)


def test_calls_from_several_python_threads_have_teams_of_their_own() -> None:
    sums: list[int] = []

    def call() -> None:
        sums.extend(native._sum_in_phases(2, PHASES, COUNT) for _ in range(10))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=60)
    assert sums == [SUM] * 40


def test_torch_and_the_extension_share_one_openmp_runtime() -> None:
    program = (
        "import torch; from deepseek import _native\n"
        "torch.ones(1 << 20).sum(); _native._sum_in_phases(2, 4, 9)\n"
        "print(*{line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line})"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    runtimes = [path for path in ended.stdout.split() if "omp" in Path(path).name]
    assert len(runtimes) == 1, runtimes


def run_with_isa(name: str) -> subprocess.CompletedProcess[str]:
    program = "import torch; from deepseek import _native; print(_native.isa())"
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "INTSERVE_ISA": name},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_environment_chooses_among_what_the_cpu_has() -> None:
    for name in native.available_isas():
        assert run_with_isa(name).stdout.strip() == name
    assert run_with_isa("").stdout.strip() == native.available_isas()[-1]


def test_an_instruction_set_that_is_not_there_is_named_with_those_that_are() -> None:
    ended = run_with_isa("avx1024")
    assert ended.returncode == 1
    assert "INTSERVE_ISA is 'avx1024'; this CPU has portable" in ended.stderr
    with pytest.raises(ValueError, match="the name is 'sse9'; this CPU has portable"):
        native.use_isa("sse9")
