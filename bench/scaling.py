"""Replicas that appear and vanish by themselves: a step of load, and a pool that goes to zero.

    python bench/scaling.py [--plot FILE.png] [--json FILE]

The echo engine with eight places a replica, streams of a second, and an autoscaling section whose
windows are short, so that minutes show what hours would. First a step: one client, then 28 for a
minute, then one again until a single replica is left. Then a pool of at least zero: it goes idle,
loses its last replica, and a request comes; once it is held until a replica is there, once it is
refused.
Every answer is known beforehand: a token too many or too few is counted. Prints one Markdown row a
scenario; exit code 1 where a stream was cut or wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from support.load import Outcome, complete

from bench.fleet_faults import NEVER_S, Fault, Load, echo_question, engines_made, until
from bench.stacks.service import KEYS, Running, service
from serve_app.sections import EchoOptions

ECHO = EchoOptions(ttft_s=0.05, itl_s=0.01, max_running=8)
SCALING: dict[str, Any] = {
    "min_replicas": 1,
    "max_replicas": 4,
    "window_s": 5.0,
    "up_period_s": 5.0,
    "down_period_s": 5.0,
    "idle_s": 10.0,
}
#: Clients of the step, and its seconds.
STEP_CLIENTS, STEP_S = 28, 60.0


@dataclass
class Result:
    """One scenario; seconds are from its first change of load."""

    scenario: str
    fault: Fault
    #: (seconds, replicas that serve), whenever it changed.
    steps: list[tuple[float, int]] = field(default_factory=list)
    note: str = ""


class Watch:
    """Notes how many replicas serve, once a quarter of a second."""

    def __init__(self, running: Running) -> None:
        self._running = running
        self.began = time.monotonic()
        self.steps: list[tuple[float, int]] = []

    async def run(self) -> None:
        while True:
            number = await asyncio.to_thread(lambda: len(engines_made(self._running)))
            if not self.steps or self.steps[-1][1] != number:
                self.steps.append((time.monotonic() - self.began, number))
            await asyncio.sleep(0.25)

    def first(self, number: int, after_s: float = 0.0) -> float:
        """When so many served first, after a moment; NEVER_S where they never did."""
        found = [at for at, n in self.steps if at >= after_s and n == number]
        return found[0] if found else NEVER_S


async def watched(running: Running, work: Callable[[Watch], Awaitable[None]]) -> Watch:
    watch = Watch(running)
    watching = asyncio.create_task(watch.run())
    try:
        await work(watch)
    finally:
        watching.cancel()
    return watch


def step(folder: Path) -> Result:
    """One replica, four under load, one again."""
    with service(
        folder, echo=ECHO, max_ongoing_requests=8, cpus=0.2, autoscaling=SCALING
    ) as running:
        fault = Fault("load step", 1)
        small, large = (Load(running.url, echo_question, n) for n in (1, STEP_CLIENTS))

        async def work(watch: Watch) -> None:
            async def both() -> None:
                await large.run(lambda: asyncio.sleep(STEP_S))
                await until(lambda: len(engines_made(running)) == 1, 180.0)

            await small.run(both)
            await asyncio.sleep(1.0)

        watch = asyncio.run(watched(running, work))
        for load in (small, large):
            load.fill(fault)
        up, down = watch.first(4), watch.first(1, after_s=STEP_S)
        note = f"4 replicas after {up:.0f} s, 1 again {down - STEP_S:.0f} s after the step's end"
        return Result("1 to 4 and back", fault, watch.steps, note)


def zero(folder: Path, from_zero: str) -> Result:
    """A pool that has gone idle, and the request that finds it empty."""
    scaling = SCALING | {"min_replicas": 0, "from_zero": from_zero}
    with service(
        folder, echo=ECHO, max_ongoing_requests=8, cpus=0.2, autoscaling=scaling
    ) as running:
        fault = Fault(f"from zero: {from_zero}", 1)
        outcomes: list[tuple[Any, Outcome]] = []

        async def ask() -> Outcome:
            question = echo_question(random.Random(1))
            outcome = await complete(running.url, question.body, key=KEYS[0])
            outcomes.append((question, outcome))
            return outcome

        async def work(watch: Watch) -> None:
            await ask()
            await until(lambda: not engines_made(running), 120.0)
            outcome = await ask()
            while outcome.status == 503:
                await asyncio.sleep(outcome.retry_after_s or 1.0)
                outcome = await ask()

        watch = asyncio.run(watched(running, work))
        load = Load(running.url, echo_question)
        load.outcomes = [(q, o) for q, o in outcomes if o.status == 200]
        load.fill(fault)
        refused = [o for _, o in outcomes if o.status == 503]
        waits = sum(o.retry_after_s or 0.0 for o in refused)
        first = outcomes[-1][1].first_s or NEVER_S
        note = (
            f"0 replicas after {watch.first(0, after_s=1.0):.0f} s; first token after {first:.1f} s"
        )
        if refused:
            note += f", after {len(refused)} x 503 with Retry-After of {waits:.0f} s together"
        return Result(f"to zero and back, {from_zero}", fault, watch.steps, note)


def plot(results: list[Result], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(results), squeeze=False, figsize=(8, 2 * len(results)))
    for axis, result in zip(axes[:, 0], results, strict=True):
        axis.step([at for at, _ in result.steps], [n for _, n in result.steps], where="post")
        axis.set(title=result.scenario, ylabel="replicas", ylim=(0, 4.5))
    axes[-1, 0].set_xlabel("seconds")
    figure.tight_layout()
    figure.savefig(path)


def show(results: list[Result]) -> None:
    print(
        "| scenario | requests | complete | duplicated, missing tokens | longest silence s | seen |"
    )
    print("|---|---:|---:|---:|---:|---|")
    for result in results:
        fault = result.fault
        print(
            f"| {result.scenario} | {fault.requests} | {fault.complete} | {fault.duplicated}, "
            f"{fault.missing} | {fault.silence_s:.1f} | {result.note} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    given = parser.parse_args()
    results = []
    for scenario in (step, lambda f: zero(f, "hold"), lambda f: zero(f, "refuse")):
        with tempfile.TemporaryDirectory() as folder:
            results.append(scenario(Path(folder)))
    show(results)
    if given.plot:
        plot(results, given.plot)
    if given.json:
        given.json.write_text(json.dumps([asdict(each) for each in results], indent=2) + "\n")
    if broken := [each.scenario for each in results if each.fault.broken]:
        raise SystemExit(f"bench: not as promised: {', '.join(broken)}")


if __name__ == "__main__":
    main()
