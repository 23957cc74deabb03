"""What a neighbor that computes on one of the engine's cores costs a decode step.

    python bench/busy_neighbor.py --engine DIR [--batch 1 16] [--steps 120] [--rounds 5]
                                  [--threads 2] [--nice 0]

The engine computes on as many cores as it has threads; the neighbor is a process that does nothing
but count, pinned to one of these cores (`--nice` is its niceness: 0 is an equal, 15 is what Ray
gives its workers). Native and PyTorch's kernels, each with the neighbor and without, take turns
within a round, in processes of their own, so that a slow phase of the machine affects all of them.
Only decode steps are timed.

Prints a Markdown row for each: median, 99th percentile and longest of the steps of all rounds, and
how many times the median without the neighbor they are. Half of a core gone is 4/3 of the time
where nobody waits for a thread without a core, and twice where the slower thread has its half of
the work to do; a barrier that spins waits a whole time slice of the scheduler, some milliseconds,
at each of a step's phases.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

from deepseek.engine.options import KernelChoice

#: Counts until it is killed, or its parent ends; says when it has begun.
BURN = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
os.nice(int(sys.argv[2]))
parent = os.getppid()
print("burning", flush=True)
while os.getppid() == parent:
    for _ in range(1 << 20):
        pass
"""
KERNELS: tuple[KernelChoice, ...] = ("native", "torch")
PROMPT_TOKENS = 64


@contextmanager
def neighbor(core: int, niceness: int) -> Iterator[None]:
    """A process that keeps the core busy."""
    command = [sys.executable, "-c", BURN, str(core), str(niceness)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"burning\n"
            yield
        finally:
            process.kill()


def step_times(
    directory: Path, kernels: KernelChoice, cores: list[int], batch: int, steps: int
) -> list[float]:
    """Seconds of each decode step of `batch` requests; one thread to a core."""
    os.sched_setaffinity(0, cores)
    from deepseek.engine.engine import EngineOptions, LLMEngine
    from deepseek.engine.request import Request, SamplingParams

    options = EngineOptions(
        kernels=kernels, num_threads=len(cores), max_batch_size=batch, prefix_cache=False
    )
    engine = LLMEngine.load(directory, options)
    warm_up = 5
    sampling = SamplingParams(max_tokens=steps + warm_up + 1, temperature=0.0, ignore_eos=True)
    for number in range(batch):
        prompt = tuple((7 * number + 3 * i) % 1000 + 5 for i in range(PROMPT_TOKENS))
        engine.add_request(Request(request_id=str(number), prompt_ids=prompt, sampling=sampling))
    waiting = {str(number) for number in range(batch)}
    while waiting:  # prefill
        waiting -= {output.request_id for output in engine.step() if output.token_ids}
    for _ in range(warm_up):
        engine.step()
    times = []
    while len(times) < steps and len(engine._tracked) == batch:
        started = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - started)
    return times[:-1]  # the last one ends requests


def measure(
    directory: Path, kernels: KernelChoice, cores: list[int], batch: int, steps: int
) -> list[float]:
    """`step_times` in a process of its own, with an OpenMP of its own."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(step_times, (directory, kernels, cores, batch, steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--engine", type=Path, required=True, help="engine directory")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--nice", type=int, default=0, help="niceness of the neighbor")
    given = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))[: given.threads]
    if len(cores) < given.threads:
        raise SystemExit(f"bench: --threads {given.threads}: there are {len(cores)} cores")
    print("| batch | kernels | neighbor | median ms | p99 ms | longest ms | median | longest |")
    print("|---:|---|---|---:|---:|---:|---:|---:|")
    for batch in given.batch:
        times: dict[tuple[KernelChoice, bool], list[float]] = {}
        for _ in range(given.rounds):
            for kernels in KERNELS:
                arguments = given.engine, kernels, cores, batch, given.steps
                times.setdefault((kernels, False), []).extend(measure(*arguments))
                with neighbor(cores[-1], given.nice):
                    times.setdefault((kernels, True), []).extend(measure(*arguments))
        for (kernels, is_busy), taken in times.items():
            alone = statistics.median(times[kernels, False])
            middle, longest = statistics.median(taken), max(taken)
            p99 = statistics.quantiles(taken, n=100, method="inclusive")[98]
            print(
                f"| {batch} | {kernels} | {'yes' if is_busy else 'no'} | {1e3 * middle:.2f} "
                f"| {1e3 * p99:.2f} | {1e3 * longest:.1f} | {middle / alone:.2f}x "
                f"| {longest / alone:.1f}x |",
                flush=True,
            )


if __name__ == "__main__":
    main()
