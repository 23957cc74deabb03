"""The whole path of a TensorRT-LLM replica on one machine without a GPU, and what a death costs.

    python bench/trtllm_path.py [--output runs/trtllm-path] [--json FILE]

    quantize w4a8 -> build for 8 ranks -> evaluate in the target's arithmetic -> gate
    -> three Ray nodes of 8 logical GPUs -> two replicas of 8 ranks each -> streams, one replica's
    engine killed in the middle -> load that starts a third replica -> back to two -> stop

Every step is the command that one runs on a cluster, started as its own process, on the example
model with twice its heads (eight ranks need eight). The one thing that is not real is
`tensorrt_llm`: the engine's environment holds the strict double of tests/support/trtllm_double,
which computes with the engine directory in TensorRT-LLM's arithmetic and has a process for each
rank. Exit code 1 where a stream is not what it is without a death, or something is left behind.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from support.load import Outcome, complete
from support.wider import widen

from bench.stacks.trtllm import MODEL, RANKS, GpuService, left_behind, trtllm_service

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "tiny-deepseek-v3"
NODES = 3
TOKENS, STREAMS = 96, 6
#: Seconds of a step of the double: a stream lasts for five.
STEP_S = 0.05
PATIENCE_S = 180.0


@dataclass
class Report:
    """What happened, in the order in which it did."""

    verdict: str = ""
    ready_s: float = 0.0
    streams: int = 0
    complete: int = 0
    resumed: int = 0
    recovery_s: float = 0.0
    grown_s: float = 0.0
    shrunk_s: float = 0.0
    under_load: int = 0
    under_load_complete: int = 0
    left_behind: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    @property
    def holds(self) -> bool:
        whole = self.complete == self.streams and self.under_load_complete == self.under_load
        found = self.left_behind or self.violations
        return self.verdict == "pass" and whole and self.resumed > 0 and not found


def say(line: str) -> None:
    print(line, flush=True)


def command(*words: object) -> str:
    """Run one of our commands and return its stdout; show it as it is typed."""
    shown = " ".join(map(str, words)).replace(f"{ROOT}/", "")
    say(f"\n$ python -m {shown}")
    started = [sys.executable, "-m", *map(str, words)]
    done = subprocess.run(started, cwd=ROOT, text=True, stdout=subprocess.PIPE, check=False)
    if done.returncode:
        raise SystemExit(f"bench: {shown} ended with {done.returncode}")
    return done.stdout


def make_engine(output: Path, report: Report) -> Path:
    """The model, its artifact, an engine of eight ranks, and a verdict beside it."""
    model, artifact, engine = output / "model", output / "artifact", output / "engine"
    widen(EXAMPLE, model, 2)
    text = ("--calibration", model / "calibration.txt")
    command("quant_jobs", "quantize", "--model", model, "--recipe", "w4a8", *text,
            "--output", artifact)  # fmt: skip
    say(
        command("quant_jobs", "build", "--checkpoint", artifact, "--target", "trtllm",
                "--tp", RANKS, "--ep", RANKS, "--dialect", "single", "--output", engine)
    )  # fmt: skip
    evaluation = output / "evaluation"
    say(
        command("quant_jobs", "evaluate", "--engine", engine, "--reference", model,
                "--data", model / "heldout.txt", "--output", evaluation)
    )  # fmt: skip
    gate = ("quant_jobs", "gate", "--engine", engine, "--evaluation", evaluation, "--json")
    report.verdict = str(json.loads(command(*gate))["verdict"])
    say(report.verdict)
    return engine


#: A service that grows within seconds instead of minutes.
POOL = {
    "max_ongoing_requests": 4,
    "autoscaling": {
        "min_replicas": 2,
        "max_replicas": NODES,
        "target_ttft_s": 1.0,
        "target_itl_s": None,
        "window_s": 4.0,
        "up_period_s": 4.0,
        "down_period_s": 4.0,
    },
}


def body(index: int, tokens: int = TOKENS) -> dict[str, Any]:
    """One greedy request whose answer does not depend on who computes it."""
    draw = random.Random(index)
    prompt = [draw.randrange(10, 2000) for _ in range(12)]
    greedy = {"temperature": 0.0, "ignore_eos": True}
    return {"model": MODEL, "prompt": prompt, "max_tokens": tokens, **greedy}


async def until(condition: Callable[[], bool], what: str) -> float:
    """Seconds until it holds.

    Raises:
        SystemExit: it does not.
    """
    began = time.monotonic()
    while not await asyncio.to_thread(condition):
        if time.monotonic() - began > PATIENCE_S:
            raise SystemExit(f"bench: {what} did not come about in {PATIENCE_S:g} s")
        await asyncio.sleep(0.1)
    return time.monotonic() - began


async def ask(service: GpuService, numbers: range) -> list[Outcome]:
    return list(await asyncio.gather(*(complete(service.url, body(n)) for n in numbers)))


async def watch_a_death(service: GpuService, report: Report) -> None:
    """The same streams twice: undisturbed, and with the engine of one replica killed."""
    numbers = range(STREAMS)
    expected = await ask(service, numbers)
    asked = asyncio.create_task(ask(service, numbers))
    await asyncio.sleep(1.5)
    victim = service.workers()[0]
    say(f"SIGKILL of the engine's process of one replica, {STREAMS} streams under way")
    killed = time.monotonic()
    victim.kill()
    outcomes = await asked
    await until(lambda: len(set(service.workers()) - {victim}) == service.ready == 2, "a successor")
    report.recovery_s = time.monotonic() - killed
    report.streams = len(outcomes)
    report.complete = sum(
        each.complete and before.complete and each.text == before.text
        for each, before in zip(outcomes, expected, strict=True)
    )
    report.resumed = service.resumed
    say(
        f"{report.complete} of {report.streams} streams are what they are without it, "
        f"{report.resumed} went on elsewhere; two replicas again after {report.recovery_s:.1f} s"
    )


async def watch_growth(service: GpuService, report: Report) -> None:
    """More clients than two replicas have places, until there are three; then nobody."""
    busy, outcomes = True, []

    async def client(index: int) -> None:
        while busy:
            outcomes.append(await complete(service.url, body(index)))

    clients = [asyncio.create_task(client(index)) for index in range(12)]
    report.grown_s = await until(lambda: service.ready == 3, "a third replica")
    say(f"12 clients: a third replica serves after {report.grown_s:.1f} s")
    busy = False
    await asyncio.gather(*clients)
    report.under_load = len(outcomes)
    report.under_load_complete = sum(outcome.complete for outcome in outcomes)
    report.shrunk_s = await until(lambda: service.ready == 2, "the third replica's end")
    say(
        f"{report.under_load_complete} of {report.under_load} answers complete; two replicas again "
        f"{report.shrunk_s:.1f} s after the load"
    )


def serve(engine: Path, output: Path, report: Report) -> None:
    """Three nodes, the service on them, and what is done to it."""
    say(f"\n{NODES} Ray nodes of {RANKS} logical GPUs\n$ python -m serve_app --config serve.yaml")
    began = time.monotonic()
    with trtllm_service(engine, output, NODES, {"step_s": STEP_S}, **POOL) as service:
        report.ready_s = time.monotonic() - began
        say(f"serving {MODEL} after {report.ready_s:.0f} s, nodes included")
        asyncio.run(until(lambda: service.ready == 2, "the second replica"))
        asyncio.run(watch_a_death(service, report))
        asyncio.run(watch_growth(service, report))
    report.violations = service.double.violations
    report.left_behind = left_behind(output)


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "trtllm-path")
    parser.add_argument("--json", type=Path, help="write what happened here")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    report = Report()
    engine = make_engine(output, report)
    serve(engine, output, report)
    nothing = "nothing is left behind" if not report.left_behind else str(report.left_behind)
    say(f"stopped: {nothing}; {len(report.violations)} violations of the contract")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(asdict(report), indent=2) + "\n")
    return int(not report.holds)


if __name__ == "__main__":
    sys.exit(main())
