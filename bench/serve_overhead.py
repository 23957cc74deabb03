"""What the service itself costs, against a plain Ray Serve app and uvicorn alone, in one run.

    python bench/serve_overhead.py [--runs 3] [--seconds 12] [--concurrency 1 8 32 128]

All three serve the same echo engine: 20 ms to the first token, 10 ms a token, 64 tokens, streamed
over HTTP. Ours runs as `python -m serve_app` starts it, with HAProxy, two ingress replicas,
admission, API keys and traces (sent to a collector beside it). The baseline is what Serve's guide
shows: its Python proxy, a FastAPI ingress, a streaming handle, an engine (bench/stacks/plain.py).
The floor is the engine behind uvicorn (bench/stacks/bare.py). A lean client in a process of its own
asks in a closed loop: as many clients as the concurrency says begin at once, and each asks again as
soon as it is answered, for a fixed time. Client and server share the machine's cores, so the
figures are upper bounds. CPU is that of all processes of the stack, the client's not. The stacks
take turns; the figures are medians over the runs. An answer that takes longer than the limit counts
as unanswered, which only the baseline may have. Prints one Markdown table and the two ratios that
are promised.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from support.load import Outcome, complete
from support.ports import free_port
from support.processes import cpu_seconds, tree

from bench.stacks.service import KEYS, service, started
from serve_app.engine_sections import EchoOptions

ROOT = Path(__file__).resolve().parent.parent
TTFT_S, ITL_S, TOKENS = 0.02, 0.01, 64
STACKS = ("floor", "baseline", "ours")
#: Seconds within which an answer must be complete.
LIMIT_S = 30.0


@dataclass(frozen=True)
class Row:
    """One stack at one concurrency; times in milliseconds."""

    stack: str
    concurrency: int
    ttft_p50_ms: float
    ttft_p99_ms: float
    tokens_per_s: float
    cpu_s_per_1000_tokens: float
    answers: int
    unanswered: int


def _wait_for_port(port: int) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise SystemExit("bench: a stack did not start")


@contextmanager
def running(stack: str, folder: Path) -> Iterator[tuple[str, int]]:
    """The URL of a started stack, and the process that all others of it descend from."""
    if stack == "ours":
        echo = EchoOptions(ttft_s=TTFT_S, itl_s=ITL_S)
        collector = subprocess.Popen(
            [sys.executable, "-m", "bench.stacks.collector"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert collector.stdout is not None
        traced = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.stdout.readline().strip()}
        try:
            with service(folder, traced, echo=echo, max_ongoing_requests=256) as ours:
                yield ours.url, ours.pid
        finally:
            collector.terminate()
            collector.wait()
        return
    port = free_port()
    module = {"floor": "bare", "baseline": "plain"}[stack]
    times = ["--ttft", str(TTFT_S), "--itl", str(ITL_S)]
    command = ["-m", f"bench.stacks.{module}", "--port", str(port), *times]
    with started(command, folder / f"{stack}.log", {"RAY_worker_niceness": "0"}) as pid:
        _wait_for_port(port)
        yield f"http://127.0.0.1:{port}", pid


async def load(url: str, concurrency: int, seconds: float) -> list[Outcome]:
    """Every one of the clients asks again until the time is over, and at least once."""
    end = time.monotonic() + seconds
    body = {"model": "echo", "prompt": "x" * 64, "max_tokens": TOKENS, "ignore_eos": True}

    async def one_client() -> list[Outcome]:
        outcomes = [await complete(url, body, key=KEYS[0], timeout_s=LIMIT_S)]
        while time.monotonic() < end:
            outcomes.append(await complete(url, body, key=KEYS[0], timeout_s=LIMIT_S))
        return outcomes

    runs = await asyncio.gather(*(one_client() for _ in range(concurrency)))
    return [outcome for run in runs for outcome in run]


def measure(stack: str, url: str, pid: int, concurrency: int, seconds: float) -> Row:
    asyncio.run(load(url, concurrency, 1.0))  # warm-up
    before, started = cpu_seconds(tree(pid)), time.perf_counter()
    outcomes = asyncio.run(load(url, concurrency, seconds))
    elapsed, cpu = time.perf_counter() - started, cpu_seconds(tree(pid)) - before
    right = [o for o in outcomes if o.complete and o.text == "x" * TOKENS]
    wrong = [o for o in outcomes if o.text != "x" * TOKENS and (o.complete or stack != "baseline")]
    if wrong or not right:
        shown = (wrong or outcomes)[0]
        raise SystemExit(f"bench: {stack} at {concurrency}: {len(wrong)} wrong, {shown}")
    firsts = sorted(o.first_s for o in outcomes if o.first_s is not None)
    tokens = len(right) * TOKENS
    return Row(
        stack=stack,
        concurrency=concurrency,
        ttft_p50_ms=statistics.median(firsts) * 1e3,
        ttft_p99_ms=firsts[min(len(firsts) - 1, int(0.99 * len(firsts)))] * 1e3,
        tokens_per_s=tokens / elapsed,
        cpu_s_per_1000_tokens=cpu / tokens * 1e3,
        answers=len(right),
        unanswered=len(outcomes) - len(right),
    )


def median_of(rows: list[Row]) -> Row:
    def middle(name: str) -> float:
        return statistics.median(getattr(row, name) for row in rows)

    return Row(
        rows[0].stack,
        rows[0].concurrency,
        middle("ttft_p50_ms"),
        middle("ttft_p99_ms"),
        middle("tokens_per_s"),
        middle("cpu_s_per_1000_tokens"),
        sum(row.answers for row in rows),
        sum(row.unanswered for row in rows),
    )


def table(rows: list[Row]) -> str:
    lines = [
        "| clients | stack | TTFT p50 / p99 ms | tokens/s | of floor | CPU s per 1,000 tokens "
        "| answers | unanswered |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    floors = {row.concurrency: row.tokens_per_s for row in rows if row.stack == "floor"}
    for row in rows:
        share = f"{row.tokens_per_s / floors[row.concurrency]:.2f}x" if floors else ""
        lines.append(
            f"| {row.concurrency} | {row.stack} | {row.ttft_p50_ms:.0f} / {row.ttft_p99_ms:.0f} | "
            f"{row.tokens_per_s:,.0f} | {share} | {row.cpu_s_per_1000_tokens:.2f} | "
            f"{row.answers:,} | {row.unanswered} |"
        )
    return "\n".join(lines)


def promised(rows: list[Row], concurrency: int) -> str:
    """The ratios that are promised at one concurrency."""
    by_stack = {row.stack: row for row in rows if row.concurrency == concurrency}
    if set(by_stack) != set(STACKS):
        return ""
    floor, baseline, ours = (by_stack[name] for name in STACKS)
    added = ours.ttft_p50_ms - floor.ttft_p50_ms
    base_added = baseline.ttft_p50_ms - floor.ttft_p50_ms
    return (
        f"At {concurrency}: {ours.tokens_per_s / floor.tokens_per_s:.2f} of the floor's tokens/s; "
        f"TTFT p50 over the floor's: {added:.1f} ms, {added / base_added:.2f} of the baseline's "
        f"{base_added:.0f} ms."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the rows of all runs here")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=12.0, help="of one load")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--stack", nargs="+", choices=STACKS, default=list(STACKS))
    given = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for run in range(given.runs):
            for stack in given.stack:
                with running(stack, Path(folder)) as (url, pid):
                    for concurrency in given.concurrency:
                        rows.append(measure(stack, url, pid, concurrency, given.seconds))
                        print(f"run {run + 1}: {rows[-1]}", file=sys.stderr, flush=True)
    medians = [
        median_of([row for row in rows if (row.stack, row.concurrency) == (stack, concurrency)])
        for concurrency in given.concurrency
        for stack in given.stack
    ]
    print(table(medians))
    for concurrency in given.concurrency:
        if sentence := promised(medians, concurrency):
            print(f"\n{sentence}")
    if given.json:
        report = {
            "cpus": os.cpu_count(),
            "load_average": os.getloadavg(),
            "rows": [asdict(row) for row in rows],
        }
        given.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
