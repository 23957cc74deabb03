"""What the service itself costs: an echo engine with a fixed schedule, compared with that schedule.

    python bench/serve_overhead.py [--json FILE] [--tokens 64] [--requests-per-client 4]

Closed loop at several concurrencies over real HTTP, streamed. The engine emits its first token
after `ttft` and one more every `itl`, at any load; an ideal service would show exactly these times.
The rest is the time of our code, of Ray Serve and of the client, which shares the machine's cores,
so the figures are an upper bound. Warm-up is excluded. To measure Serve's HAProxy path, set
RAY_SERVE_ENABLE_HA_PROXY=1 and RAY_SERVE_THROUGHPUT_OPTIMIZED=1.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
from support.configs import make_config

from serve_app.config import EchoOptions, ReplicaLimits
from serve_app.local import serving

PROMPT = "x" * 64


@dataclass(frozen=True)
class Row:
    """What was measured at one concurrency; times in milliseconds."""

    max_flushes_per_s: float | None
    concurrency: int
    ttft_p50_ms: float
    ttft_p95_ms: float
    ideal_ttft_ms: float
    answer_p50_ms: float
    ideal_answer_ms: float
    tokens_per_s: float
    ideal_tokens_per_s: float
    messages_per_answer: float


async def ask(client: httpx.AsyncClient, url: str, tokens: int) -> tuple[float, float, int]:
    """Send one request; seconds to the first event and to the end, and the number of events."""
    body = {"model": "echo", "prompt": PROMPT, "max_tokens": tokens}
    body |= {"ignore_eos": True, "stream": True}
    started = time.perf_counter()
    first, events = 0.0, 0
    async with client.stream("POST", f"{url}/completions", json=body) as answer:
        answer.raise_for_status()
        async for chunk in answer.aiter_raw():
            if not events:
                first = time.perf_counter() - started
            events += chunk.count(b"data: ")
    return first, time.perf_counter() - started, events - 2  # the last text-less one and [DONE]


async def measure(
    url: str, concurrency: int, rounds: int, tokens: int, echo: EchoOptions, flushes: float | None
) -> Row:
    limits = httpx.Limits(max_connections=concurrency)
    async with httpx.AsyncClient(timeout=120, limits=limits) as client:

        async def one_client(count: int) -> list[tuple[float, float, int]]:
            return [await ask(client, url, tokens) for _ in range(count)]

        await asyncio.gather(*(one_client(1) for _ in range(concurrency)))  # warm-up
        started = time.perf_counter()
        runs = await asyncio.gather(*(one_client(rounds) for _ in range(concurrency)))
        elapsed = time.perf_counter() - started
    results = [result for run in runs for result in run]
    firsts = sorted(first for first, _, _ in results)
    ideal_answer_s = echo.ttft_s + (tokens - 1) * echo.itl_s
    return Row(
        max_flushes_per_s=flushes,
        concurrency=concurrency,
        ttft_p50_ms=statistics.median(firsts) * 1e3,
        ttft_p95_ms=firsts[min(len(firsts) - 1, int(0.95 * len(firsts)))] * 1e3,
        ideal_ttft_ms=echo.ttft_s * 1e3,
        answer_p50_ms=statistics.median(total for _, total, _ in results) * 1e3,
        ideal_answer_ms=ideal_answer_s * 1e3,
        tokens_per_s=len(results) * tokens / elapsed,
        ideal_tokens_per_s=concurrency * tokens / ideal_answer_s,
        messages_per_answer=statistics.mean(events for _, _, events in results),
    )


def show(row: Row) -> None:
    print(
        f"flushes/s {row.max_flushes_per_s or 'all':>5}  c={row.concurrency:<3d} "
        f"TTFT p50 {row.ttft_p50_ms:6.1f}  p95 {row.ttft_p95_ms:6.1f} "
        f"(ideal {row.ideal_ttft_ms:.0f}) ms   "
        f"answer p50 {row.answer_p50_ms:6.0f} (ideal {row.ideal_answer_ms:.0f}) ms   "
        f"{row.tokens_per_s:6.0f} tok/s (ideal {row.ideal_tokens_per_s:.0f})   "
        f"{row.messages_per_answer:5.1f} messages per answer",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--requests-per-client", type=int, default=4)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument(
        "--flushes", type=float, nargs="+", default=[0.0, 500.0], help="0 sends each token at once"
    )
    arguments = parser.parse_args()
    echo = EchoOptions(ttft_s=0.02, itl_s=0.01)
    rows = []
    for budget in arguments.flushes:
        flushes = budget or None
        config = make_config(
            echo=echo,
            port=arguments.port,
            replica_limits=ReplicaLimits(max_flushes_per_s=flushes),
        )
        with serving(config) as url:
            for concurrency in arguments.concurrency:
                row = asyncio.run(
                    measure(
                        url,
                        concurrency,
                        arguments.requests_per_client,
                        arguments.tokens,
                        echo,
                        flushes,
                    )
                )
                rows.append(row)
                show(row)
    if arguments.json:
        report = {
            "cpus": os.cpu_count(),
            "load_average": os.getloadavg(),
            "ha_proxy": os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "0"),
            "rows": [asdict(row) for row in rows],
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
