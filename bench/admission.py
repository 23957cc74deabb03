"""What admission costs a request: with the owner in its actor, and with nobody to ask.

    python bench/admission.py [--json FILE] [--requests 500] [--rounds 4] [--concurrency 1 8 32 128]

Echo engines in this process, whose first token takes 20 ms, behind the real fleet; no HTTP and no
Serve. Once everybody is let in at once, once the client of admission asks the owner, a Ray actor on
this machine. Both in turns, `--rounds` times, so that a load from elsewhere falls on both. The
difference is the price of admission: about one actor call where requests come one by one, and less
processor time each where several share an exchange.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from support.fleets import LocalFleet, echo_fleet
from support.serving import make_request

from cluster.connect import connect
from serve_app.config import EchoOptions
from serve_app.routing.admission_client import Admission, AdmissionClient, OpenAdmission
from serve_app.routing.checks import entry
from serve_app.routing.owner import OwnerChannel
from serve_app.routing.owner_settings import OwnerSettings
from serve_app.routing.tickets import Seen, Terms
from serve_app.setting_types import POOL

REPLICAS, PLACES, TTFT_S = 2, 256, 0.02


@dataclass(frozen=True)
class Row:
    """At one concurrency, over all rounds. Times in milliseconds, of a request from its entry to
    its end; processor time in seconds per 1000 requests, of this process and of the owner's."""

    concurrency: int
    open_p50_ms: float
    owner_p50_ms: float
    owner_p99_ms: float
    open_cpu_s: float
    owner_cpu_s: float
    actor_cpu_s: float
    messages_per_exchange: float

    @property
    def added_ms(self) -> float:
        return self.owner_p50_ms - self.open_p50_ms


@dataclass
class Sample:
    """Seconds of each request, and processor time of this process and of the owner's."""

    seconds: list[float]
    here_s: float
    there_s: float

    def __add__(self, other: Sample) -> Sample:
        return Sample(
            self.seconds + other.seconds,
            self.here_s + other.here_s,
            self.there_s + other.there_s,
        )


async def run(fleet: LocalFleet, admission: Admission, count: int, concurrency: int) -> list[float]:
    """Send `count` requests, so many at a time; the seconds that each took."""
    numbers = iter(range(count))
    seconds: list[float] = []
    terms = Terms(name="bench")

    async def one_client() -> None:
        for number in numbers:
            request = make_request("x" * 64, name=f"{number}-{time.monotonic_ns()}", max_tokens=1)
            started = time.perf_counter()
            await admission.enter(
                entry(
                    request.request_id,
                    terms,
                    [request],
                    reserved_output=1.0,
                    page_tokens=1,
                    seconds_left=60.0,
                )
            )
            async for _ in fleet.fleet.generate(request):
                pass
            seconds.append(time.perf_counter() - started)

    await asyncio.gather(*(one_client() for _ in range(concurrency)))
    return seconds


async def actor_cpu_s(channel: OwnerChannel) -> float:
    """Processor time of the owner's process since it started."""
    handle: Any = channel._handle
    return float(await handle.__ray_call__.remote(lambda owner: time.process_time()))


async def measure(arguments: argparse.Namespace) -> list[Row]:
    rows = []
    counts: Counter[str] = Counter()
    channel = OwnerChannel("bench", OwnerSettings(places={POOL: PLACES}))
    options = EchoOptions(ttft_s=TTFT_S, max_running=PLACES)
    async with (
        echo_fleet(REPLICAS, options) as open_fleet,
        echo_fleet(REPLICAS, options, admission=OpenAdmission()) as fleet,
    ):
        client = AdmissionClient(
            channel,
            "bench",
            lambda: Seen(statuses=tuple((r.status(), 0.0) for r in fleet.replicas.values())),
            count=lambda name, amount: counts.update({name: amount}),
        )
        fleet.fleet._admission = client
        talking = asyncio.create_task(client.run())
        await run(fleet, client, 50, 4)  # warm-up; the owner starts
        for concurrency in arguments.concurrency:
            samples = {name: Sample([], 0.0, 0.0) for name in ("open", "owner")}
            counts.clear()
            for _ in range(arguments.rounds):
                for name, target, admission in (
                    ("open", open_fleet, OpenAdmission()),
                    ("owner", fleet, client),
                ):
                    before, there = time.process_time(), await actor_cpu_s(channel)
                    seconds = await run(target, admission, arguments.requests, concurrency)
                    spent = time.process_time() - before
                    samples[name] += Sample(seconds, spent, await actor_cpu_s(channel) - there)
            rows.append(to_row(concurrency, samples["open"], samples["owner"], counts))
            show(rows[-1])
        talking.cancel()
    return rows


def to_row(concurrency: int, free: Sample, owned: Sample, counts: Counter[str]) -> Row:
    thousands = len(free.seconds) / 1000
    ordered = sorted(owned.seconds)
    exchanges = counts["intserve_admission_exchanges_total"]
    return Row(
        concurrency=concurrency,
        open_p50_ms=statistics.median(free.seconds) * 1e3,
        owner_p50_ms=statistics.median(ordered) * 1e3,
        owner_p99_ms=ordered[int(0.99 * len(ordered))] * 1e3,
        open_cpu_s=free.here_s / thousands,
        owner_cpu_s=owned.here_s / thousands,
        actor_cpu_s=owned.there_s / thousands,
        messages_per_exchange=counts["intserve_admission_messages_total"] / exchanges,
    )


def show(row: Row) -> None:
    print(
        f"c={row.concurrency:<3d}  request p50 {row.open_p50_ms:6.2f} ms open, "
        f"{row.owner_p50_ms:6.2f} with the owner (p99 {row.owner_p99_ms:6.2f}): "
        f"+{row.added_ms:5.2f} ms   CPU s per 1000: {row.open_cpu_s:.2f} open, "
        f"{row.owner_cpu_s:.2f} with the owner and {row.actor_cpu_s:.2f} in it   "
        f"{row.messages_per_exchange:5.2f} messages per exchange",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--requests", type=int, default=500, help="of each kind in each round")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32, 128])
    arguments = parser.parse_args()
    with connect(num_cpus=2):
        rows = asyncio.run(measure(arguments))
    if arguments.json:
        report = {
            "cpus": os.cpu_count(),
            "load_average": os.getloadavg(),
            "rows": [asdict(row) for row in rows],
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
