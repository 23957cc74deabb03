"""Time and memory of an ingress that gets eight prompts of 4 MB at once, and of a neighbor's.

    python bench/long_prompts.py [--tokenizer examples/tiny-deepseek-v3] [--context 163840] [--chat]
        [--texts english base64 ...] [--json FILE]

The HTTP application runs in a process of its own, without Ray, before an engine that computes
nothing; a fresh process for each kind of text. Its peak of memory is beyond what it had before the
prompts came. Meanwhile a neighbor asks for one short prompt after the other. A tokenizer is a
directory with tokenizer.json and tokenizer_config.json; `--context` is what the engine says it
holds.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import multiprocessing
import os
import random
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import uvicorn
from support.ports import free_port
from support.serving import make_service, wait_for

from serve_app.config import EchoOptions
from serve_app.engines.echo import EchoEngine
from serve_app.engines.protocol import Done, Event, GenerateRequest, Tokens
from serve_app.openai.routes import make_app
from serve_app.openai.tokenizer import HfTokenizer

ROOT = Path(__file__).resolve().parent.parent
SIZE = 4_000_000
PROMPTS = 8


def _english(size: int) -> str:
    text = (ROOT / "examples" / "tiny-deepseek-v3" / "calibration.txt").read_text("utf-8")
    return (text * (size // len(text) + 1))[:size]


def _random(size: int) -> random.Random:
    return random.Random(size)


#: Kind of text -> a text of at most so many bytes in JSON.
TEXTS: dict[str, Callable[[int], str]] = {
    "english": lambda size: _english(size * 9 // 10),
    "base64": lambda size: base64.b64encode(_random(size).randbytes(size * 3 // 4)).decode(),
    "letters": lambda size: "".join(_random(size).choices("abcdefghijklmnopqrstuvwxyz", k=size)),
    "one letter": lambda size: "a" * size,
    "digits": lambda size: "7" * size,
    "spaces": lambda size: " " * size,
    "newlines": lambda size: "\n" * (size // 2),
    "dashes": lambda size: "-" * size,
    "emoji": lambda size: "😀" * (size // 4),
    "han": lambda size: "".join(
        map(chr, _random(size).choices(range(0x4E00, 0x9FA5), k=size // 3))
    ),
    "accents": lambda size: "e\u0301" * (size // 3),
    "control tokens": lambda size: "<｜User｜>" * (size // 12),
    "half tokens": lambda size: "<｜" * (size // 4),
}


@dataclass(frozen=True)
class Row:
    text: str
    seconds: float
    peak_mb: float
    neighbor_p50_ms: float
    neighbor_max_ms: float
    answers: dict[str, int]


class Silent(EchoEngine):
    """Answers any prompt with one token of no text."""

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        yield Tokens((0,), "")
        yield Done("length", len(request.prompt_ids), 1)


def serve(port: int, directory: Path, context: int) -> None:
    """Run the application until the process is ended."""
    names = ("tokenizer.json", "tokenizer_config.json")
    tokenizer = HfTokenizer(directory, {name: (directory / name).read_bytes() for name in names})
    service = make_service(Silent(EchoOptions(max_model_len=context)), tokenizer=tokenizer)
    uvicorn.run(make_app(service), port=port, log_level="error", access_log=False)


def memory_mb(pid: int, name: str) -> float:
    """VmRSS or VmHWM of a process."""
    for line in Path(f"/proc/{pid}/status").read_text("utf-8").splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024
    raise ValueError(name)


async def ask(url: str, text: str, *, chat: bool) -> dict[str, int]:
    """Send the prompts and the neighbor's; `times` in seconds."""
    content = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
    body = json.dumps({"model": "echo", **content, "max_tokens": 1}, ensure_ascii=False).encode()
    headers = {"content-type": "application/json"}
    answers: dict[str, int] = {}
    path = "chat/completions" if chat else "completions"
    async with httpx.AsyncClient(timeout=600, base_url=url, headers=headers) as client:
        posts = [client.post(f"/v1/{path}", content=body) for _ in range(PROMPTS)]
        for answer in await asyncio.gather(*posts):
            what = str(answer.status_code)
            if answer.status_code != 200:
                what += f" {answer.json()['error']['code']}"
            answers[what] = answers.get(what, 0) + 1
    return answers


async def neighbor(url: str, times: list[float]) -> None:
    """Ask for short prompts until cancelled."""
    async with httpx.AsyncClient(timeout=600, base_url=url) as client:
        while True:
            started = time.perf_counter()
            body = {"model": "echo", "prompt": "hello", "max_tokens": 1}
            (await client.post("/v1/completions", json=body)).raise_for_status()
            times.append(time.perf_counter() - started)
            await asyncio.sleep(0.02)


async def measure(url: str, pid: int, name: str, *, chat: bool) -> Row:
    text, times = TEXTS[name](SIZE), list[float]()
    async with httpx.AsyncClient(base_url=url) as client:  # warm: a helper process, the threads
        body = {"model": "echo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
        (await client.post("/v1/chat/completions", json=body)).raise_for_status()
    before = memory_mb(pid, "VmRSS")
    asking = asyncio.create_task(neighbor(url, times))
    started = time.perf_counter()
    answers = await asyncio.to_thread(lambda: asyncio.run(ask(url, text, chat=chat)))
    seconds = time.perf_counter() - started
    asking.cancel()
    times.append(times[-1] if times else seconds)
    peak = memory_mb(pid, "VmHWM") - before
    median, most = sorted(times)[len(times) // 2] * 1e3, max(times) * 1e3
    return Row(name, seconds, peak, median, most, answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "examples" / "tiny-deepseek-v3")
    parser.add_argument("--context", type=int, default=163_840)
    parser.add_argument("--chat", action="store_true", help="as messages of a conversation")
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS))
    arguments = parser.parse_args()
    rows = []
    for name in arguments.texts:
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        process = multiprocessing.get_context("spawn").Process(
            target=serve, args=(port, arguments.tokenizer, arguments.context), daemon=True
        )
        process.start()
        try:
            wait_for(lambda url=url: _is_up(url), timeout_s=120)
            row = asyncio.run(measure(url, process.pid or 0, name, chat=arguments.chat))
        finally:
            process.kill()
            process.join()
        rows.append(row)
        print(
            f"{row.text:15} {row.seconds:6.1f} s  +{row.peak_mb:5.0f} MB   neighbor p50 "
            f"{row.neighbor_p50_ms:5.0f}  max {row.neighbor_max_ms:6.0f} ms   {row.answers}",
            flush=True,
        )
    if arguments.json:
        report = {"cpus": os.cpu_count(), "load_average": os.getloadavg()}
        rows_ = [asdict(row) for row in rows]
        arguments.json.write_text(json.dumps({**report, "rows": rows_}, indent=2) + "\n")


def _is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


if __name__ == "__main__":
    main()
