"""A backend of the worker whose engine is a script: says the prompt back, and fails on request.

It runs in a worker's process of its own, never in a test's. Its arguments say what its constructor
does, the first word of a prompt what becomes of a request. What it is told it writes down, one JSON
line each, in the file `journal`.

    constructor     ok, hang, die, exit, raise, rank_fails, refuse, rank_dies, slow,
                    oom (where `free_fraction` is more than `oom_above`)
    walk            the next token depends on the last one, not on the prompt
    prompt          refuse, fail, dead: an error of that kind    hang: no token ever
                    unnamed: no finish reason                    deaf: does not stop at its limit
                    cancelled: broken off                        block: the loop hangs
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

from intserve_worker.backend import LoadError, Refused, RequestFailed
from intserve_worker.messages import End, Generate, Load, Output, Progress, Ready, Score, Start


def walk(token: int) -> int:
    """The byte after a byte, where tokens depend on the last one alone: a continued answer is then
    the rest of the undisturbed one."""
    return 97 + (token * 7 + 3) % 26


def make(module: str | None) -> Scripted:
    return Scripted()


class Scripted:
    def __init__(self) -> None:
        self.ranks: list[subprocess.Popen[bytes]] = []
        self.aborted: set[int] = set()
        self.open: dict[int, int] = {}
        self.steps = 0

    def write(self, what: str, **fields: Any) -> None:
        if "journal" in self.arguments:
            with open(self.arguments["journal"], "a", encoding="utf-8") as file:
                file.write(json.dumps({"what": what, "pid": os.getpid(), **fields}) + "\n")

    async def start(self, start: Start, report: Callable[[Progress], None]) -> Ready:
        self.arguments = arguments = start.arguments
        self.write("start", arguments=arguments)
        for _ in range(arguments.get("ranks", 0)):
            self.ranks.append(subprocess.Popen(["sleep", "600"]))
        self.write("ranks", pids=self.pids())
        report(Progress(phase="weights", total=start.weight_bytes))
        match arguments.get("constructor", "ok"):
            case "hang":
                time.sleep(600)
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                print("ValueError: tensor model.norm.weight is missing", flush=True)
                os._exit(1)
            case "raise":
                raise ValueError("LLM got invalid argument: tensor_paralel_size")
            case "rank_fails":
                lost = AttributeError("'Linear' object has no attribute 'weight_scale'")
                raise RuntimeError("Executor worker returned error") from lost
            case "refuse":
                raise LoadError("the environment has version 2, not 1; make it anew")
            case "oom":
                fraction = arguments["free_fraction"]
                if fraction > arguments["oom_above"]:
                    raise RuntimeError("executor worker failed") from MemoryError("CUDA: none left")
            case "rank_dies":
                self.ranks[-1].kill()
                time.sleep(600)
            case "slow":
                time.sleep(arguments["slow_s"])
        return Ready(
            engine_version="script",
            max_running=arguments.get("max_running", 8),
            kv_tokens_total=arguments.get("kv_tokens", 4096),
            page_tokens=16,
        )

    async def submit(self, request: Generate) -> AsyncGenerator[Output | End, None]:
        self.write(
            "request", **{name: getattr(request, name) for name in request.__struct_fields__}
        )
        text = bytes(token % 256 for token in request.prompt_ids)
        word = text.split()[0].decode() if text.split() else ""
        if word == "refuse":
            raise Refused("this prompt is not to its taste")
        if word == "block":
            time.sleep(600)
        self.open[request.id] = len(request.prompt_ids)
        try:
            async for item in self.speak(request, word):
                yield item
        finally:
            del self.open[request.id]
            self.write("end", id=request.id)

    async def speak(self, request: Generate, word: str) -> AsyncGenerator[Output | End, None]:
        told = 0
        limit = 10**9 if word == "deaf" else request.max_tokens
        per_step = self.arguments.get("per_step", 1)
        last = request.prompt_ids[-1]
        ends = set(request.stop_token_ids) | (set() if request.ignore_eos else set(request.end_ids))
        while told < limit:
            await asyncio.sleep(self.arguments.get("step_s", 0.0))
            if request.id in self.aborted:
                yield End(request.id, finish_reason="cancelled")
                return
            if word == "hang" or os.path.exists(self.arguments.get("frozen", "")):
                continue
            if word == "fail" and told:
                raise RequestFailed("it failed alone")
            if word == "dead" and told:
                raise RuntimeError("the executor is gone")
            if word == "cancelled" and told:
                yield End(request.id, finish_reason="cancelled")
                return
            prompt = request.prompt_ids
            count = min(per_step, limit - told)
            if self.arguments.get("walk"):
                new = []
                for _ in range(count):
                    last = walk(last)
                    new.append(last)
            else:
                new = [prompt[(told + i) % len(prompt)] for i in range(count)]
            stop = next((i for i, token in enumerate(new) if token in ends), None)
            new = new if stop is None else new[: stop + 1]
            told += len(new)
            self.steps += 1
            yield Output(
                request.id,
                new,
                scores=None
                if request.logprobs is None
                else [Score(-0.5, 1, [(token, -0.5), (0, -1.5)]) for token in new],
                prompt_scores=(
                    [None] + [Score(-1.0, 2, []) for _ in prompt[1:]]
                    if request.prompt_logprobs is not None and told == len(new)
                    else None
                ),
                cached_tokens=3,
                queue_s=0.001,
            )
            if stop is not None:
                yield End(request.id, finish_reason=None if word == "unnamed" else "stop")
                return
        yield End(request.id, finish_reason=None if word == "unnamed" else "length")

    async def abort(self, request_id: int) -> None:
        self.write("abort", id=request_id)
        self.aborted.add(request_id)

    async def load(self) -> Load | None:
        if not self.arguments.get("figures", True):
            return None
        return Load(
            running=len(self.open),
            waiting=0,
            kv_blocks_used=sum(-(-length // 16) for length in self.open.values()),
            kv_blocks_total=self.arguments.get("kv_tokens", 4096) // 16,
            page_tokens=16,
            steps=self.steps,
        )

    async def healthy(self) -> str | None:
        control = self.arguments.get("control")
        if control and os.path.exists(control):
            with open(control, encoding="utf-8") as file:
                word = file.read().strip()
            if word == "unhealthy":
                return "it says so"
            if word == "silent":
                await asyncio.sleep(600)
        return None

    def cause(self) -> LoadError | None:
        return None

    def pids(self) -> list[int]:
        return [rank.pid for rank in self.ranks]

    def shutdown(self) -> None:
        self.write("shutdown")
        match self.arguments.get("shutdown", "ok"):
            case "hang":
                time.sleep(600)
            case "abort":
                os.abort()
        for rank in self.ranks:
            rank.terminate()
            rank.wait()
