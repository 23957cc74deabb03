"""The whole engine behind the adapter and the worker that serve: does it load, is what it says
right, how fast is it, and is a rank that dies noticed?"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from bench.smoke.verdicts import Verdict
from deepseek.engine.request import SamplingParams
from deepseek.errors import IntServeError
from serve_app.engines.protocol import Done, EngineInfo, GenerateRequest, Tokens
from serve_app.engines.remote.engine import RemoteEngine
from serve_app.engines.worker import processes

#: Next tokens of a real text that are asked for, and the share that a whole model guesses; one
#: whose scales or nibbles are wrong guesses next to none.
POSITIONS, RIGHT = 64, 0.2
#: Seconds in which a rank that is killed must be noticed, and for the last process to go.
NOTICED_S, GONE_S = 10.0, 20.0


@dataclass(frozen=True, slots=True)
class Workload:
    """Random prompts of `isl` tokens with answers of `osl`: one alone, then `requests` of them,
    `concurrency` at a time."""

    isl: int
    osl: int
    concurrency: int
    requests: int


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds to the first token and per token after it, medians, and tokens a second of all."""

    concurrency: int
    ttft_s: float
    tpot_s: float
    tokens_per_s: float

    def words(self) -> str:
        return (
            f"TTFT {self.ttft_s * 1e3:.0f} ms, TPOT {self.tpot_s * 1e3:.1f} ms, "
            f"{self.tokens_per_s:.1f} tokens/s at {self.concurrency} at a time"
        )


@dataclass(frozen=True, slots=True)
class _Answer:
    token_ids: tuple[int, ...]
    done: Done
    first_s: float
    seconds: float


class Smoke:
    """The steps over one engine, in order. `verdicts` grows; `measured` holds the figures."""

    def __init__(
        self,
        make: Callable[[], RemoteEngine],
        text_ids: Sequence[int],
        chunk_tokens: int,
        workload: Workload,
        report: Callable[[Verdict], None],
    ) -> None:
        self._make = make
        self._text = tuple(text_ids)
        self._chunk = chunk_tokens
        self._workload = workload
        self._report = report
        self._count = 0
        self.measured: list[Measured] = []

    async def run(self, *, kill_a_rank: bool) -> None:
        """All steps; those after a failed load are skipped."""
        engine = self._make()
        began = time.monotonic()
        try:
            info = await engine.start()
        except IntServeError as error:
            self._report(Verdict("the whole engine loads", "1", "failed", str(error)))
            await engine.shutdown()
            return
        seen = f"{info.kv_tokens_total} KV tokens in blocks of {info.page_tokens}"
        seconds = time.monotonic() - began
        self._report(Verdict("the whole engine loads", "1", "held", seen, seconds))
        pids = list(engine._pids)
        try:
            for step in (self._knows, self._chunks, self._alone, self._together):
                began = time.monotonic()
                verdict = await step(engine, info)
                self._report(replace(verdict, seconds=time.monotonic() - began))
            if kill_a_rank:
                self._report(await self._dies(engine, pids))
        finally:
            began = time.monotonic()
            await engine.shutdown()
        left = await _left(pids)
        self._report(
            Verdict(
                "nothing is left",
                "",
                "failed" if left else "held",
                f"processes {left} run on" if left else f"{len(pids)} rank processes ended",
                time.monotonic() - began,
            )
        )

    async def _knows(self, engine: RemoteEngine, info: EngineInfo) -> Verdict:
        room = min(len(self._text), info.max_model_len - 1)
        places = sorted(random.Random(0).sample(range(8, room), min(POSITIONS, room - 8)))
        answers = await asyncio.gather(*[self._ask(engine, self._text[:at], 1) for at in places])
        right = sum(
            answer.token_ids == (self._text[at],)
            for at, answer in zip(places, answers, strict=True)
        )
        share = right / len(places)
        return Verdict(
            "it knows a text",
            "1",
            "held" if share >= RIGHT else "failed",
            f"{right} of {len(places)} next tokens right, {RIGHT:.0%} are needed",
        )

    async def _chunks(self, engine: RemoteEngine, info: EngineInfo) -> Verdict:
        """A prompt of more tokens than a step has, twice: in chunks, then found in part."""
        name, kv = "a prompt in chunks", f"KV cache {info.kv_cache}"
        length = self._chunk + info.page_tokens
        if length + 16 > info.max_model_len:
            return Verdict(name, "7", "skipped", f"the context holds no prompt of {length} tokens")
        prompt = (self._text * (length // len(self._text) + 1))[:length]
        first, again = [await self._ask(engine, prompt, 16) for _ in range(2)]
        same = sum(a == b for a, b in zip(first.token_ids, again.token_ids, strict=False))
        seen = f"{length} tokens, {kv}; again, {again.done.cached_tokens} of them found: "
        seen += f"{same} of {len(first.token_ids)} tokens alike"
        whole = len(first.token_ids) > 0 and first.token_ids[:1] == again.token_ids[:1]
        return Verdict(name, "7", "held" if whole else "failed", seen)

    async def _alone(self, engine: RemoteEngine, info: EngineInfo) -> Verdict:
        return await self._measure(engine, info, concurrency=1, requests=2)

    async def _together(self, engine: RemoteEngine, info: EngineInfo) -> Verdict:
        load = self._workload
        return await self._measure(
            engine, info, concurrency=load.concurrency, requests=load.requests
        )

    async def _measure(
        self, engine: RemoteEngine, info: EngineInfo, *, concurrency: int, requests: int
    ) -> Verdict:
        load, source = self._workload, random.Random(concurrency)
        isl = min(load.isl, info.max_model_len - load.osl)
        slots = asyncio.Semaphore(concurrency)

        async def one() -> _Answer:
            prompt = tuple(source.choices(self._text, k=isl))
            async with slots:
                return await self._ask(engine, prompt, load.osl)

        began = time.monotonic()
        answers = await asyncio.gather(*[one() for _ in range(requests)])
        seconds = time.monotonic() - began
        whole = all(len(answer.token_ids) == load.osl for answer in answers)
        measured = Measured(
            concurrency=concurrency,
            ttft_s=statistics.median(answer.first_s for answer in answers),
            tpot_s=statistics.median(
                (answer.seconds - answer.first_s) / max(1, load.osl - 1) for answer in answers
            ),
            tokens_per_s=sum(len(answer.token_ids) for answer in answers) / seconds,
        )
        self.measured.append(measured)
        short = sum(len(answer.token_ids) != load.osl for answer in answers)
        return Verdict(
            f"{requests} requests, {concurrency} at a time",
            "",
            "held" if whole else "failed",
            measured.words() if whole else f"{short} of {requests} answers are short",
        )

    async def _dies(self, engine: RemoteEngine, pids: Sequence[int]) -> Verdict:
        """Kill a rank amid a request, which must fail as one that can go on elsewhere."""
        name = "a rank that dies"
        if not pids:
            return Verdict(name, "10", "failed", "no rank process is known")
        asked = asyncio.create_task(self._ask(engine, self._text[:16], 10_000))
        await asyncio.sleep(0.2)
        began = time.monotonic()
        os.kill(pids[-1], signal.SIGKILL)
        try:
            async with asyncio.timeout(NOTICED_S):
                answer = await asked
        except TimeoutError:
            return Verdict(name, "10", "failed", f"not noticed in {NOTICED_S:g} s")
        seconds = time.monotonic() - began
        if not answer.done.retryable:
            return Verdict(name, "10", "failed", f"its request ended {answer.done.reason}", seconds)
        return Verdict(name, "10", "held", "noticed; its request can go on elsewhere", seconds)

    async def _ask(self, engine: RemoteEngine, prompt: tuple[int, ...], tokens: int) -> _Answer:
        self._count += 1
        request = GenerateRequest(
            request_id=f"smoke-{self._count}",
            prompt_ids=prompt,
            sampling=SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True),
            cache_salt="smoke",
        )
        began, first_s = time.monotonic(), 0.0
        token_ids: list[int] = []
        done: Done | None = None
        async for event in engine.generate(request):
            if isinstance(event, Tokens):
                first_s = first_s or time.monotonic() - began
                token_ids += event.token_ids
            elif isinstance(event, Done):
                done = event
        assert done is not None
        return _Answer(tuple(token_ids), done, first_s, time.monotonic() - began)


async def _left(pids: Sequence[int]) -> list[int]:
    """Those that have not ended in `GONE_S`."""
    deadline = time.monotonic() + GONE_S
    while left := [pid for pid in pids if processes.is_alive(pid)]:
        if time.monotonic() > deadline:
            break
        await asyncio.sleep(0.05)
    return left
