"""Twice the load that saturates, two keys that share, and a burst of one of them.

    python bench/overload.py [--seconds 30] [--json FILE]

Two replicas of the echo engine with eight places each, 50 ms to the first token and 10 ms a token,
64 tokens. First the rate that saturates them is measured with as many clients as places. Then,
each on the same service:

1. both keys ask at that rate each, together twice of what can be served (Poisson arrivals, nobody
   retries): statuses, TTFT of what was admitted, and how the two share;
2. the same with one key asking at three times the other's rate;
3. one key asks at 0.4 of the rate; with and without a burst of 200 requests of the other. Its p99
   must not be above what it is alone on half of the places, which is its share;
4. a hundred requests at once by clients that come back after `Retry-After`: all are served.

The target of an admitted request's TTFT is `admission.max_wait_s` and what it takes on an idle
service. Exit code 1 when a status is neither 200 nor 429, or a request is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from support.load import Outcome, complete

from bench.stacks.service import KEYS, service
from serve_app.engine_sections import EchoOptions

TTFT_S, ITL_S, TOKENS, PLACES, REPLICAS = 0.05, 0.01, 64, 8, 2
MAX_WAIT_S = 2.0
BODY = {"model": "echo", "prompt": "x" * 64, "max_tokens": TOKENS, "ignore_eos": True}
BURST, EAGER = 200, 100


@dataclass(frozen=True)
class Result:
    """What one key saw; seconds."""

    scenario: str
    key: str
    asked: int
    statuses: dict[str, int]
    wrong: int
    ttft_p50_s: float
    ttft_p99_s: float
    tokens: int


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def result(scenario: str, key: str, outcomes: list[Outcome]) -> Result:
    served = [o for o in outcomes if o.status == 200]
    firsts = [o.first_s for o in served if o.first_s is not None]
    return Result(
        scenario=scenario,
        key=key,
        asked=len(outcomes),
        statuses=dict(Counter(str(o.status or "cut") for o in outcomes)),
        wrong=sum(not o.complete or o.text != "x" * TOKENS for o in served),
        ttft_p50_s=percentile(firsts, 0.5),
        ttft_p99_s=percentile(firsts, 0.99),
        tokens=sum(len(o.text) for o in served),
    )


async def saturate(url: str, clients: int, seconds: float) -> float:
    """Requests per second that as many clients as places get served."""
    end, done = time.monotonic() + seconds, 0

    async def one() -> None:
        nonlocal done
        while time.monotonic() < end:
            outcome = await complete(url, BODY, key=KEYS[0])
            done += outcome.complete

    await asyncio.gather(*(one() for _ in range(clients)))
    return done / seconds


async def arrivals(url: str, key: str, rate: float, seconds: float) -> list[Outcome]:
    """Poisson arrivals at `rate` per second, each a request of its own."""
    draw, tasks = random.Random(key), []
    end = time.monotonic() + seconds
    moment = time.monotonic()
    while (moment := moment + draw.expovariate(rate)) < end:
        await asyncio.sleep(max(0.0, moment - time.monotonic()))
        tasks.append(asyncio.create_task(complete(url, BODY, key=key)))
    return list(await asyncio.gather(*tasks))


async def sharing(url: str, name: str, rates: tuple[float, float], seconds: float) -> list[Result]:
    both = await asyncio.gather(
        *(arrivals(url, key, rate, seconds) for key, rate in zip(KEYS, rates, strict=True))
    )
    return [result(name, key, outcomes) for key, outcomes in zip("ab", both, strict=True)]


async def with_burst(url: str, name: str, rate: float, seconds: float, burst: int) -> list[Result]:
    """Key a asks steadily; key b, `burst` times at once after a third of the time."""

    async def burst_of_b() -> list[Outcome]:
        await asyncio.sleep(seconds / 3)
        return list(await asyncio.gather(*(complete(url, BODY, key=KEYS[1]) for _ in range(burst))))

    steady, sudden = await asyncio.gather(arrivals(url, KEYS[0], rate, seconds), burst_of_b())
    return [result(name, "a", steady), result(name, "b", sudden)]


async def patient(url: str) -> Result:
    """Clients that come back when they are told to."""

    async def one() -> Outcome:
        for _ in range(50):
            outcome = await complete(url, BODY, key=KEYS[0])
            if outcome.status != 429:
                return outcome
            await asyncio.sleep(outcome.retry_after_s or 1.0)
        return outcome

    return result("Retry-After", "a", list(await asyncio.gather(*(one() for _ in range(EAGER)))))


def show(results: list[Result]) -> None:
    print("| scenario | key | asked | statuses | wrong | TTFT p50 / p99 s | tokens |")
    print("|---|---|---:|---|---:|---:|---:|")
    for row in results:
        statuses = ", ".join(
            f"{count} x {status}" for status, count in sorted(row.statuses.items())
        )
        print(
            f"| {row.scenario} | {row.key} | {row.asked} | {statuses} | {row.wrong} | "
            f"{row.ttft_p50_s:.2f} / {row.ttft_p99_s:.2f} | {row.tokens:,} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--seconds", type=float, default=30.0)
    given = parser.parse_args()
    echo = EchoOptions(ttft_s=TTFT_S, itl_s=ITL_S, max_running=PLACES)
    settings: dict[str, Any] = {"echo": echo, "max_wait_s": MAX_WAIT_S, "max_queued_requests": 64}
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        with service(Path(folder), **settings, replicas=REPLICAS) as running:
            url = running.url
            asyncio.run(saturate(url, 4, 2.0))  # warm-up
            rate = asyncio.run(saturate(url, PLACES * REPLICAS, given.seconds / 2))
            print(f"saturated at {rate:.1f} requests/s", file=sys.stderr, flush=True)
            equal, skewed = (rate, rate), (1.5 * rate, 0.5 * rate)
            results += asyncio.run(sharing(url, "twice the load", equal, given.seconds))
            results += asyncio.run(sharing(url, "three to one", skewed, given.seconds))
            results += asyncio.run(with_burst(url, "a alone", 0.4 * rate, given.seconds, 0))[:1]
            results += asyncio.run(
                with_burst(url, "a, and a burst of b", 0.4 * rate, given.seconds, BURST)
            )
            results.append(asyncio.run(patient(url)))
        with service(Path(folder), **settings, replicas=1) as running:
            url = running.url
            asyncio.run(saturate(url, 4, 2.0))
            name = "a alone on half of the places"
            results += asyncio.run(with_burst(url, name, 0.4 * rate, given.seconds, 0))[:1]
    show(results)
    by_name = {(row.scenario, row.key): row for row in results}
    for name in ("twice the load", "three to one"):
        a, b = by_name[name, "a"].tokens, by_name[name, "b"].tokens
        print(f"\n{name}: a has {2 * a / (a + b):.2f} of its half")
    if given.json:
        report = {"rate": rate, "results": [asdict(row) for row in results]}
        given.json.write_text(json.dumps(report, indent=2) + "\n")
    bad = [row for row in results if row.wrong or set(row.statuses) - {"200", "429"}]
    if bad:
        raise SystemExit(f"bench: {len(bad)} scenarios with other statuses or wrong answers")


if __name__ == "__main__":
    main()
