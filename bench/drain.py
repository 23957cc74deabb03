"""How the service ends: streams and a signal, an engine that hangs; with both of Serve's proxies.

    python bench/drain.py [--proxy python] [--proxy haproxy] [--max-step-s 5] [--json FILE]

Drain: nine streams of the echo engine and one unstreamed answer are under way when the foreground
command gets SIGTERM. How many finish, what does a newcomer get, and after how many seconds is the
process gone? Hang: the engine stops doing steps, the whole process is stopped (SIGSTOP), or native
code keeps Python's lock, each in the middle of a stream. After how many seconds is the client told,
does /health say 503, and is the next request answered again? A hang cannot be told before
`--max-step-s`. Prints one Markdown table each; exit code 1 when a stream is lost or nothing comes
back.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from support.configs import make_config
from support.ports import free_port

from deepseek.cli import make_app, run
from serve_app.config import EchoOptions
from serve_app.engines.echo import EchoEngine
from serve_app.engines.protocol import Event, GenerateRequest, Tokens
from serve_app.engines.stall import StallClock

ROOT = Path(__file__).resolve().parent.parent
NUM_STREAMS = 9
KINDS = ("no step", "SIGSTOP", "lock held")
#: Seconds after which something counts as never.
NEVER_S = 120.0

app = make_app(__doc__ or "")


@dataclass(frozen=True)
class Drained:
    """The end of one foreground command."""

    proxy: str
    finished: int
    unstreamed_status: int | str
    newcomer: str
    exit_code: int
    seconds: float


@dataclass(frozen=True)
class Hung:
    """One hang; seconds after the last sign of life."""

    proxy: str
    kind: str
    told_s: float
    code: str
    unhealthy_s: float
    serving_s: float


class HangingEngine(EchoEngine):
    """An echo that hangs in the way that the prompt names."""

    def __init__(self, options: EchoOptions) -> None:
        super().__init__(options)
        self._stall = StallClock()

    def stalled_s(self) -> float:
        return self._stall.stalled_s()

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Event]:
        kind = bytes(request.prompt_ids).decode()
        if kind in KINDS:
            yield Tokens((1,), "x")
            await asyncio.sleep(0.5)
            self._stall.submitted()
            if kind == "SIGSTOP":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif kind == "lock held":
                ctypes.PyDLL(None).sleep(1000)
            await asyncio.Event().wait()
        async for event in super().generate(request):
            yield event


@app.command()
def main(
    proxy: Annotated[list[str] | None, typer.Option(help="python, haproxy [both].")] = None,
    max_step_s: Annotated[float, typer.Option(help="The engine's limit of one step.")] = 5.0,
    report: Annotated[Path | None, typer.Option("--json", help="Also write it here.")] = None,
) -> None:
    """See the module's docstring."""
    proxies = proxy or ["python", "haproxy"]
    drains = [measure_drain(name) for name in proxies]
    typer.echo("| proxy | streams that finished | unstreamed | newcomer | exit code | seconds |")
    typer.echo("|---|---:|---|---|---:|---:|")
    for end in drains:
        typer.echo(
            f"| {end.proxy} | {end.finished} of {NUM_STREAMS} | {end.unstreamed_status} "
            f"| {end.newcomer} | {end.exit_code} | {end.seconds:.1f} |"
        )
    hangs = [hang for name in proxies for hang in measure_hangs(name, max_step_s)]
    typer.echo(f"\n| proxy | hang (a step may take {max_step_s:g} s) | client told, s | as "
               "| /health 503, s | serving again, s |")  # fmt: skip
    typer.echo("|---|---|---:|---|---:|---:|")
    for hang in hangs:
        typer.echo(
            f"| {hang.proxy} | {hang.kind} | {hang.told_s:.1f} | {hang.code} "
            f"| {hang.unhealthy_s:.1f} | {hang.serving_s:.1f} |"
        )
    if report is not None:
        rows = {"drains": [asdict(d) for d in drains], "hangs": [asdict(h) for h in hangs]}
        report.write_text(json.dumps(rows, indent=2) + "\n")
    lost = any(end.finished < NUM_STREAMS or end.exit_code for end in drains)
    if lost or any(hang.serving_s >= NEVER_S for hang in hangs):
        raise typer.Exit(1)


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}


def measure_drain(proxy: str) -> Drained:
    """Start the foreground command, open the streams, send SIGTERM."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "serve.yaml"
        settings.write_text(
            f"http: {{port: {port}, proxy: {proxy}}}\n"
            "pools: {default: {engine: {kind: echo, itl_s: 0.03}}}\n"
        )
        command = [sys.executable, "-m", "serve_app", "--config", str(settings)]
        with subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            return asyncio.run(_drain(proxy, process, f"http://127.0.0.1:{port}"))


async def _drain(proxy: str, process: subprocess.Popen[str], url: str) -> Drained:
    body: dict[str, Any] = {"model": "echo", "prompt": "abc", "max_tokens": 200}
    body |= {"ignore_eos": True}
    started = [asyncio.Event() for _ in range(NUM_STREAMS)]

    async def read(client: httpx.AsyncClient, number: int) -> bool:
        text = ""
        try:
            fields = body | {"stream": True}
            async with client.stream("POST", f"{url}/v1/completions", json=fields) as answer:
                async for chunk in answer.aiter_text():
                    text += chunk
                    started[number].set()
        except httpx.HTTPError:
            started[number].set()
        return "data: [DONE]" in text

    async with httpx.AsyncClient(timeout=120) as client:
        whole = asyncio.create_task(client.post(f"{url}/v1/completions", json=body))
        streams = [asyncio.create_task(read(client, number)) for number in range(NUM_STREAMS)]
        for event in started:
            await event.wait()
        signalled = time.monotonic()
        process.send_signal(signal.SIGTERM)
        await asyncio.sleep(1.0)
        newcomer = await status(client.post(f"{url}/v1/completions", json=body))
        finished = sum(await asyncio.gather(*streams))
        unstreamed = await status(whole)
        code = await asyncio.to_thread(process.wait)
    seconds = time.monotonic() - signalled
    return Drained(proxy, finished, unstreamed, newcomer, code, seconds)


async def status(answer: Any) -> str:
    """The status of an answer, with the code and the wait of a refusal; else what went wrong."""
    try:
        response = await answer
    except httpx.HTTPError as error:
        return type(error).__name__
    if response.status_code == 200:
        return "200"
    wait = response.headers.get("retry-after")
    return f"{response.status_code} {response.json()['error']['code']}, Retry-After {wait}"


def measure_hangs(proxy: str, max_step_s: float) -> list[Hung]:
    """All kinds of hang on one Serve. The proxy is chosen when Ray starts: each has a process."""
    command = [sys.executable, __file__, "hangs", proxy, str(max_step_s)]
    done = subprocess.run(command, env=environment(), stdout=subprocess.PIPE, text=True, check=True)
    return [Hung(**row) for row in json.loads(done.stdout.splitlines()[-1])]


@contextmanager
def hanging_service(proxy: str, max_step_s: float) -> Iterator[str]:
    from serve_app.local import serve_running

    port = free_port()
    config = make_config(
        echo=EchoOptions(), port=port, proxy=proxy, max_step_s=max_step_s, drain_s=5.0
    )
    options = config.pool.engine
    with serve_running(config, num_cpus=4):
        from ray import cloudpickle, serve

        from serve_app.app import build_with

        cloudpickle.register_pickle_by_value(sys.modules[__name__])
        serve.run(build_with(config, lambda: HangingEngine(options)), name="hangs")
        yield f"http://127.0.0.1:{port}"


def hangs(proxy: str, max_step_s: float) -> None:
    """Measure every kind of hang, and print the rows as JSON."""
    with hanging_service(proxy, max_step_s) as url:
        rows = [asdict(hang(url, proxy, kind)) for kind in KINDS]
    print(json.dumps(rows))


def hang(url: str, proxy: str, kind: str) -> Hung:
    """Hang in this way, and watch from outside until requests are answered again."""
    told: list[tuple[float, str]] = []
    alive = threading.Event()
    times = {"last": 0.0}

    def read() -> None:
        body = {"model": "echo", "prompt": kind, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=NEVER_S) as answer:
            for line in answer.iter_lines():
                if '"text":"x"' in line:
                    times["last"] = time.monotonic()
                    alive.set()
                elif line:
                    said = json.loads(line.removeprefix("data: "))
                    told.append((time.monotonic(), str(said.get("error", {}).get("code"))))

    reader = threading.Thread(target=read)
    reader.start()
    alive.wait(NEVER_S)
    unhealthy_s = NEVER_S
    while reader.is_alive() or unhealthy_s == NEVER_S:
        if unhealthy_s == NEVER_S and healthy(url) != 200:
            unhealthy_s = time.monotonic() - times["last"]
        time.sleep(0.1)
    while answers(url) != 200 and time.monotonic() - times["last"] < NEVER_S:
        time.sleep(0.1)
    serving_s = time.monotonic() - times["last"]
    while healthy(url) != 200:
        time.sleep(0.1)
    moment, code = told[0]
    return Hung(proxy, kind, moment - times["last"], code, unhealthy_s, serving_s)


def healthy(url: str) -> int:
    return httpx.get(f"{url}/health", timeout=30).status_code


def answers(url: str) -> int:
    body = {"model": "echo", "prompt": "again"}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=NEVER_S).status_code


if __name__ == "__main__":
    if sys.argv[1:2] == ["hangs"]:
        hangs(sys.argv[2], float(sys.argv[3]))
    else:
        run(app)
