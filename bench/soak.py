"""Twenty minutes of everything at once: do memory, files and KV pages stay flat?

    python bench/soak.py [--minutes 20] [--plot FILE.png] [--json FILE]

Two ingress replicas and two of the echo engine under clients that read to the end, that leave in
the middle, that send nonsense, that use wrong keys, and that come in bursts beyond what is held.
Every ten seconds the resident memory and the open files of each kind of process are noted. At the
end nothing runs: KV tokens, running and waiting requests must be 0. Growth is that of the mean of
the last quarter over that of the second; the first warms up. Prints one Markdown row per kind of
process; exit code 1 when an answer was wrong or something is still held.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

from support.load import Outcome, complete
from support.processes import memory_mb, open_files, title, tree

from bench.fleet_faults import echo_question, is_idle, until
from bench.stacks.service import KEYS, Running, service
from serve_app.engine_sections import EchoOptions

ECHO = EchoOptions(ttft_s=0.02, itl_s=0.005, max_running=24)
#: Kind of process -> words of its title.
KINDS = {
    "ingress": "ServeReplica:intserve:ingress",
    "engine": "ServeReplica:intserve:engine-default",
    "owner of admission": "AdmissionActor",
    "Serve's controller": "ServeController",
    "HAProxy": "haproxy",
    "command": "serve_app",
}
SAMPLE_S = 10.0


def sample(running: Running) -> dict[str, tuple[float, int]]:
    """Kind -> megabytes and open files, over its processes."""
    totals: dict[str, tuple[float, int]] = {}
    for pid in tree(running.pid):
        name = title(pid)
        kind = next((kind for kind, words in KINDS.items() if words in name), None)
        if kind is not None:
            megabytes, files = totals.get(kind, (0.0, 0))
            totals[kind] = megabytes + memory_mb(pid), files + open_files(pid)
    return totals


class Soak:
    """The clients of a soak, and what they saw."""

    def __init__(self, url: str, minutes: float) -> None:
        self.url = url
        self.end = time.monotonic() + 60 * minutes
        self.seen: Counter[str] = Counter()
        self.wrong = 0
        self.samples: list[dict[str, tuple[float, int]]] = []

    @property
    def going(self) -> bool:
        return time.monotonic() < self.end

    def note(self, outcome: Outcome, expected: str | None) -> None:
        self.seen[f"{outcome.status} {(outcome.error or {}).get('code', '')}".strip()] += 1
        if outcome.status == 200:
            self.wrong += not outcome.complete or outcome.text != expected

    async def steady(self, index: int) -> None:
        draw = random.Random(index)
        while self.going:
            question = echo_question(draw)
            self.note(
                await complete(self.url, question.body, key=KEYS[index % 2]), question.expected
            )

    async def leaving(self, index: int) -> None:
        draw = random.Random(100 + index)
        while self.going:
            question = echo_question(draw)
            with suppress(TimeoutError):
                async with asyncio.timeout(draw.uniform(0.0, 0.8)):
                    await complete(self.url, question.body, key=KEYS[0], timeout_s=1e6)
            self.seen["left"] += 1

    async def nonsense(self) -> None:
        draw = random.Random(7)
        bodies = [{"prompt": ""}, {"prompt": "a", "n": 0}, {"unknown": 1}, {"prompt": [1, 999]}]
        while self.going:
            self.note(await complete(self.url, draw.choice(bodies), key=KEYS[0]), None)
            self.note(await complete(self.url, bodies[0], key="wrong"), None)
            await asyncio.sleep(0.5)

    async def bursts(self) -> None:
        draw = random.Random(9)
        while self.going:
            questions = [echo_question(draw) for _ in range(250)]
            answers = await asyncio.gather(
                *(complete(self.url, q.body, key=KEYS[1]) for q in questions)
            )
            for question, outcome in zip(questions, answers, strict=True):
                self.note(outcome, question.expected)
            await asyncio.sleep(20)

    async def sampling(self, running: Running) -> None:
        while self.going:
            self.samples.append(await asyncio.to_thread(sample, running))
            left = self.end - time.monotonic()
            print(f"{left / 60:5.1f} minutes left: {dict(self.seen)}", file=sys.stderr, flush=True)
            await asyncio.sleep(SAMPLE_S)

    async def run(self, running: Running) -> None:
        await asyncio.gather(
            *(self.steady(index) for index in range(8)),
            *(self.leaving(index) for index in range(4)),
            self.nonsense(),
            self.bursts(),
            self.sampling(running),
        )


def growth(values: list[float]) -> tuple[float, float]:
    """Mean of the second quarter, and of the last."""
    quarter = max(1, len(values) // 4)
    return statistics.mean(values[quarter : 2 * quarter]), statistics.mean(values[-quarter:])


def plot(samples: list[dict[str, tuple[float, int]]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.5))
    minutes = [index * SAMPLE_S / 60 for index in range(len(samples))]
    for kind in KINDS:
        for axis, place in zip(axes, (0, 1), strict=True):
            axis.plot(minutes, [s.get(kind, (0.0, 0))[place] for s in samples], label=kind)
    axes[0].set(xlabel="minutes", ylabel="resident memory, MB", ylim=(0, None))
    axes[1].set(xlabel="minutes", ylabel="open files", ylim=(0, None))
    axes[1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--plot", type=Path, help="draw memory and files over time")
    parser.add_argument("--json", type=Path, help="also write the samples here")
    given = parser.parse_args()
    settings: dict[str, Any] = {"echo": ECHO, "replicas": 2, "max_queued_requests": 100}
    with (
        tempfile.TemporaryDirectory() as folder,
        service(Path(folder), **settings) as running,
    ):
        soak = Soak(running.url, given.minutes)
        asyncio.run(soak.run(running))

        idle_s = asyncio.run(until(lambda: is_idle(running.url), 30.0))
    by_kind: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for taken in soak.samples:
        for kind, values in taken.items():
            by_kind[kind].append(values)
    print("| process | MB, second quarter and last | open files, second quarter and last |")
    print("|---|---:|---:|")
    for kind, values in by_kind.items():
        memory, files = (growth([float(v[place]) for v in values]) for place in (0, 1))
        print(f"| {kind} | {memory[0]:.0f}, {memory[1]:.0f} | {files[0]:.0f}, {files[1]:.0f} |")
    seen = ", ".join(f"{count} x {what}" for what, count in sorted(soak.seen.items()))
    print(f"\n{seen}; {soak.wrong} wrong; KV tokens, running and waiting 0 after {idle_s:.1f} s")
    if given.plot:
        plot(soak.samples, given.plot)
    if given.json:
        given.json.write_text(json.dumps({"samples": soak.samples, "seen": soak.seen}) + "\n")
    if soak.wrong or idle_s >= 30.0:
        raise SystemExit("bench: wrong answers, or something is still held")


if __name__ == "__main__":
    main()
