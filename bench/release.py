"""What opening the whole released DeepSeek-V3 costs: 163 shards, 91,991 names, no data.

    python bench/release.py [--rounds 3]

Writes the release as sparse shards (`support/release.py`) and runs three commands, each in its own
process: a bare Python that parses every header with the json module (the floor), `cluster plan` on
the directory, and a reader that opens it and counts the bytes of every layer. Prints Markdown; of
each figure the median of the rounds.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from support.release import TENSOR_BYTES, write_release

from deepseek.cli import make_app, run

ROOT = Path(__file__).resolve().parent.parent

FLOOR = """
import json, sys
from pathlib import Path
for path in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    with path.open("rb") as file:
        json.loads(file.read(int.from_bytes(file.read(8), "little")))
"""
WALK = """
import json, sys, time
began = time.perf_counter()
from deepseek.source.checkpoint import CheckpointReader
loaded = time.perf_counter()
reader = CheckpointReader(sys.argv[1])
opened = time.perf_counter()
layers = [reader.num_bytes(layer) for layer in range(reader.config.num_layers_with_mtp)]
total = sum(layers) + reader.num_bytes("globals")
print(json.dumps({"tensors": len(reader.stored_bytes), "bytes": total,
                  "open_s": opened - loaded, "walk_s": time.perf_counter() - opened}))
"""

app = make_app(__doc__ or "")


@app.command()
def main(rounds: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 3) -> None:
    """See the module's docstring."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "release"
        directory.mkdir()
        write_release(directory)
        on_disk = sum(path.stat().st_blocks * 512 for path in directory.iterdir())
        plan = ["-m", "cluster", "plan", "--recipe", "int4", "--hardware", "8xH800-80GB"]
        commands = {
            "every header, json module": ["-c", FLOOR, str(directory)],
            "`cluster plan`": [*plan, "--model", str(directory)],
            "reader, every layer": ["-c", WALK, str(directory)],
        }
        measured: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        walks: list[dict[str, float]] = []
        for _ in range(rounds):
            for name, arguments in commands.items():
                seconds, peak, output = watch(arguments)
                measured[name].append((seconds, peak))
                if name.startswith("reader"):
                    walks.append(json.loads(output))
        shutil.rmtree(directory)
    assert all(walk["bytes"] == TENSOR_BYTES for walk in walks)
    print(f"{walks[0]['tensors']:,} tensors, {TENSOR_BYTES:,} bytes of tensors, "
          f"{on_disk / 1e6:.0f} MB on disk. Within the reader's process: opening "
          f"{statistics.median(w['open_s'] for w in walks):.2f} s, walking "
          f"{statistics.median(w['walk_s'] for w in walks):.2f} s.\n")  # fmt: skip
    print("| | s | peak RSS, MB |\n|---|---:|---:|")
    for name, runs in measured.items():
        seconds, peak = (statistics.median(values) for values in zip(*runs, strict=True))
        print(f"| {name} | {seconds:.1f} | {peak:.0f} |")


def watch(arguments: list[str]) -> tuple[float, float, str]:
    """Wall seconds, peak memory in MB, and stdout of one run of this Python."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{arguments[:3]} failed")
    return time.perf_counter() - began, usage.ru_maxrss / 1e3, output


if __name__ == "__main__":
    run(app)
