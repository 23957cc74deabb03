"""What an engine sets of its process: how many threads compute, and that freed memory stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepseek.engine import process

#: Steps in a thread, as a replica runs them: the page faults of the last ten, in all.
STEPS = """
import resource, threading, torch
from deepseek.engine.process import keep_freed_memory
print(keep_freed_memory())

def step():
    pieces = [torch.empty(size << 10, dtype=torch.uint8) for size in (50, 700, 9000, 40000, 30000)]
    for piece in pieces:
        piece[::4096] = 1

def steps():
    for number in range(30):
        if number == 20:
            before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        step()
    print(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)

thread = threading.Thread(target=steps)
thread.start()
thread.join()
"""
#: Pages of one step's temporaries.
STEP_PAGES = 79750 // 4


def run_steps(**variables: str) -> tuple[bool, int]:
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", STEPS],
        env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"} | variables,
        capture_output=True,
        text=True,
        check=True,
    )
    kept, faults = done.stdout.split()
    return kept == "True", int(faults)


@pytest.mark.heavy
def test_a_step_finds_the_memory_of_the_step_before() -> None:
    kept, faults = run_steps()
    assert kept
    assert faults < STEP_PAGES


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "131072"),
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072"),
    ],
)
def test_what_the_user_says_to_malloc_holds(name: str, value: str) -> None:
    kept, faults = run_steps(**{name: value})
    assert not kept
    assert faults > STEP_PAGES


def test_a_share_below_one_cpu_is_no_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "num_cores", lambda: 4)
    shares = {0.0: 3, 0.5: 3, 1.0: 1, 1.9: 1, 3.0: 3, 64.0: 4}
    assert {cpus: process.share_of_cores(cpus) for cpus in shares} == shares
    monkeypatch.setattr(process, "num_cores", lambda: 1)
    assert process.share_of_cores(0.5) == 1


def test_a_number_that_is_asked_for_is_taken_and_none_leaves_a_core(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process, "num_cores", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    assert process.choose_threads(7) == 7
    assert process.choose_threads(None) == 3
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert process.choose_threads(None) == 2
