"""The echo engine: repeats the prompt, one token at a time. It has no model.

HTTP tests use it, and benchmarks of what the service itself costs: `ttft_s` and `itl_s` fix the
time to the first token and between tokens on an absolute schedule, so late wake-ups do not add up.
A token is one byte (openai/tokenizer.py, ByteTokenizer). The engine honors max_tokens, stop,
ignore_eos (the prompt then repeats without end), logprobs and prompt_logprobs (every token is
certain); seed, temperature and the cuts change nothing. It goes on where another replica ended, on
a schedule that starts anew, and refuses tokens that no echo can have said.
"""

from __future__ import annotations

import asyncio
import codecs
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from deepseek.engine.continuation import check_continuation, unshown_text
from deepseek.engine.options import EngineLoad
from deepseek.engine.request import FinishReason, TokenLogprob, TopLogprob
from deepseek.engine.token_names import added_text
from deepseek.errors import RequestError
from serve_app.config import EchoOptions
from serve_app.engines.protocol import (
    Done,
    EngineInfo,
    Event,
    GenerateRequest,
    LoadProgress,
    PromptLogprobs,
    Tokens,
)

#: A token is a byte.
_VOCAB_SIZE = 256


class EchoEngine:
    """Implements `Engine` on one event loop, without threads."""

    def __init__(self, options: EchoOptions) -> None:
        self._options = options
        self._kv_tokens = options.kv_tokens or options.max_running * options.max_model_len
        self._places = asyncio.Semaphore(options.max_running)
        self._waiting = 0
        self._running: dict[str, int] = {}
        self._aborted: set[str] = set()

    def loading(self) -> LoadProgress | None:
        return None

    async def start(self) -> EngineInfo:
        return EngineInfo(
            max_model_len=self._options.max_model_len,
            kv_tokens_total=self._kv_tokens,
            recipe="none",
            artifact_digest="none",
            engine="echo",
            max_running=self._options.max_running,
            continues=True,
        )

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Event, None]:
        arrived = time.monotonic()
        detokenizer = _Detokenizer(request.sampling.stop)
        reason, text = _replay(request, detokenizer)
        self._waiting += 1
        try:
            await self._places.acquire()
        finally:
            self._waiting -= 1
        started = time.monotonic()
        sampling = request.sampling
        self._running[request.request_id] = len(request.prompt_ids) + sampling.max_tokens
        said = [*request.prompt_ids, *request.output_ids][-3:]
        begun = produced = len(request.output_ids)
        first: float | None = None
        try:
            for token in () if reason else islice(_repeat_prompt(request), begun, None):
                await self._wait_until(
                    started + self._options.ttft_s + (produced - begun) * self._options.itl_s
                )
                if request.request_id in self._aborted:
                    reason = "abort"
                    break
                if sampling.prompt_logprobs is not None and not produced:
                    yield _prompt_logprobs(request.prompt_ids, sampling.prompt_logprobs)
                if not sampling.max_tokens:
                    break
                if token is None:
                    reason = "stop"
                    break
                said.append(token)
                produced += 1
                first = first or time.monotonic()
                text += detokenizer.push(token)
                logprobs = _certain_logprobs(said[-4:], sampling.logprobs)
                yield Tokens((token,), text, logprobs)
                text = ""
                if detokenizer.stopped:
                    reason = "stop"
                    break
                if produced == sampling.max_tokens:
                    break
            if rest := text + ("" if detokenizer.stopped else detokenizer.flush()):
                yield Tokens((), rest)
            ended = time.monotonic()
            first = first or ended
            yield Done(
                reason or "length",
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
            kv_tokens_total=self._kv_tokens,
        )

    async def check(self) -> None:
        """An echo cannot fail."""

    def stalled_s(self) -> float:
        return 0.0  # nor hang: it has no steps

    async def shutdown(self) -> None:
        """Nothing to release."""


def _replay(request: GenerateRequest, detokenizer: _Detokenizer) -> tuple[FinishReason | None, str]:
    """Take the tokens that another replica said. Returns why the request ends with them, if it
    does, and the text of them that was not passed on.

    Raises:
        RequestError: they are not what an echo says, or have less text than was passed on.
    """
    sampling, output_ids = request.sampling, request.output_ids
    check_continuation(sampling, output_ids, request.num_shown, _VOCAB_SIZE)
    reason: FinishReason | None = None
    text = ""
    tokens = _repeat_prompt(request)
    for position, token in enumerate(output_ids):
        if token != next(tokens):
            raise RequestError(
                f"output_ids differ from what an echo says at position {position}; give the tokens "
                "that were generated, each once and in order"
            )
        text += detokenizer.push(token)
        if detokenizer.stopped:
            reason = "stop"
            break
    if reason is None and output_ids:
        if len(output_ids) == sampling.max_tokens:
            reason = "length"
        elif next(tokens) is None:
            reason = "stop"
        text += detokenizer.flush() if reason else ""
    return reason, unshown_text(text, request.num_shown)


def _repeat_prompt(request: GenerateRequest) -> Iterator[int | None]:
    """The prompt's tokens, then None for the end token; with ignore_eos the prompt repeats."""
    while True:
        yield from request.prompt_ids
        if not request.sampling.ignore_eos:
            yield None


def _certain_logprobs(
    last_tokens: Sequence[int], num_alternatives: int | None
) -> tuple[TokenLogprob, ...]:
    """Of the last of some tokens."""
    if num_alternatives is None:
        return ()
    *before, token = last_tokens
    own = bytes([token])
    text = added_text(bytes(before), own)
    top = (TopLogprob(token, text, 0.0, own),) if num_alternatives else ()
    return (TokenLogprob(token, text, 0.0, top, own, rank=1),)


def _prompt_logprobs(prompt: Sequence[int], num_alternatives: int) -> PromptLogprobs:
    certain = [
        _certain_logprobs(prompt[max(0, stop - 4) : stop], num_alternatives)[0]
        for stop in range(2, len(prompt) + 1)
    ]
    return PromptLogprobs((None, *certain))


@dataclass
class _Detokenizer:
    """Turns bytes into text that may be shown: whole characters, and nothing of a stop string."""

    stop: tuple[str, ...]
    stopped: bool = False
    _held: str = ""
    _decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")(errors="replace")
    )

    def push(self, token: int) -> str:
        self._held += self._decoder.decode(bytes([token]))
        starts = [at for stop in self.stop if (at := self._held.find(stop)) >= 0]
        if starts:
            self.stopped = True
            return self._release(min(starts))
        num_held = max(
            (
                size
                for stop in self.stop
                for size in range(1, len(stop))
                if self._ends_like(stop, size)
            ),
            default=0,
        )
        return self._release(len(self._held) - num_held)

    def flush(self) -> str:
        self._held += self._decoder.decode(b"", final=True)
        return self._release(len(self._held))

    def _ends_like(self, stop: str, size: int) -> bool:
        return self._held.endswith(stop[:size])

    def _release(self, size: int) -> str:
        text, self._held = self._held[:size], self._held[size:]
        return text
