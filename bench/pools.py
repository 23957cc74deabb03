"""Time to the first token of short requests beside long ones: one pool against two.

    python bench/pools.py [--seconds 60] [--rounds 2] [--json FILE]

The whole service with the embedded engine (the tiny example model, int8, ungated), two replicas of
one CPU thread each in every layout, with the same batch, KV and budget of a step:

- one pool: both replicas take everything;
- two pools: one replica for requests of up to SHORT_LIMIT tokens, one for longer ones;
- two pools, and short requests spill over into the pool of the long ones.

LONG_CLIENTS clients send long requests one after the other; short ones come at random (Poisson),
the same in each layout. Prompts are random tokens, so that no prefix is shared. Layouts take turns
for `--rounds` rounds; the first seconds of each, in which engines warm up, do not count. Exit code
1 when any request fails.
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

from support.engines import make_engine
from support.load import Outcome, complete

from bench.stacks.service import KEYS, ROOT, service
from serve_app.engine_sections import EchoOptions

EXAMPLE = ROOT / "examples" / "tiny-deepseek-v3"
SHORT, LONG, SHORT_LIMIT = (32, 16), (900, 64), 128
LONG_CLIENTS, SHORT_PER_S = 4, 2.0
WARM_UP_S = 5.0
ENGINE = {"max_model_len": 1024, "kv_tokens": 8192, "max_batch_size": 16, "max_batched_tokens": 256}


@dataclass(frozen=True)
class Row:
    """One layout over all rounds; seconds. `long_tokens_per_s` are completion tokens of the long
    requests, `statuses` those of all."""

    layout: str
    short: int
    ttft_p50_s: float
    ttft_p99_s: float
    long: int
    long_ttft_p50_s: float
    long_tokens_per_s: float
    statuses: dict[str, int]
    pools: dict[str, int]


@dataclass
class Seen:
    """Outcomes of one layout."""

    short: list[Outcome]
    long: list[Outcome]
    pools: Counter[str]


def layouts(engine: Path) -> dict[str, dict[str, Any]]:
    """The pools of each layout."""

    def pool(replicas: int, **more: Any) -> dict[str, Any]:
        section = {"kind": "embedded", "directory": str(engine), "num_threads": 1, **ENGINE}
        gate = {"allow_ungated": True}
        return {"engine": section, "gate": gate, "replicas": replicas, "cpus": 0.5, **more}

    return {
        "one pool": {"all": pool(2)},
        "two pools": {"short": pool(1, max_request_tokens=SHORT_LIMIT), "long": pool(1)},
        "two pools, spilling over": {
            "short": pool(1, max_request_tokens=SHORT_LIMIT, spill_over=["long"]),
            "long": pool(1),
        },
    }


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


async def load(url: str, seconds: float, seed: int, seen: Seen) -> None:
    """Long requests back to back and short ones at random, for so long."""
    draw = random.Random(seed)
    began = time.monotonic()
    end = began + WARM_UP_S + seconds

    async def ask(size: tuple[int, int], into: list[Outcome]) -> None:
        prompt = [draw.randrange(10, 2000) for _ in range(size[0])]
        counts = time.monotonic() >= began + WARM_UP_S
        body = {"model": "tiny", "prompt": prompt, "max_tokens": size[1], "ignore_eos": True}
        outcome = await complete(url, body, key=KEYS[0])
        if counts:
            into.append(outcome)

    async def long_client() -> None:
        while time.monotonic() < end:
            await ask(LONG, seen.long)

    async def short_arrivals() -> None:
        arrivals, moment = random.Random(seed + 1), time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            while (moment := moment + arrivals.expovariate(SHORT_PER_S)) < end:
                await asyncio.sleep(max(0.0, moment - time.monotonic()))
                tasks.create_task(ask(SHORT, seen.short))

    await asyncio.gather(short_arrivals(), *(long_client() for _ in range(LONG_CLIENTS)))


def run(folder: Path, pools: dict[str, Any], seconds: float, seed: int, seen: Seen) -> None:
    """One round of one layout, on a service of its own."""
    log = folder / f"access-{seed}.jsonl"
    settings = {"pools": pools, "model_name": "tiny", "access_log": str(log)}
    with service(folder, echo=EchoOptions(), **settings) as running:
        asyncio.run(load(running.url, seconds, seed, seen))
    for line in log.read_text("utf-8").splitlines():
        told = json.loads(line)
        if told["prompt_tokens"] == SHORT[0]:
            seen.pools[f"short in {told['pool']}"] += 1
    log.unlink()


def to_row(layout: str, seen: Seen, seconds: float) -> Row:
    def firsts(outcomes: list[Outcome]) -> list[float]:
        return [o.first_s for o in outcomes if o.first_s is not None]

    tokens = sum(
        o.usage["completion_tokens"] if o.usage else LONG[1] * o.complete for o in seen.long
    )
    return Row(
        layout=layout,
        short=len(seen.short),
        ttft_p50_s=percentile(firsts(seen.short), 0.5),
        ttft_p99_s=percentile(firsts(seen.short), 0.99),
        long=len(seen.long),
        long_ttft_p50_s=percentile(firsts(seen.long), 0.5),
        long_tokens_per_s=tokens / seconds,
        statuses=dict(Counter(str(o.status or "cut") for o in [*seen.short, *seen.long])),
        pools=dict(seen.pools),
    )


def show(rows: list[Row]) -> None:
    print("| layout | short requests | TTFT p50 | TTFT p99 | long requests | their TTFT p50 |"
          " their tokens/s | answers | where the short ones ran |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        answers = ", ".join(f"{count} x {status}" for status, count in row.statuses.items())
        ran = ", ".join(f"{count} {where}" for where, count in sorted(row.pools.items()))
        print(
            f"| {row.layout} | {row.short} | {row.ttft_p50_s:.3f} s | {row.ttft_p99_s:.3f} s "
            f"| {row.long} | {row.long_ttft_p50_s:.2f} s | {row.long_tokens_per_s:.0f} "
            f"| {answers} | {ran} |"
        )


def main() -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of load for each round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pools-") as name:
        folder = Path(name)
        made = layouts(make_engine(EXAMPLE, "int8", folder))
        seen = {layout: Seen([], [], Counter()) for layout in made}
        for round_ in range(arguments.rounds):
            for layout, pools in made.items():
                run(folder, pools, arguments.seconds, 100 + round_, seen[layout])
    seconds = arguments.rounds * arguments.seconds
    rows = [to_row(layout, one, seconds) for layout, one in seen.items()]
    show(rows)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return int(any(row.statuses.keys() - {"200"} for row in rows))


if __name__ == "__main__":
    sys.exit(main())
