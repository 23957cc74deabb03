"""What a quantize job costs from a small calibration file and from one of 80 MB.

    python bench/calibration_file.py [--megabytes 80] [--rounds 3]

Quantizes the example model without Ray, recipe int8, from its own text and from the same text many
times over, lines in another order each time, as plain text and as JSON lines. The files take turns.
Then the finished job is run again. Prints Markdown; of each figure the median of the rounds.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from deepseek.cli import make_app, run

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "tiny-deepseek-v3"

app = make_app(__doc__ or "")


@app.command()
def main(
    megabytes: Annotated[int, typer.Option(min=1, help="Size of the long files.")] = 80,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 3,
    output: Annotated[Path, typer.Option(help="Where files and artifacts go.")] = ROOT
    / "runs"
    / "bench-calibration",
) -> None:
    """See the module's docstring."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    text = MODEL / "calibration.txt"
    files = {"its own text": text, **write_long(text, output, megabytes * 1_000_000)}
    first: dict[str, list[tuple[float, float]]] = {name: [] for name in files}
    again: dict[str, list[tuple[float, float]]] = {name: [] for name in files}
    for _ in range(rounds):
        for name, path in files.items():
            artifact = output / "artifact"
            shutil.rmtree(artifact, ignore_errors=True)
            first[name].append(quantize(path, artifact))
            again[name].append(quantize(path, artifact))
    print("| calibration file | MB | job s | peak RSS, MB | finished job again, s | peak RSS, MB |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, path in files.items():
        cells = [f"{median:.{digits}f}" for measured in (first[name], again[name])
                 for median, digits in zip(map(statistics.median, zip(*measured, strict=True)),
                                           (1, 0), strict=True)]  # fmt: skip
        print(f"| {name} | {path.stat().st_size / 1e6:.1f} | {' | '.join(cells)} |")


def write_long(text: Path, output: Path, num_bytes: int) -> dict[str, Path]:
    """The lines of a text in ever other orders, as plain text and as records of 40 lines."""
    lines = text.read_text(encoding="utf-8").splitlines(keepends=True)
    plain, records = output / "long.txt", output / "long.jsonl"
    order = random.Random(0)
    with plain.open("w", encoding="utf-8") as first, records.open("w", encoding="utf-8") as second:
        while first.tell() < num_bytes:
            order.shuffle(lines)
            first.writelines(lines)
            for begin in range(0, len(lines), 40):
                second.write(json.dumps({"text": "".join(lines[begin : begin + 40])}) + "\n")
    return {"plain text": plain, "JSON lines": records}


def quantize(calibration: Path, artifact: Path) -> tuple[float, float]:
    """Seconds and peak resident memory in MB of one command, by the kernel's account of it."""
    words = ["quantize", "--workers", "0", "--model", MODEL, "--recipe", "int8"]
    words += ["--calibration", calibration, "--output", artifact]
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "quant_jobs", *map(str, words)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"quantize failed on {calibration}")
    return time.monotonic() - began, usage.ru_maxrss / 1000


if __name__ == "__main__":
    run(app)
