"""Deaths and hangs of TensorRT-LLM replicas under load, and what the clients see of them.

    python bench/engine_faults.py [--rounds 5] [--only NAME ...] [--engine DIR] [--json FILE]

The service of bench/stacks/trtllm.py with two replicas on two nodes: the strict double of
`tensorrt_llm`, with a process for each rank. Each fault runs under streams of several clients whose
every answer is known from an undisturbed run; a token too many or too few is counted. Recovery is
until both replicas serve again. After each harm the processes of the engine that it was done to
must have gone, and after each fault Ray must count as many free GPUs as before. Numbers are issues
of NVIDIA/TensorRT-LLM. One Markdown row a fault; exit code 1 where a stream is lost, or anything is
left.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from support.load import complete

from bench.fleet_faults import Fault, Load, Question, is_idle, run_load, until
from bench.stacks.trtllm import MODEL, GpuService, left_behind, ranks_of, trtllm_service
from bench.trtllm_path import Report, body, make_engine

CLIENTS, QUESTIONS, TOKENS = 6, 8, 48
#: Seconds of a step of the double, and for a replica to be replaced.
STEP_S, BACK_S = 0.03, 240.0
#: Seconds for the processes of an engine to end, from the harm or from its discovery on.
GONE_S = 60.0

#: Does harm to one replica; returns the processes that must end by it.
Harm = Callable[[GpuService, random.Random], list[psutil.Process]]


def family(chain: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Guardians, worker and ranks."""
    return [*chain, *chain[-1].children(recursive=True)]


def on_chain(index: int, act: Callable[[psutil.Process], None]) -> Harm:
    """Harm that comes to the outer guardian (0), the inner one (1) or the worker (2)."""

    def harm(service: GpuService, draw: random.Random) -> list[psutil.Process]:
        chain = draw.choice(service.chains())
        processes = family(chain)
        act(chain[index])
        return processes

    return harm


kill_worker = on_chain(2, psutil.Process.kill)


def kill_replica(service: GpuService, draw: random.Random) -> list[psutil.Process]:
    chain = draw.choice(service.chains())
    replica = chain[0].parent()
    processes = [replica, *family(chain)]
    replica.kill()
    return processes


def signal_rank(number: signal.Signals) -> Harm:
    def harm(service: GpuService, draw: random.Random) -> list[psutil.Process]:
        chain = draw.choice(service.chains())
        processes = family(chain)
        draw.choice(ranks_of(chain[-1])).send_signal(number)
        return processes

    return harm


@dataclass(frozen=True)
class Row:
    """A fault: what is wrong with the double until the harm has shown, and what is done each round.
    `after` is what a successor meets first; `lasts`: what is wrong is so all the while."""

    name: str
    harm: Harm
    faults: dict[str, Any]
    after: dict[str, Any] | None = None
    lasts: bool = False


ROWS = (
    Row("engine killed", kill_worker, {}),
    Row("rank killed, engine says it is well (#16338)", signal_rank(signal.SIGKILL),
        {"rank_death": "hang"}),
    Row("rank killed, engine knows (#18663)", signal_rank(signal.SIGKILL),
        {"rank_death": "fatal"}),
    Row("rank stopped (#9628)", signal_rank(signal.SIGSTOP), {}),
    Row("rank stopped, health check blocks", signal_rank(signal.SIGSTOP), {"health_hangs": True}),
    Row("engine stopped (SIGSTOP)", on_chain(2, psutil.Process.suspend), {}),
    Row("replica killed (#16404)", kill_replica, {}),
    Row("replica killed, ranks in sessions of their own (#16404)", kill_replica,
        {"orphan_ranks": True}, lasts=True),
    Row("outer guardian killed", on_chain(0, psutil.Process.kill), {}),
    Row("inner guardian killed", on_chain(1, psutil.Process.kill), {}),
    Row("engine killed, its successor's rank dies while it loads (#17578)", kill_worker, {},
        {"die_before_ready": 3}),
    Row("engine killed, shutdown never returns (#16312)", kill_worker, {"shutdown": "hang"},
        lasts=True),
)  # fmt: skip


def questions(url: str) -> list[Question]:
    """Requests and their answers, from an undisturbed run.

    Raises:
        SystemExit: an answer is not whole.
    """
    made = []
    for index in range(QUESTIONS):
        asked = body(index, TOKENS)
        alone = asyncio.run(complete(url, asked))
        if not alone.complete:
            raise SystemExit(f"bench: the undisturbed run failed: {alone}")
        made.append(Question(asked, alone.text))
    return made


def gone(processes: Sequence[psutil.Process]) -> bool:
    return not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes)


def alive(processes: Sequence[psutil.Process]) -> bool:
    with suppress(psutil.NoSuchProcess):
        return not gone(processes)
    return False


def run_row(row: Row, rounds: int, service: GpuService) -> Fault:
    """Do it `rounds` times, under load."""
    fault = Fault(row.name, rounds)
    always = {"step_s": STEP_S, **row.faults}
    draw = random.Random(row.name)
    known = questions(service.url)
    free = service.free_gpus()
    gone_s: list[float] = []

    async def disturb() -> None:
        for _ in range(rounds):
            service.double.switch(**always)
            await asyncio.sleep(draw.uniform(0.5, 2.0))
            before = {process.pid for process in service.workers()}
            harmed = row.harm(service, draw)
            if row.after is not None:
                service.double.switch(**always, **row.after)
            gone_s.append(await until(lambda: not alive(harmed), GONE_S))  # noqa: B023
            began = time.monotonic()
            if not row.lasts and row.after is None:
                service.double.switch(step_s=STEP_S)
            if row.after is not None:
                failures = len(service.double.events("ranks"))
                await until(lambda: len(service.double.events("ranks")) > failures, BACK_S)  # noqa: B023
                await asyncio.sleep(1.0)  # a rank ends, and with it the load
                service.double.switch(**always)

            def back() -> bool:
                workers = {process.pid for process in service.workers()}
                return service.ready == 2 and len(workers) == 2 and workers != before  # noqa: B023

            await until(back, BACK_S)
            fault.recovery_s.append(gone_s[-1] + time.monotonic() - began)

    load = Load(service.url, lambda generator: generator.choice(known), CLIENTS)
    run_load(fault, load, disturb, service.url)
    idle_s = asyncio.run(until(lambda: is_idle(service.url), 30.0))
    leaked = asyncio.run(until(lambda: service.free_gpus() == free, 30.0)) >= 30.0
    fault.note = f"its processes gone within {max(gone_s):.1f} s"
    for wrong, what in (
        (max(gone_s) >= GONE_S, "processes left"),
        (leaked, f"{free - service.free_gpus()} GPUs leaked"),
        (idle_s >= 30.0, "KV blocks held"),
        (bool(service.double.violations), f"violations: {sorted(set(service.double.violations))}"),
    ):
        if wrong:
            fault.missing += 1
            fault.note += f"; {what}"
    return fault


def clients_leave(rounds: int, service: GpuService) -> Fault:
    """Clients disconnect in the queue, in prefill and in decode; each is aborted once, and its KV
    blocks return (#6298, #10879)."""
    fault = Fault("clients leave (#6298, #10879)", rounds * 10)
    draw = random.Random(11)
    known = questions(service.url)
    aborts = len(service.double.events("abort"))

    async def leave() -> None:
        with suppress(asyncio.TimeoutError):
            async with asyncio.timeout(draw.uniform(0.0, 1.6)):
                await complete(service.url, draw.choice(known).body, timeout_s=1e6)

    async def disturb() -> None:
        for _ in range(rounds):
            await asyncio.gather(*(leave() for _ in range(10)))

    load = Load(service.url, lambda generator: generator.choice(known), 2)
    run_load(fault, load, disturb, service.url)
    seconds = asyncio.run(until(lambda: is_idle(service.url), 30.0))
    fault.recovery_s.append(seconds)
    fault.note = (
        f"{len(service.double.events('abort')) - aborts} aborts; KV blocks, running and waiting 0 "
        f"after {seconds:.1f} s"
    )
    if seconds >= 30.0 or service.double.violations:
        fault.missing += 1
        fault.note += f"; violations: {sorted(set(service.double.violations))}"
    return fault


def show(row: Fault) -> None:
    mean = f"{sorted(row.recovery_s)[len(row.recovery_s) // 2]:.1f}" if row.recovery_s else ""
    worst = f"{max(row.recovery_s):.1f}" if row.recovery_s else ""
    print(
        f"| {row.name} | {row.rounds} | {row.requests} | {row.complete} | {row.resumed} "
        f"| {row.duplicated}, {row.missing} | {mean}, {worst} | {row.silence_s:.1f} | {row.note} |",
        flush=True,
    )


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="words of the names of faults")
    parser.add_argument("--engine", type=Path, help=f"engine of {MODEL}, made before")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()

    def wanted(name: str) -> bool:
        return not arguments.only or any(word in name for word in arguments.only)

    rows: list[Fault] = []
    left: list[str] = []
    with tempfile.TemporaryDirectory(prefix="engine-faults-") as name:
        folder = Path(name).resolve()
        engine = arguments.engine or make_engine(folder, Report())
        print("| fault | rounds | requests | complete | resumed | twice, missing "
              "| recovery p50, worst s | silence s | note |")  # fmt: skip
        print("|---|---:|---:|---:|---:|---|---|---:|---|", flush=True)
        for row in ROWS:
            if not wanted(row.name):
                continue
            output = folder / f"{len(rows)}"
            output.mkdir()
            faults = {"step_s": STEP_S, **row.faults}
            with trtllm_service(engine, output, 2, faults) as service:
                asyncio.run(until(lambda s=service: s.ready == 2, BACK_S))
                rows.append(run_row(row, arguments.rounds, service))
            left += left_behind(output)
            show(rows[-1])
        if wanted("clients leave"):
            output = folder / "leave"
            output.mkdir()
            with trtllm_service(engine, output, 2, {"step_s": STEP_S}) as service:
                asyncio.run(until(lambda: service.ready == 2, BACK_S))
                rows.append(clients_leave(arguments.rounds, service))
            left += left_behind(output)
            show(rows[-1])
    print(f"\nLeft behind at the ends: {left or 'nothing'}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return int(bool(left) or any(row.broken for row in rows))


if __name__ == "__main__":
    sys.exit(main())
