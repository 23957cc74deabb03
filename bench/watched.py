"""Runs `quantize` on a synthetic model in a memory cgroup and samples its memory; no script itself.

memory_limit.py and workers.py call `quantize`; worker_memory.py and job_model.py use its helpers.
Four times a second it samples the memory that the kernel cannot drop: anonymous memory and shared
memory (Ray's object store). A cgroup counts page cache too, but the kernel reclaims it on demand,
so a job that reads large files always seems to fill its limit.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from deepseek.recipe import load_recipe
from deepseek.source.checkpoint import CheckpointReader
from deepseek.source.synthetic import Size, synthesize, synthetic_config

ROOT = Path(__file__).resolve().parent.parent
TEXT = ROOT / "examples" / "tiny-deepseek-v3" / "calibration.txt"
INTERVAL_S = 0.25


@dataclass(slots=True)
class Run:
    """One finished run; sizes in bytes.

    `peak` is the largest sum of anonymous and shared memory of all processes, `at_peak` that sum by
    kind of process, `cached` the peak with page cache. `peak` and `cached` are None where no cgroup
    could be made. `private` is the peak of anonymous memory by kind of process.
    """

    wall_s: float
    digest: str
    report: dict[str, Any]
    limited_by: str
    peak: int | None
    at_peak: dict[str, int]
    cached: int | None
    private: dict[str, int]
    oom_kills: int | None


def make_model(directory: Path, size: Size) -> CheckpointReader:
    """Open the synthetic model of this size; make it if the directory does not hold it."""
    config = synthetic_config(size)
    if not (directory / "config.json").exists():
        print(f"making {directory}", file=sys.stderr, flush=True)
        synthesize(directory, config)
    model = CheckpointReader(directory)
    if model.config != config:
        raise SystemExit(f"bench: {directory} holds another model; delete it, or give --output")
    return model


def write_recipe(path: Path, name: str, num_blocks: int, block_tokens: int) -> Path:
    """Write a built-in recipe with this much calibration text; return `path`."""
    content = load_recipe(name).model_dump(mode="json")
    content["calibration"] = {"num_blocks": num_blocks, "block_tokens": block_tokens}
    path.write_text(yaml.safe_dump(content))
    return path


def quantize(
    model: Path, recipe: Path, output: Path, workers: int, limit: int | None = None
) -> Run:
    """Run the command, Ray included, with a limit in bytes on all of its processes together."""
    words = [
        *(sys.executable, "-m", "quant_jobs", "quantize", "--model", model, "--recipe", recipe),
        *("--calibration", TEXT, "--output", output, "--workers", workers, "--json"),
    ]
    with memory_cgroup(limit) as group:
        started = time.monotonic()
        job = subprocess.Popen(
            list(map(str, words)),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=group.enter,  # before any thread of ours runs
        )
        watch = Watch(job.pid, group)
        with repeatedly(watch.sample, INTERVAL_S):
            out, _ = job.communicate()
        wall_s = time.monotonic() - started
        oom_kills = group.oom_kills()
        if job.returncode:
            raise SystemExit(
                f"bench: quantize ended with {job.returncode}; {oom_kills} processes were killed "
                f"for memory; peak {watch.describe()}"
            )
        return Run(
            wall_s=wall_s,
            digest=json.loads(out)["artifact_digest"],
            report=json.loads((output / "job_report.json").read_text()),
            limited_by=group.name,
            peak=watch.peak,
            at_peak=watch.at_peak,
            cached=group.max_usage(),
            private=watch.private,
            oom_kills=oom_kills,
        )


# --- cgroups ---


class Group:
    """No cgroup: the limit, if any, is on the address space of each process."""

    name = "RLIMIT_AS of each process"

    def __init__(self, limit: int | None) -> None:
        self._limit = limit

    def enter(self) -> None:
        if self._limit is not None:
            resource.setrlimit(resource.RLIMIT_AS, (self._limit, self._limit))

    def memory(self) -> dict[str, int] | None:
        """Anonymous and shared memory now, in bytes."""
        return None

    def max_usage(self) -> int | None:
        return None

    def oom_kills(self) -> int | None:
        return None

    def remove(self) -> None:
        pass


class CgroupV1(Group):
    name = "cgroup v1"
    _mount = Path("/sys/fs/cgroup/memory")
    _limit_files = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes")
    _usage_file, _kills_file = "memory.max_usage_in_bytes", "memory.oom_control"
    _keys = ("total_rss", "total_shmem")

    def __init__(self, limit: int | None) -> None:
        self._folder = self._mount / f"intserve-bench-{os.getpid()}-{secrets.token_hex(2)}"
        self._folder.mkdir()
        try:
            if limit is not None:
                # In this order: memory and swap together are never less than memory.
                for name in self._limit_files:
                    if (self._folder / name).exists():
                        (self._folder / name).write_text(str(limit))
            self.memory()
        except OSError:
            self._folder.rmdir()
            raise

    def enter(self) -> None:
        (self._folder / "cgroup.procs").write_text(str(os.getpid()))

    def memory(self) -> dict[str, int]:
        stat = _pairs(self._folder / "memory.stat")
        anonymous, shared = (stat[key] for key in self._keys)
        return {"anonymous": anonymous, "shared": shared}

    def max_usage(self) -> int:
        return int((self._folder / self._usage_file).read_text())

    def oom_kills(self) -> int:
        return _pairs(self._folder / self._kills_file)["oom_kill"]

    def remove(self) -> None:
        """Remove the cgroup once its last process has ended: some of Ray's outlive the driver."""
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                self._folder.rmdir()
                return
            time.sleep(0.5)


class CgroupV2(CgroupV1):
    name = "cgroup v2"
    _mount = Path("/sys/fs/cgroup")
    _limit_files = ("memory.max", "memory.swap.max")
    _usage_file, _kills_file = "memory.peak", "memory.events"
    _keys = ("anon", "shmem")


@contextlib.contextmanager
def memory_cgroup(limit: int | None) -> Iterator[Group]:
    """A cgroup with this limit, swap included, of the first kind that works on this machine. It is
    removed at the end."""
    group = Group(limit)
    for kind in (CgroupV1, CgroupV2):
        with contextlib.suppress(OSError, KeyError):
            group = kind(limit)
            break
    try:
        yield group
    finally:
        group.remove()


def _pairs(path: Path) -> dict[str, int]:
    return {key: int(value) for key, value in map(str.split, path.read_text().splitlines())}


# --- watching ---


@contextlib.contextmanager
def repeatedly(call: Callable[[], None], interval_s: float) -> Iterator[None]:
    """Call `call` in a thread, every `interval_s` seconds, while the `with` block runs."""
    stop = threading.Event()

    def run() -> None:
        while not stop.wait(interval_s):
            call()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@dataclass(slots=True)
class Watch:
    """Samples the memory of a job's processes and holds the peaks."""

    driver: int
    group: Group
    peak: int | None = None
    at_peak: dict[str, int] = field(default_factory=dict)
    private: dict[str, int] = field(default_factory=dict)

    def describe(self) -> str:
        return ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in self.at_peak.items())

    def sample(self) -> None:
        now = anonymous_by_kind(self.driver)
        for kind, size in now.items():
            self.private[kind] = max(size, self.private.get(kind, 0))
        if (used := self.group.memory()) is None:
            return
        total = used["anonymous"] + used["shared"]
        if total > (self.peak or 0):
            self.peak = total
            self.at_peak = {**now, "object store": used["shared"]}


def anonymous_by_kind(driver: int) -> dict[str, int]:
    """Anonymous memory, in bytes, of a driver and its descendants, by kind of process: `driver`,
    `worker 0` and so on (in the order of their process ids), `Ray`."""
    sizes = {"driver": 0, "Ray": 0}
    workers: dict[int, int] = {}
    for pid in (driver, *_descendants(driver)):
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes()
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue  # ended meanwhile
        lines = status.splitlines()
        rss_anon = next((line for line in lines if line.startswith("RssAnon")), "RssAnon 0")
        size = int(rss_anon.split()[1]) * 1024
        if pid == driver:
            sizes["driver"] = size
        elif title.startswith(b"ray::QuantizeWorker"):
            workers[pid] = size
        else:
            sizes["Ray"] += size
    return {f"worker {n}": workers[pid] for n, pid in enumerate(sorted(workers))} | sizes


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(path.parent.name))
    descendants, generation = [], [pid]
    while generation:
        generation = [child for parent in generation for child in children.get(parent, [])]
        descendants += generation
    return descendants
