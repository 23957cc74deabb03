"""Says the prompt back, one token at a time: an engine without a model.

For HTTP tests and for measuring what the framework itself costs: `ttft_s` and `itl_s` fix the time
to the first token and between tokens, on an absolute schedule, so that a late wake-up does not add
up. Tokens are bytes (tokenizer.ByteTokenizer). It honors max_tokens, stop, ignore_eos (the prompt
is then said again and again) and logprobs (each token was certain); a seed or a temperature cannot
change what it says.
"""

from __future__ import annotations

import asyncio
import codecs
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field

from deepseek.engine.options import EngineLoad
from deepseek.engine.request import FinishReason, TokenLogprob
from serve_app.config import EchoOptions
from serve_app.engines.protocol import Done, EngineInfo, Event, GenerateRequest, Tokens


class EchoEngine:
    """Satisfies `Engine`. One event loop only; nothing here runs in threads."""

    def __init__(self, options: EchoOptions) -> None:
        self._options = options
        self._places = asyncio.Semaphore(options.max_running)
        self._waiting = 0
        self._running: dict[str, int] = {}
        self._aborted: set[str] = set()

    async def start(self) -> EngineInfo:
        return EngineInfo(
            max_model_len=self._options.max_model_len,
            kv_tokens_total=self._options.max_running * self._options.max_model_len,
            recipe="none",
            artifact_digest="none",
            engine="echo",
        )

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        arrived = time.monotonic()
        self._waiting += 1
        try:
            await self._places.acquire()
        finally:
            self._waiting -= 1
        started = time.monotonic()
        sampling = request.sampling
        self._running[request.request_id] = len(request.prompt_ids) + sampling.max_tokens
        speaker = _Speaker(sampling.stop)
        reason: FinishReason = "length"
        produced = 0
        try:
            for token in _said(request):
                await self._wait_until(
                    started + self._options.ttft_s + produced * self._options.itl_s
                )
                if request.request_id in self._aborted:
                    reason = "abort"
                    break
                if token is None:
                    reason = "stop"
                    break
                produced += 1
                if produced == 1:
                    first = time.monotonic()
                text = speaker.say(token)
                yield Tokens((token,), text, _certain(token, sampling.logprobs))
                if speaker.stopped:
                    reason = "stop"
                    break
                if produced == sampling.max_tokens:
                    break
            if not speaker.stopped and (rest := speaker.rest()):
                yield Tokens((), rest)
            ended = time.monotonic()
            first = first if produced else ended
            yield Done(
                reason,
                len(request.prompt_ids),
                produced,
                queue_s=started - arrived,
                prefill_s=first - started,
                decode_s=ended - first,
            )
        finally:
            del self._running[request.request_id]
            self._aborted.discard(request.request_id)
            self._places.release()

    async def _wait_until(self, moment: float) -> None:
        await asyncio.sleep(max(0.0, moment - time.monotonic()))

    async def abort(self, request_ids: Sequence[str]) -> None:
        self._aborted.update(set(request_ids) & set(self._running))

    def load(self) -> EngineLoad:
        return EngineLoad(
            running=len(self._running),
            waiting=self._waiting,
            kv_tokens_used=sum(self._running.values()),
            kv_tokens_total=self._options.max_running * self._options.max_model_len,
        )

    async def check(self) -> None:
        """An echo cannot get stuck."""

    async def shutdown(self) -> None:
        """Nothing to release."""


def _said(request: GenerateRequest) -> Iterator[int | None]:
    """The prompt's tokens, then None for the end, unless ignore_eos asks to go on."""
    while True:
        yield from request.prompt_ids
        if not request.sampling.ignore_eos:
            yield None


def _certain(token: int, num_alternatives: int | None) -> tuple[TokenLogprob, ...]:
    if num_alternatives is None:
        return ()
    text = bytes([token]).decode("utf-8", errors="replace")
    top = ((token, text, 0.0),) if num_alternatives else ()
    return (TokenLogprob(token, text, 0.0, top),)


@dataclass
class _Speaker:
    """Bytes to text that may be shown: no half characters, nothing of a stop string."""

    stop: tuple[str, ...]
    stopped: bool = False
    _held: str = ""
    _decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")(errors="replace")
    )

    def say(self, token: int) -> str:
        self._held += self._decoder.decode(bytes([token]))
        found = [at for stop in self.stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._release(min(found))
        keep = max(
            (
                size
                for stop in self.stop
                for size in range(1, len(stop))
                if self._ends_like(stop, size)
            ),
            default=0,
        )
        return self._release(len(self._held) - keep)

    def rest(self) -> str:
        self._held += self._decoder.decode(b"", final=True)
        return self._release(len(self._held))

    def _ends_like(self, stop: str, size: int) -> bool:
        return self._held.endswith(stop[:size])

    def _release(self, size: int) -> str:
        text, self._held = self._held[:size], self._held[size:]
        return text
