"""Faults of a running service: what is killed, stopped or sent, and what the clients see of it.

    python bench/fleet_faults.py [--rounds 20] [--only NAME ...] [--json FILE]

Each fault runs under streams of several clients whose every answer is known beforehand: the echo
engine's is the prompt over and over, the embedded engine's is that of an undisturbed run (greedy,
and seeded). A token too many or too few is counted. `resumed` is what the service counts itself;
recovery is until all replicas are back, the longest silence is between two pieces of one stream.
One Markdown row a fault. Exit code 1 where a stream is lost that is promised to survive.
"""

from __future__ import annotations

import argparse
import asyncio
import difflib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
from support.configs import nest
from support.deployed import Deployed
from support.engines import make_engine
from support.load import Outcome, complete
from support.processes import memory_mb, title
from support.serving import metric

from bench.stacks.service import KEYS, Running, service
from serve_app.engine_sections import EchoOptions

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "tiny-deepseek-v3"
CLIENTS, TOKENS = 12, 100
ECHO = EchoOptions(ttft_s=0.02, itl_s=0.01)
#: Seconds after which a replica counts as gone for good.
NEVER_S = 90.0


@dataclass
class Fault:
    """One row. `promised` says that every started stream must complete."""

    name: str
    rounds: int
    requests: int = 0
    complete: int = 0
    resumed: int = 0
    duplicated: int = 0
    missing: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    recovery_s: list[float] = field(default_factory=list)
    silence_s: float = 0.0
    note: str = ""
    promised: bool = True

    @property
    def broken(self) -> bool:
        lost = self.promised and self.complete < self.requests
        return lost or bool(self.duplicated or self.missing)


@dataclass(frozen=True)
class Question:
    """A request and the whole of its right answer."""

    body: dict[str, Any]
    expected: str


def echo_question(draw: random.Random) -> Question:
    prompt = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=37))
    body = {"model": "echo", "prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True}
    return Question(body, (prompt * (TOKENS // len(prompt) + 1))[:TOKENS])


class Load:
    """Clients that ask one question after the other until they are told to stop."""

    def __init__(
        self, url: str, ask: Callable[[random.Random], Question], clients: int = CLIENTS
    ) -> None:
        self.outcomes: list[tuple[Question, Outcome]] = []
        self._url, self._ask, self._clients = url, ask, clients
        self._stopping = False

    async def run(self, disturb: Callable[[], Awaitable[None]]) -> None:
        """Ask while `disturb` works, then let what is open end."""
        clients = [asyncio.create_task(self._client(index)) for index in range(self._clients)]
        try:
            await disturb()
        finally:
            self._stopping = True
            await asyncio.gather(*clients)

    async def _client(self, index: int) -> None:
        draw = random.Random(index)
        while not self._stopping:
            question = self._ask(draw)
            key = KEYS[index % len(KEYS)]
            outcome = await complete(self._url, question.body, key=key)
            self.outcomes.append((question, outcome))
            if not outcome.complete:
                await asyncio.sleep(outcome.retry_after_s or 0.2)

    def fill(self, fault: Fault) -> None:
        """Add what the clients saw to the row."""
        for question, outcome in self.outcomes:
            fault.requests += 1
            whole = outcome.complete and outcome.text == question.expected
            fault.complete += whole
            if outcome.complete and not whole:
                _count_differences(question.expected, outcome.text, fault)
            code = (outcome.error or {}).get("code") or ("cut" if outcome.cut else "")
            label = f"{outcome.status} {code}".strip()
            fault.statuses[label] = fault.statuses.get(label, 0) + 1
            gaps = [b - a for a, b in zip(outcome.arrivals, outcome.arrivals[1:], strict=False)]
            fault.silence_s = max([fault.silence_s, *gaps])


def _count_differences(expected: str, text: str, fault: Fault) -> None:
    matcher = difflib.SequenceMatcher(None, expected, text, autojunk=False)
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind in ("replace", "delete"):
            fault.missing += b - a
        if kind in ("replace", "insert"):
            fault.duplicated += d - c


def read_metrics(url: str) -> str:
    with suppress(httpx.HTTPError):
        headers = {"authorization": f"Bearer {KEYS[0]}"}
        return httpx.get(f"{url}/metrics", headers=headers, timeout=10).text
    return ""


def resumed(url: str) -> int:
    return int(metric(read_metrics(url), "intserve_resumes_total", outcome="resumed"))


def is_idle(url: str) -> bool:
    """Whether no engine holds a KV token or a request."""
    text = read_metrics(url)
    names = ("kv_tokens_used", "requests_running", "requests_waiting")
    return bool(text) and not any(metric(text, f"intserve_engine_{n}") for n in names)


def replicas_ready(url: str) -> int:
    try:
        headers = {"authorization": f"Bearer {KEYS[0]}"}
        answer = httpx.get(f"{url}/health", headers=headers, timeout=5)
        return int(answer.json().get("engine_replicas", 0)) if answer.status_code == 200 else 0
    except (httpx.HTTPError, ValueError):
        return 0


def engines_made(running: Running) -> list[int]:
    """The processes of engine replicas that have finished their constructors."""
    return [pid for pid in running.replicas("engine-default") if "__init__" not in title(pid)]


def all_back(running: Running, victim: int, replicas: int) -> bool:
    """Whether so many replicas serve, and the victim is none of them. A killed one is in the
    service's own count for as long as its last heartbeat is young."""
    made = engines_made(running)
    return victim not in made and len(made) >= replicas


async def until(condition: Callable[[], bool], limit_s: float = NEVER_S) -> float:
    """Seconds until the condition holds; `limit_s` where it does not come about."""
    began = time.monotonic()
    while time.monotonic() - began < limit_s:
        if await asyncio.to_thread(condition):
            return time.monotonic() - began
        await asyncio.sleep(0.1)
    return limit_s


def run_load(fault: Fault, load: Load, disturb: Callable[[], Awaitable[None]], url: str) -> Fault:
    before = resumed(url)
    asyncio.run(load.run(disturb))
    load.fill(fault)
    fault.resumed = resumed(url) - before
    return fault


def kill_engines(
    fault: Fault, running: Running, ask: Callable[[random.Random], Question], replicas: int
) -> Fault:
    """SIGKILL a replica at a random moment, wait until all are back, `fault.rounds` times."""
    draw = random.Random(7)

    async def disturb() -> None:
        for _ in range(fault.rounds):
            await asyncio.sleep(draw.uniform(0.3, 1.5))
            victim = draw.choice(engines_made(running))
            os.kill(victim, signal.SIGKILL)
            fault.recovery_s.append(await until(lambda v=victim: all_back(running, v, replicas)))

    return run_load(fault, Load(running.url, ask), disturb, running.url)


def engine_killed_in_decode(folder: Path, rounds: int) -> Iterator[Fault]:
    """1: SIGKILL of an engine replica, streams under way."""
    with service(folder, echo=ECHO, replicas=3) as running:
        yield kill_engines(Fault("engine killed, in decode", rounds), running, echo_question, 3)


def engine_killed_in_prefill(folder: Path, rounds: int) -> Iterator[Fault]:
    """1: SIGKILL of an engine replica, requests without a token yet."""
    slow = EchoOptions(ttft_s=1.5, itl_s=0.001)
    with service(folder, echo=slow, replicas=3) as running:
        yield kill_engines(Fault("engine killed, in prefill", rounds), running, echo_question, 3)


def embedded_engine_killed(folder: Path, rounds: int) -> Iterator[Fault]:
    """1: the same with the embedded engine: greedy and seeded answers equal an undisturbed run."""
    engine = make_engine(EXAMPLE, "int8", folder)
    settings: dict[str, Any] = {"engine": engine, "allow_ungated": True, "num_threads": 1}
    with service(folder, **settings, model_name="tiny", replicas=3) as running:
        questions: list[Question] = []
        for index in range(12):
            body = {
                "model": "tiny",
                "prompt": [3 + index, 7, 11 + index, 5],
                "max_tokens": 120,
                "ignore_eos": True,
                "temperature": 0.0 if index % 2 else 0.9,
                "seed": index,
            }
            alone = asyncio.run(complete(running.url, body, key=KEYS[0]))
            if not alone.complete:
                raise SystemExit(f"bench: the undisturbed run failed: {alone}")
            questions.append(Question(body, alone.text))
        fault = Fault("embedded engine killed, greedy and seeded", rounds)
        yield kill_engines(fault, running, lambda draw: draw.choice(questions), 3)


def engine_stopped(folder: Path, rounds: int) -> Iterator[Fault]:
    """SIGSTOP of an engine replica, its streams under way."""
    with service(folder, echo=ECHO, replicas=3) as running:
        fault = Fault("engine stopped (SIGSTOP)", max(1, rounds // 5))

        async def disturb() -> None:
            for _ in range(fault.rounds):
                await asyncio.sleep(1.0)
                victim = random.Random(3).choice(engines_made(running))
                os.kill(victim, signal.SIGSTOP)
                try:
                    fault.recovery_s.append(await until(lambda v=victim: all_back(running, v, 3)))
                finally:
                    with suppress(ProcessLookupError):
                        os.kill(victim, signal.SIGKILL)

        yield run_load(fault, Load(running.url, echo_question), disturb, running.url)


def controller_killed(folder: Path, rounds: int) -> Iterator[Fault]:
    """4: SIGKILL of Serve's controller."""
    with service(folder, echo=ECHO, replicas=2) as running:
        fault = Fault("Serve's controller killed", rounds)

        async def disturb() -> None:
            for _ in range(rounds):
                (victim,) = running.controller()
                os.kill(victim, signal.SIGKILL)
                back = lambda victim=victim: any(p != victim for p in running.controller())  # noqa: E731
                fault.recovery_s.append(await until(back))
                await asyncio.sleep(2.0)

        yield run_load(fault, Load(running.url, echo_question), disturb, running.url)


def ingress_killed(folder: Path, rounds: int) -> Iterator[Fault]:
    """7: SIGKILL of an ingress replica: the documented limit."""
    with service(folder, echo=ECHO, replicas=2) as running:
        fault = Fault("ingress killed", rounds, promised=False)
        draw = random.Random(5)

        async def disturb() -> None:
            for _ in range(rounds):
                await asyncio.sleep(1.0)
                victim = draw.choice(running.replicas("ingress"))
                os.kill(victim, signal.SIGKILL)
                await until(lambda: len(running.replicas("ingress")) < 2, 5.0)
                fault.recovery_s.append(await until(lambda: len(running.replicas("ingress")) >= 2))
                await asyncio.sleep(3.0)

        yield run_load(fault, Load(running.url, echo_question), disturb, running.url)


def owner_killed(folder: Path, rounds: int) -> Iterator[Fault]:
    """SIGKILL of the owner of admission, with requests that wait. Recovery is until a newcomer is
    answered, its time in the queue included."""
    few = ECHO.model_copy(update={"max_running": 8})
    with service(folder, echo=few, replicas=2) as running:
        fault = Fault("owner of admission killed", rounds)

        async def disturb() -> None:
            for _ in range(rounds):
                await asyncio.sleep(1.0)
                (victim,) = running.owner()
                os.kill(victim, signal.SIGKILL)
                question = echo_question(random.Random(0))
                outcome = await complete(running.url, question.body, key=KEYS[0])
                fault.recovery_s.append(outcome.first_s or NEVER_S)

        yield run_load(fault, Load(running.url, echo_question, 20), disturb, running.url)


def clients_leave(folder: Path, rounds: int) -> Iterator[Fault]:
    """8: clients disconnect in the queue, in prefill and in decode; KV pages return."""
    few = EchoOptions(ttft_s=0.3, itl_s=0.01, max_running=8)
    with service(folder, echo=few, replicas=2, max_queued_requests=400) as running:
        fault = Fault("clients leave", rounds * 10)
        draw = random.Random(11)

        async def leave() -> None:
            question = echo_question(draw)
            with suppress(asyncio.TimeoutError):
                async with asyncio.timeout(draw.uniform(0.0, 1.6)):
                    await complete(running.url, question.body, key=KEYS[0], timeout_s=1e6)

        async def disturb() -> None:
            for _ in range(rounds):
                await asyncio.gather(*(leave() for _ in range(10)))

        yield_fault = run_load(fault, Load(running.url, echo_question, 2), disturb, running.url)
        seconds = asyncio.run(until(lambda: is_idle(running.url)))
        yield_fault.recovery_s.append(seconds)
        yield_fault.note = f"KV tokens, running and waiting 0 after {seconds:.1f} s"
        if seconds >= NEVER_S:
            yield_fault.missing += 1
        yield yield_fault


def rolling_updates(folder: Path, rounds: int) -> Iterator[Fault]:
    """10: rolling updates under streams, with surge and without."""
    for surge in (100, 0):
        with Deployed() as cluster:

            def args(version: int, surge: int = surge) -> dict[str, Any]:
                return nest(
                    echo=ECHO.model_copy(update={"max_model_len": 4096 + version}),
                    api_keys=KEYS,
                    replicas=2,
                    surge_percent=surge,
                )

            cluster.deploy(args(0))
            asyncio.run(until(lambda: replicas_ready(cluster.url) >= 2))
            count = max(1, rounds // 4)
            fault = Fault(f"rolling update, surge {surge} %", count)

            async def disturb(fault: Fault = fault, cluster: Deployed = cluster) -> None:
                for version in range(1, fault.rounds + 1):
                    began = time.monotonic()
                    await asyncio.to_thread(cluster.deploy, args(version))
                    fault.recovery_s.append(time.monotonic() - began)

            load = Load(cluster.url, echo_question)
            yield run_load(fault, load, disturb, cluster.url)


def scaling(folder: Path, rounds: int) -> Iterator[Fault]:
    """14 and 11: engine replicas, and ingress replicas with HAProxy's reloads, come and go."""
    with Deployed(cpus=16) as cluster:
        args = nest(echo=ECHO, api_keys=KEYS, replicas=2)
        for name, deployment, numbers in (
            ("engine replicas 2, 4, 2", "engine-default", (4, 2)),
            ("HAProxy reloads: ingress replicas 2, 3, 2", "ingress", (3, 2)),
        ):
            cluster.deploy(args)
            asyncio.run(until(lambda: replicas_ready(cluster.url) >= 2))
            fault = Fault(name, max(1, rounds // 4))

            async def disturb(
                fault: Fault = fault,
                deployment: str = deployment,
                numbers: tuple[int, ...] = numbers,
            ) -> None:
                for _ in range(fault.rounds):
                    for number in numbers:
                        override = [{"name": deployment, "num_replicas": number}]
                        began = time.monotonic()
                        await asyncio.to_thread(cluster.deploy, args, override)
                        await until(lambda n=number: len(cluster.replicas(deployment)) == n)  # type: ignore[misc]
                        fault.recovery_s.append(time.monotonic() - began)
                        await asyncio.sleep(1.0)

            load = Load(cluster.url, echo_question)
            yield run_load(fault, load, disturb, cluster.url)


def slow_clients(folder: Path, rounds: int) -> Iterator[Fault]:
    """12: clients that ask for long answers and read nothing."""
    long = EchoOptions(ttft_s=0.01, itl_s=0.0002, max_model_len=200_000)
    with service(folder, echo=long, replicas=2) as running:
        fault = Fault("clients that do not read", rounds)
        sockets: list[socket.socket] = []
        sizes: list[float] = []

        def ask_and_sleep() -> socket.socket:
            host, port = running.url.removeprefix("http://").split(":")
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect((host, int(port)))
            body = {"prompt": "x" * 64, "max_tokens": 150_000, "ignore_eos": True, "stream": True}
            content = json.dumps(body | {"logprobs": 1})
            client.sendall(
                f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\n"
                f"authorization: Bearer {KEYS[1]}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(content)}\r\n\r\n{content}".encode()
            )
            return client

        async def disturb() -> None:
            before = max(memory_mb(pid) for pid in running.replicas("ingress"))
            for _ in range(rounds):
                sockets.append(ask_and_sleep())
                await asyncio.sleep(1.0)
                sizes.append(max(memory_mb(pid) for pid in running.replicas("ingress")) - before)

        fault = run_load(fault, Load(running.url, echo_question), disturb, running.url)
        fault.note = f"an ingress grew by {max(sizes):.0f} MB at most"
        for client in sockets:
            client.close()
        yield fault


def malformed(folder: Path, rounds: int) -> Iterator[Fault]:
    """13: what no client should send, beside those who send what they should."""
    with service(folder, echo=ECHO, replicas=2) as running:
        fault = Fault("malformed and huge input", rounds)
        seen: Counter[int] = Counter()
        bodies = [
            b"{",
            b"[" * 100_000,
            b'{"prompt": ' + b'"' + b"x" * (1 << 20) + b'"}',
            b'{"prompt": "' + b"x" * (5 << 20) + b'"}',
            b'{"prompt": [' + b"1," * 300_000 + b"1]}",
            b'{"prompt": "a", "max_tokens": 1e400}',
            b'{"prompt": "a", "n": 100000}',
            b"\xff\xfe\x00",
            b'{"prompt": "a", "stop": ' + json.dumps(["s" * 200] * 1000).encode() + b"}",
            b"",
        ]
        headers = {"authorization": f"Bearer {KEYS[1]}", "content-type": "application/json"}

        async def disturb() -> None:
            async with httpx.AsyncClient(timeout=60) as client:
                for _ in range(rounds):
                    for body in bodies:
                        answer = await client.post(
                            f"{running.url}/v1/completions", content=body, headers=headers
                        )
                        seen[answer.status_code] += 1

        fault = run_load(fault, Load(running.url, echo_question), disturb, running.url)
        fault.note = ", ".join(f"{count} x {status}" for status, count in sorted(seen.items()))
        if set(seen) - {400, 413}:
            fault.missing += 1
        yield fault


def damaged_engine(folder: Path, rounds: int) -> Iterator[Fault]:
    """16: an engine with a flipped byte, and one cut short: neither becomes ready."""
    engine = make_engine(EXAMPLE, "int8", folder)
    fault = Fault("damaged engine", 2)
    packed = max(engine.rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    whole = packed.read_bytes()
    said = []
    for damage in (_flip(whole), whole[: len(whole) // 2]):
        packed.write_bytes(damage)
        done = subprocess.run(
            [sys.executable, "-m", "serve_app", "--engine", str(engine), "--allow-ungated"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        fault.requests += 1
        fault.complete += done.returncode == 2 and "serving" not in done.stdout
        said.append(f"exit {done.returncode}")
    packed.write_bytes(whole)
    fault.note = f"refused: {', '.join(said)}"
    yield fault


def _flip(data: bytes) -> bytes:
    at = len(data) * 3 // 4
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


@contextmanager
def black_hole() -> Iterator[str]:
    """An address that takes connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def collector_down(folder: Path, rounds: int) -> Iterator[Fault]:
    """17: the collector of traces refuses, or takes connections and says nothing."""
    with black_hole() as silent:
        for name, endpoint in (
            ("collector refuses", "http://127.0.0.1:9"),
            ("collector is silent", silent),
        ):
            environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint}
            with service(folder, environment, echo=ECHO, replicas=2) as running:
                fault = Fault(name, rounds)

                async def disturb() -> None:
                    await asyncio.sleep(rounds)

                load = Load(running.url, echo_question)
                fault = run_load(fault, load, disturb, running.url)
                firsts = sorted(o.first_s for _, o in load.outcomes if o.first_s is not None)
                fault.note = f"TTFT p50 {1e3 * firsts[len(firsts) // 2]:.0f} ms"
                yield fault


FAULTS: dict[str, Callable[[Path, int], Iterator[Fault]]] = {
    "decode": engine_killed_in_decode,
    "prefill": engine_killed_in_prefill,
    "embedded": embedded_engine_killed,
    "stopped": engine_stopped,
    "controller": controller_killed,
    "ingress": ingress_killed,
    "owner": owner_killed,
    "leave": clients_leave,
    "update": rolling_updates,
    "scaling": scaling,
    "slow": slow_clients,
    "malformed": malformed,
    "damaged": damaged_engine,
    "collector": collector_down,
}


def show(faults: list[Fault]) -> None:
    print(
        "| fault | rounds | requests | complete | resumed | duplicated, missing tokens "
        "| recovery s, median and longest | longest silence s | seen |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---|")
    for fault in faults:
        times = sorted(fault.recovery_s)
        recovery = f"{times[len(times) // 2]:.1f}, {times[-1]:.1f}" if times else ""
        seen = [f"{n} x {label}" for label, n in sorted(fault.statuses.items()) if label != "200"]
        seen += [fault.note] if fault.note else []
        print(
            f"| {fault.name} | {fault.rounds} | {fault.requests} | {fault.complete} | "
            f"{fault.resumed} | {fault.duplicated}, {fault.missing} | {recovery} | "
            f"{fault.silence_s:.1f} | {'; '.join(seen)} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--json", type=Path, help="also write the rows here")
    given = parser.parse_args()
    faults: list[Fault] = []
    for name in given.only:
        with tempfile.TemporaryDirectory() as folder:
            for fault in FAULTS[name](Path(folder), given.rounds):
                faults.append(fault)
                print(f"{name}: {fault}", file=sys.stderr, flush=True)
    show(faults)
    if given.json:
        given.json.write_text(json.dumps([asdict(fault) for fault in faults], indent=2) + "\n")
    if broken := [fault.name for fault in faults if fault.broken]:
        raise SystemExit(f"bench: not as promised: {', '.join(broken)}")


if __name__ == "__main__":
    main()
