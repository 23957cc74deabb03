"""What it costs to have an engine in a process of its own.

    python bench/engine_process.py [--rounds 7] [--concurrency 1 16] [--tokens 64]

The embedded engine answers twice: in this process, as the embedded adapter runs it, and in a
worker's process, behind the boundary that TensorRT-LLM and vLLM have (serve_app/engines/remote,
serve_app/engines/worker): frames on a Unix socket, token ids only, and all text made in this
process. Both have one thread to compute with, the same requests, and the machine to themselves in
turn: a round is one measurement of each, in changing order. Clients are tasks of this process, and
there is no HTTP. As many clients as the concurrency says begin at once, and each asks again as soon
as it is answered. The example model is small, so a step takes about a millisecond or two and the
boundary shows as much as it ever can. Figures are medians over the rounds; CPU is that of all
processes, the clients included. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.behind_worker import behind_worker
from support.engines import make_engine
from support.processes import cpu_seconds, tree

from deepseek.engine.request import SamplingParams
from serve_app.engine_sections import EmbeddedOptions
from serve_app.engines.embedded import EmbeddedEngine
from serve_app.engines.protocol import Done, Engine, GenerateRequest, Tokens

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "examples" / "tiny-deepseek-v3"
MAX_MODEL_LEN, BATCH, PROMPT_TOKENS, VOCABULARY = 1024, 32, 64, 2000
IN_PROCESS, BEHIND = "in this process", "in a worker's process"


@dataclass(frozen=True)
class Sample:
    """One round of one engine; times in milliseconds."""

    ttft_p50_ms: float
    ttft_p99_ms: float
    tokens_per_s: float
    cpu_ms_per_token: float


async def ask(engine: Engine, name: str, prompt: tuple[int, ...], tokens: int) -> tuple[float, int]:
    """Seconds to the first token, and tokens, of one request."""
    sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
    request = GenerateRequest(request_id=name, prompt_ids=prompt, sampling=sampling)
    started, first, count = time.perf_counter(), None, 0
    async for event in engine.generate(request):
        if isinstance(event, Tokens):
            first = first or time.perf_counter() - started
            count += len(event.token_ids)
        elif isinstance(event, Done) and event.reason != "length":
            raise SystemExit(f"bench: a request ended with {event.reason}: {event.error}")
    if first is None or count != tokens:
        raise SystemExit(f"bench: {count} tokens of {tokens}")
    return first, count


async def measure(engine: Engine, seed: int, clients: int, requests: int, tokens: int) -> Sample:
    """Each of the clients asks `requests` times; prompts follow from the seed."""
    dice = random.Random(seed)
    prompts = [
        [
            tuple(dice.randrange(5, VOCABULARY) for _ in range(PROMPT_TOKENS))
            for _ in range(requests)
        ]
        for _ in range(clients)
    ]

    async def client(number: int) -> list[tuple[float, int]]:
        return [
            await ask(engine, f"{seed}-{number}-{index}", prompt, tokens)
            for index, prompt in enumerate(prompts[number])
        ]

    pids = tree(os.getpid())
    cpu, started = cpu_seconds(pids), time.perf_counter()
    rows = [row for rows in await asyncio.gather(*map(client, range(clients))) for row in rows]
    taken, cpu = time.perf_counter() - started, cpu_seconds(pids) - cpu
    first = sorted(row[0] for row in rows)
    total = sum(row[1] for row in rows)
    return Sample(
        statistics.median(first) * 1e3,
        first[min(len(first) - 1, int(0.99 * len(first)))] * 1e3,
        total / taken,
        cpu / total * 1e3,
    )


async def compare(
    directory: Path, concurrency: list[int], rounds: int, requests: int, tokens: int
) -> dict[int, dict[str, list[Sample]]]:
    """The samples of both, by concurrency; both are loaded from the beginning to the end."""
    settings: dict[str, Any] = {"max_batch_size": BATCH, "num_threads": 1, "kv_cache": "bf16"}
    engines: dict[str, Engine] = {
        IN_PROCESS: EmbeddedEngine(
            EmbeddedOptions(directory=directory, max_model_len=MAX_MODEL_LEN, **settings)
        ),
        BEHIND: behind_worker(directory, max_model_len=MAX_MODEL_LEN, **settings),
    }
    found: dict[int, dict[str, list[Sample]]] = {
        n: {IN_PROCESS: [], BEHIND: []} for n in concurrency
    }
    try:
        for engine in engines.values():
            await engine.start()
        for number, engine in enumerate(engines.values()):
            await measure(engine, -1 - number, max(concurrency), 1, 8)  # warm-up
        for index in range(rounds):
            order = sorted(engines, reverse=bool(index % 2))
            for clients in concurrency:
                for name in order:
                    sample = await measure(
                        engines[name], 1000 * clients + index, clients, requests, tokens
                    )
                    found[clients][name].append(sample)
    finally:
        for engine in engines.values():
            await engine.shutdown()
    return found


def table(found: dict[int, dict[str, list[Sample]]]) -> str:
    lines = [
        "| concurrency | engine | TTFT p50 ms | TTFT p99 ms | tokens/s | spread of tokens/s "
        "| CPU ms a token |",
        "|---|---|---|---|---|---|---|",
    ]
    for clients, by_engine in found.items():
        for name, samples in by_engine.items():
            rates = [sample.tokens_per_s for sample in samples]
            lines.append(
                f"| {clients} | {name} "
                f"| {statistics.median(s.ttft_p50_ms for s in samples):.1f} "
                f"| {statistics.median(s.ttft_p99_ms for s in samples):.1f} "
                f"| {statistics.median(rates):.0f} | {min(rates):.0f} to {max(rates):.0f} "
                f"| {statistics.median(s.cpu_ms_per_token for s in samples):.2f} |"
            )
    return "\n".join(lines)


def verdict(found: dict[int, dict[str, list[Sample]]]) -> str:
    """The difference at each concurrency, in one line each."""
    lines = []
    for clients, by_engine in found.items():
        first, rate = (
            {name: statistics.median(pick(s) for s in rows) for name, rows in by_engine.items()}
            for pick in (lambda s: s.ttft_p50_ms, lambda s: s.tokens_per_s)
        )
        lines.append(
            f"At concurrency {clients} the boundary adds "
            f"{first[BEHIND] - first[IN_PROCESS]:+.1f} ms to the TTFT's median and makes "
            f"{rate[BEHIND] / rate[IN_PROCESS]:.2f} x the tokens/s."
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--engine", type=Path, help="an embedded engine; default: int8 of the example"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--requests", type=int, default=4, help="of each client and round")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = given.engine or make_engine(MODEL, "int8", Path(folder))
        found = asyncio.run(
            compare(directory, given.concurrency, given.rounds, given.requests, given.tokens)
        )
    print(table(found))
    print()
    print(verdict(found))


if __name__ == "__main__":
    main()
