"""The served path against the engine alone and against llama.cpp's own server, in one run.

    python bench/served_decode.py [--rounds 5] [--concurrency 1 --concurrency 4 --concurrency 16]
        [--recipe int8] [--gguf q8_0] [--only REGEX] [--threads N] [--flushes N]
        [--save FILE.json]

All run the 706 M-parameter model "ds3" (bench/decoding/ds3.py) with the same number of threads:

    engine        LLMEngine in a process of its own: a closed loop without text or HTTP
    ours          `python -m serve_app`: HAProxy, two ingress replicas, admission with API keys, one
                  engine replica
    llama-server  of the same build as in bench/peers_decode.py, `--parallel` the largest
                  concurrency, one buffer for all contexts

One client program asks both servers for streamed completions of token ids: as many clients as the
concurrency says, each asks again as soon as it is answered. Every prompt is new to every cache. All
servers are up all the time and take turns; who has no turn idles. Tokens per second hold the whole
load, prefill included; figures are medians over the rounds. CPU is that of the processes of a
stack per token, by what they are, and the client's own: client and server share the cores.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer
from support.load import Outcome, complete
from support.ports import free_port
from support.processes import cpu_by_part

from bench.decoding import ds3, llama, rounds
from bench.decoding.report import table
from bench.decoding.workers import Worker
from bench.stacks.service import KEYS, service
from deepseek.cli import make_app, make_progress, run
from deepseek.errors import IntServeError

PROMPT, ANSWER = 128, 128
#: Requests of each client and round, by concurrency; the next larger one's where there is none.
REQUESTS = {1: 3, 4: 2, 16: 2}
#: What a process of ours is, by words of its title; the first that fits.
PARTS = (
    ("replica", ("ServeReplica:intserve:engine",)),
    ("ingress", ("ServeReplica:intserve:ingress",)),
    ("HAProxy", ("haproxy",)),
    ("admission", ("AdmissionActor",)),
)
OTHERS = "Ray and Serve"
#: This process, which asks.
CLIENT = "the client"
ENGINE, OURS, LLAMA = "engine", "ours", "llama-server"
app = make_app(__doc__ or "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One load: tokens per second, median seconds to the first token and between two pieces of a
    stream (None without a client), CPU milliseconds per token by part."""

    contender: str
    concurrency: int
    tokens_per_s: float
    ttft_s: float | None
    gap_s: float | None
    cpu_ms: dict[str, float]


#: Runs the prompts at a concurrency: seconds, and the outcomes where there is a client.
Load = Callable[[list[list[int]], int], tuple[float, list[Outcome]]]


@dataclass(frozen=True, slots=True)
class Stack:
    """A contender that is up. `pid` is the process that all others of it descend from."""

    name: str
    pid: int
    load: Load

    def cpu_seconds(self) -> dict[str, float]:
        """CPU seconds by part so far; a stack that is not ours is one part."""
        if self.name == OURS:
            return cpu_by_part(self.pid, PARTS, OTHERS)
        return cpu_by_part(self.pid, (), "whole")


@app.command(no_args_is_help=False)
def main(
    num_rounds: Annotated[int, typer.Option("--rounds", min=1)] = 5,
    concurrency: Annotated[list[int] | None, typer.Option(min=1, help="Default: 1, 4, 16.")] = None,
    recipe: Annotated[str, typer.Option(help="Of our engine.")] = "int8",
    kind: Annotated[str, typer.Option("--gguf", help="Of llama-server's file.")] = "q8_0",
    only: Annotated[str, typer.Option(help="Regular expression: contenders that run.")] = "",
    threads: Annotated[int | None, typer.Option(min=1, help="Default: one per core.")] = None,
    flushes: Annotated[
        float | None, typer.Option(help="Messages a second of our replica; default: as configured.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write all samples as JSON here.")] = None,
    ds3_cache: Annotated[Path, typer.Option("--ds3", help="Where the model is kept.")] = ds3.CACHE,
    llama_cache: Annotated[Path, typer.Option("--llama", help="Where llama.cpp is.")] = llama.CACHE,
    jobs: Annotated[int | None, typer.Option(min=1, help="Compilers at once.")] = None,
) -> None:
    """See the module's docstring."""
    if kind not in llama.TYPES:
        raise IntServeError(f"--gguf {kind} is none of {', '.join(llama.TYPES)}")
    threads = threads or len(os.sched_getaffinity(0))
    levels = concurrency or [1, 4, 16]
    engine = ds3.engine(recipe, ds3_cache)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        makers = {
            ENGINE: lambda: alone(engine, folder, threads, max(levels)),
            OURS: lambda: served(engine, folder, threads, max(levels), flushes),
            LLAMA: lambda: llama_server(
                kind, folder, threads, max(levels), ds3_cache, llama_cache, jobs
            ),
        }
        stacks = [
            stack.enter_context(make()) for name, make in makers.items() if re.search(only, name)
        ]
        if not stacks:
            raise IntServeError(f"--only {only!r} leaves none of {', '.join(makers)}")
        samples = measure(stacks, levels, num_rounds)
    print(f"ds3, ours {recipe}, llama.cpp {kind}, {threads} threads, {PROMPT} + {ANSWER} tokens\n")
    print(f"{rates(samples, levels)}\n\n{costs(samples, max(levels))}")
    if save is not None:
        save.write_text(json.dumps([asdict(sample) for sample in samples], indent=1) + "\n")


def measure(stacks: list[Stack], levels: list[int], num_rounds: int) -> list[Sample]:
    """One unmeasured round warms up."""
    samples = []
    with make_progress() as progress:
        task = progress.add_task("", total=(num_rounds + 1) * len(levels) * len(stacks))
        for number in range(num_rounds + 1):
            for level in levels:
                order = stacks[number % len(stacks) :] + stacks[: number % len(stacks)]
                for stack in order:
                    progress.update(task, description=f"{stack.name}, {level} clients")
                    sample = measure_one(stack, level, seed=100 * number + level)
                    if number:
                        samples.append(sample)
                    progress.advance(task)
    return samples


def measure_one(stack: Stack, concurrency: int, seed: int) -> Sample:
    known = next((level for level in sorted(REQUESTS) if level >= concurrency), max(REQUESTS))
    requests = concurrency * REQUESTS[known]
    prompts = rounds.prompts(requests, PROMPT, ds3.DS3.vocab_size, seed=seed)
    before, client_s = stack.cpu_seconds(), time.process_time()
    seconds, outcomes = stack.load(prompts, concurrency)
    client_s = time.process_time() - client_s
    tokens = requests * ANSWER
    cpu = {
        part: 1e3 * (used - before.get(part, 0.0)) / tokens
        for part, used in stack.cpu_seconds().items()
    }
    if outcomes:
        cpu[CLIENT] = 1e3 * client_s / tokens
    firsts = [outcome.first_s for outcome in outcomes if outcome.first_s is not None]
    gaps = [end - begin for o in outcomes for begin, end in pairwise(o.arrivals)]
    return Sample(
        contender=stack.name,
        concurrency=concurrency,
        tokens_per_s=tokens / seconds,
        ttft_s=statistics.median(firsts) if firsts else None,
        gap_s=statistics.median(gaps) if gaps else None,
        cpu_ms=cpu,
    )


# --- contenders ---


@contextmanager
def alone(engine: Path, folder: Path, threads: int, batch: int) -> Iterator[Stack]:
    environment = {"PYTHONPATH": f"{ds3.ROOT}:{ds3.ROOT / 'tests'}"}
    command = [sys.executable, "-m", "bench.decoding.alone_worker"]
    with Worker(command, folder / "engine.log", environment, threads=threads) as worker:
        worker.ask(
            "open", directory=str(engine), threads=threads, batch=batch, tokens=PROMPT + ANSWER
        )

        def load(prompts: list[list[int]], concurrency: int) -> tuple[float, list[Outcome]]:
            return worker.ask("load", prompts=prompts, concurrency=concurrency, tokens=ANSWER), []

        yield Stack(ENGINE, worker.pid, load)


@contextmanager
def served(
    engine: Path, folder: Path, threads: int, batch: int, flushes: float | None
) -> Iterator[Stack]:
    settings: dict[str, object] = {
        "engine": engine,
        "allow_ungated": True,
        "model_name": "ds3",
        "num_threads": threads,
        "max_batch_size": batch,
        "max_batched_tokens": 512,
        "max_model_len": PROMPT + ANSWER,
        "kv_tokens": batch * (PROMPT + ANSWER + 64),
        "max_ongoing_requests": batch,
    }
    if flushes is not None:
        settings["replica_limits"] = {"max_flushes_per_s": flushes}
    with service(folder, **settings) as running:
        yield Stack(OURS, running.pid, http_load(running.url, {"model": "ds3"}, KEYS[0]))


@contextmanager
def llama_server(
    kind: str, folder: Path, threads: int, batch: int, models: Path, cache: Path, jobs: int | None
) -> Iterator[Stack]:
    """`--parallel` slots, each with the context of one request."""
    program = llama.llama_cpp(cache, jobs)
    file = llama.gguf(program, kind, ds3.checkpoint(models), cache)
    port = free_port()
    context = batch * (PROMPT + ANSWER + 64)
    command = [
        *(program.server, "--model", file, "--host", "127.0.0.1", "--port", port),
        *("--parallel", batch, "--ctx-size", context, "--threads", threads),
        *("--batch-size", 512, "--flash-attn", "on", "--kv-unified", "--no-webui"),
        *("--threads-http", 2, "--cache-ram", 0),
    ]
    with (folder / "llama-server.log").open("wb") as log:
        process = subprocess.Popen([str(word) for word in command], stdout=log, stderr=log)
    try:
        _await_health(port, process, folder / "llama-server.log")
        url = f"http://127.0.0.1:{port}"
        yield Stack(LLAMA, process.pid, http_load(url, {"cache_prompt": False}, None))
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_health(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.2)
    raise IntServeError(f"llama-server did not start: {log.read_text(errors='replace')[-2000:]}")


# --- the client ---


def http_load(url: str, extra: dict[str, object], key: str | None) -> Load:
    def load(prompts: list[list[int]], concurrency: int) -> tuple[float, list[Outcome]]:
        return asyncio.run(ask_all(url, prompts, concurrency, extra, key))

    return load


async def ask_all(
    url: str, prompts: list[list[int]], concurrency: int, extra: dict[str, object], key: str | None
) -> tuple[float, list[Outcome]]:
    """Seconds until all are answered.

    Raises:
        IntServeError: an answer is not whole.
    """
    waiting = list(prompts)
    outcomes: list[Outcome] = []

    async def client() -> None:
        while waiting:
            body = {
                "prompt": waiting.pop(0),
                "max_tokens": ANSWER,
                "temperature": 0,
                "ignore_eos": True,
                "stream_options": {"include_usage": True},
                **extra,
            }
            outcomes.append(await complete(url, body, key=key))

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    seconds = time.perf_counter() - started
    for outcome in outcomes:
        if not outcome.complete or outcome.tokens != ANSWER:
            raise IntServeError(
                f"{url}: {outcome.status}, {outcome.tokens} tokens, {outcome.finish_reason}, "
                f"{outcome.error}"
            )
    return seconds, outcomes


# --- tables ---


def rates(samples: list[Sample], levels: list[int]) -> str:
    """Tokens per second by contender and concurrency, and the ratios to the engine's."""
    rows = []
    for name in _names(samples):
        cells = []
        for level in levels:
            own = _of(samples, name, level)
            rate = statistics.median(sample.tokens_per_s for sample in own)
            engine = [sample.tokens_per_s for sample in _of(samples, ENGINE, level)]
            share = f", {rate / statistics.median(engine):.0%}" if engine else ""
            firsts = [sample.ttft_s for sample in own if sample.ttft_s is not None]
            first = f", {1e3 * statistics.median(firsts):.0f} ms" if firsts else ""
            gaps = [sample.gap_s for sample in own if sample.gap_s is not None]
            gap = f", {1e3 * statistics.median(gaps):.0f} ms" if gaps else ""
            cells.append(f"{rate:,.1f}{share}{first}{gap}")
        rows.append([name, *cells])
    heads = [f"{level} client{'s' if level > 1 else ''}" for level in levels]
    return table(["tokens/s, of the engine's, TTFT p50, between pieces p50", *heads], rows)


def costs(samples: list[Sample], level: int) -> str:
    """CPU milliseconds per token by part of the stack, at one concurrency."""
    rows = []
    for name in _names(samples):
        own = _of(samples, name, level)
        parts = dict.fromkeys(part for sample in own for part in sample.cpu_ms)
        for part in parts:
            used = statistics.median(sample.cpu_ms.get(part, 0.0) for sample in own)
            rows.append([f"{name}: {part}", f"{used:.2f}"])
    return table([f"{level} clients", "CPU ms a token"], rows)


def _names(samples: list[Sample]) -> list[str]:
    present = {sample.contender for sample in samples}
    return [name for name in (ENGINE, OURS, LLAMA) if name in present]


def _of(samples: list[Sample], name: str, level: int) -> list[Sample]:
    return [s for s in samples if s.contender == name and s.concurrency == level]


if __name__ == "__main__":
    run(app)
