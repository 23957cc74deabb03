"""Quantize jobs as driver processes, to kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml
from support.quantizing import SmallModel, small_recipe
from support.raylets import title

#: Ray's own idle helpers, which outlive a raylet that was killed.
RAY_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")


def kill_driver_when(
    appears: Path, small: SmallModel, recipe: str, output: Path, tmp_path: Path, root: Path
) -> None:
    """Start `python -m quant_jobs quantize` with a Ray of its own, SIGKILL the driver as soon as
    a file appears, and see that every process it had started ends."""
    log = tmp_path / "driver.log"
    with log.open("wb") as stream:
        driver = subprocess.Popen(
            driver_command(small, recipe, output, tmp_path),
            cwd=root,
            env=without_ray_address(),
            stdout=stream,
            stderr=stream,
        )
    try:
        deadline = time.monotonic() + 180
        while not appears.exists():
            assert driver.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.005)
        family = descendants(driver.pid)
    finally:
        driver.kill()
        driver.wait()
    assert any(name.startswith("ray::QuantizeWorker") for _, name in family.values())
    agents = {pid: process for pid, process in family.items() if process[1].startswith(RAY_AGENTS)}
    deadline = time.monotonic() + 60
    try:
        while left := [
            process for pid, process in family.items() if pid not in agents and alive(pid, process)
        ]:
            assert time.monotonic() < deadline, left
            time.sleep(0.05)
    finally:  # those take a minute or two to notice
        for pid, process in agents.items():
            if alive(pid, process):
                os.kill(pid, signal.SIGKILL)
    assert not (output / "intserve.json").exists()


def driver_command(
    small: SmallModel, recipe: str, output: Path, tmp_path: Path, workers: int = 1
) -> list[str]:
    file = tmp_path / f"{recipe}.yaml"
    file.write_text(yaml.safe_dump(small_recipe(recipe).model_dump(mode="json")))
    return [
        *(sys.executable, "-m", "quant_jobs", "quantize", "--model", str(small.directory)),
        *("--recipe", str(file), "--calibration", str(small.text)),
        *("--output", str(output), "--workers", str(workers)),
    ]


def without_ray_address() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_ADDRESS")}


def descendants(pid: int) -> dict[int, tuple[str, str]]:
    """Process id -> (start time, which tells a reused id; title) of all below a process."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # ended meanwhile
        parents[int(path.parent.name)] = (int(fields[1]), fields[19])
    below: dict[int, tuple[str, str]] = {}
    generation = [pid]
    while generation:
        generation = [child for child, (parent, _) in parents.items() if parent in generation]
        below |= {child: (parents[child][1], title(child)) for child in generation}
    return below


def alive(pid: int, process: tuple[str, str]) -> bool:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return fields[19] == process[0] and fields[0] != "Z"
