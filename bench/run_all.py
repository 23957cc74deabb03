"""`make bench`: every benchmark, one after the other, on an otherwise idle machine.

Prints each command and its result as Markdown, for docs/benchmarks.md. Nothing runs in parallel,
and no figures of different runs are compared: each script measures its peers beside us.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

COMMANDS = (
    "bench/recipes.py",
    "bench/decode.py --reference examples/tiny-deepseek-v3"
    " --engine runs/bench/int8/engine --engine runs/bench/int4/engine",
    "bench/kernel_accuracy.py",
    "bench/busy_neighbor.py --engine runs/bench/int8/engine",
    "bench/peers_decode.py",
    "bench/step_profile.py",
    "bench/served_decode.py",
    "bench/linear_formats.py --threads 1",
    "bench/prefix_reuse.py",
    "bench/serve_overhead.py",
    "bench/first_answer.py",
    "bench/engine_process.py",
    "bench/drain.py",
    "bench/pools.py",
    "bench/autoscaling.py",
    "bench/fleet_simulation.py",
    "bench/long_prompts.py",
    "bench/accuracy.py",
    "bench/kv_formats.py",
    "bench/kv_fill.py",
    "bench/target_arithmetic.py",
    "bench/workers.py",
    "bench/sharded_build.py",
    "bench/worker_memory.py",
    "bench/memory_limit.py --limit-gb 1.6 --hidden 2048 --intermediate 4096 --moe-intermediate 512"
    " --heads 16 --experts 32",
    "bench/calibration_file.py",
    "bench/release.py",
    "bench/kill_rounds.py --rounds 20",
    "bench/trtllm_path.py",
    "bench/engine_faults.py",
    "bench/trtllm_ranks.py",
    "bench/pieces.py",
)


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()  # no options: --help alone
    print(f"Machine: {cpu_name()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    failed = []
    for command in COMMANDS:
        print(f"\n## `python {command}`\n", flush=True)
        done = subprocess.run(
            [sys.executable, *shlex.split(command)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            check=False,
        )
        if done.returncode:
            failed.append(command)
    if failed:
        raise SystemExit(f"bench: failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
