"""Real replicas that appear and vanish: one to four and back under a load step, and from zero.

    python bench/autoscaling.py [--hold 10] [--json FILE]

The whole service with the echo engine, four places in each replica, windows of seconds instead of
minutes. Sixteen clients ask, one request after the other, until four replicas are there and for
`--hold` seconds more; eight long streams begin just before they stop. A row says when the owner of
admission had each number of replicas, and what became of every stream. Exit code 1 when a stream is
cut, refused or wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from support.load import Outcome, complete
from support.serving import metric

from bench.stacks.service import KEYS, service
from serve_app.engine_sections import EchoOptions

PLACES, CLIENTS, LONG_STREAMS = 4, 16, 8
PROMPT, TOKENS, LONG_TOKENS = "abc", 150, 1500
QUICK = {
    "target_ttft_s": 0.5,
    "target_itl_s": None,
    "window_s": 5.0,
    "up_period_s": 5.0,
    "down_period_s": 5.0,
}
LIMIT_S = 300.0


@dataclass
class Seen:
    """Replicas over time (seconds from the step), and outcomes."""

    case: str
    replicas: list[tuple[float, int]] = field(default_factory=list)
    streams: int = 0
    wrong: int = 0
    first_token_s: float | None = None


def pool(**autoscaling: Any) -> dict[str, Any]:
    return {
        "engine": {"kind": "echo", "itl_s": 0.02, "max_model_len": 4096},
        "max_ongoing_requests": PLACES,
        "max_request_tokens": 4096,
        "cpus": 0.1,
        "autoscaling": {**QUICK, **autoscaling},
    }


def body(tokens: int) -> dict[str, Any]:
    return {"model": "echo", "prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True}


def is_right(outcome: Outcome, tokens: int) -> bool:
    return outcome.complete and outcome.text == (PROMPT * tokens)[:tokens]


async def watch(url: str, seen: Seen, began: float, end: asyncio.Event) -> None:
    """Write down each change of the number of replicas."""
    headers = {"authorization": f"Bearer {KEYS[0]}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=30) as client:
        while not end.is_set():
            text = (await client.get("/metrics")).text
            count = int(metric(text, "intserve_pool_replicas_ready", pool="default"))
            if not seen.replicas or seen.replicas[-1][1] != count:
                seen.replicas.append((round(time.monotonic() - began, 1), count))
            await asyncio.sleep(0.25)


async def until(seen: Seen, count: int) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not seen.replicas or seen.replicas[-1][1] != count:
            await asyncio.sleep(0.1)


async def step(url: str, seen: Seen, hold_s: float) -> None:
    """One to four and back."""
    busy, end, began = True, asyncio.Event(), time.monotonic()

    def count(outcome: Outcome, tokens: int) -> None:
        seen.streams += 1
        seen.wrong += not is_right(outcome, tokens)

    async def client() -> None:
        while busy:
            count(await complete(url, body(TOKENS), key=KEYS[0]), TOKENS)

    async def long_stream() -> None:
        count(await complete(url, body(LONG_TOKENS), key=KEYS[0]), LONG_TOKENS)

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(watch(url, seen, began, end))
        await until(seen, 1)
        for _ in range(CLIENTS):
            tasks.create_task(client())
        await until(seen, 4)
        await asyncio.sleep(hold_s)
        for _ in range(LONG_STREAMS):
            tasks.create_task(long_stream())
        await asyncio.sleep(2.0)
        busy = False
        await until(seen, 1)
        end.set()


async def from_zero(url: str, seen: Seen) -> None:
    """One request that finds no replica, held until there is one."""
    end, began = asyncio.Event(), time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(watch(url, seen, began, end))
        await until(seen, 1)  # it starts with one, which nobody asks
        await until(seen, 0)
        outcome = await complete(url, body(TOKENS), key=KEYS[0])
        seen.streams, seen.wrong = 1, int(not is_right(outcome, TOKENS))
        seen.first_token_s = outcome.first_s
        end.set()


def show(rows: list[Seen]) -> None:
    print("| case | replicas ready (seconds: number) | streams | cut or wrong | first token |")
    print("|---|---|---|---|---|")
    for row in rows:
        course = ", ".join(f"{moment:.1f}: {count}" for moment, count in row.replicas)
        first = "" if row.first_token_s is None else f"{row.first_token_s:.1f} s"
        print(f"| {row.case} | {course} | {row.streams} | {row.wrong} | {first} |")


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hold", type=float, default=10.0, help="seconds with four replicas")
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    rows = [Seen("1 to 4 and back"), Seen("from zero")]
    zero = {"min_replicas": 0, "max_replicas": 1, "idle_s": 5.0}
    with tempfile.TemporaryDirectory(prefix="autoscaling-") as name:
        folder = Path(name)
        with service(folder, echo=EchoOptions(), pools={"default": pool(max_replicas=4)}) as made:
            asyncio.run(step(made.url, rows[0], arguments.hold))
        with service(folder, echo=EchoOptions(), pools={"default": pool(**zero)}) as made:
            asyncio.run(from_zero(made.url, rows[1]))
    show(rows)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return int(any(row.wrong for row in rows))


if __name__ == "__main__":
    sys.exit(main())
