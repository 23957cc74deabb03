"""A backend of the worker whose engine is the embedded one, so that what the process boundary costs
can be told from what an engine does. It runs in a worker's process of its own.

`arguments` are those of `EngineOptions`. The engine gets no tokenizer: text is the adapter's work.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from pathlib import Path

from intserve_worker.messages import End, Generate, Load, Output, Progress, Ready, Score, Start

from deepseek.engine.engine import LLMEngine
from deepseek.engine.opening import open_directory
from deepseek.engine.options import EngineOptions
from deepseek.engine.request import SamplingParams, TokenLogprob
from serve_app.engine_sections import EmbeddedOptions
from serve_app.engines.embedded import EmbeddedEngine
from serve_app.engines.protocol import Done, GenerateRequest, Tokens


def make(module: str | None) -> Embedded:
    return Embedded()


def load_without_text(directory: Path, options: EngineOptions) -> LLMEngine:
    opened = open_directory(directory, options)
    return LLMEngine(opened.model, opened.identity, options, end_token_ids=opened.end_token_ids)


class Embedded:
    """Implements `Backend`."""

    async def start(self, start: Start, report: Callable[[Progress], None]) -> Ready:
        report(Progress(phase="weights", total=start.weight_bytes))
        options = EmbeddedOptions(directory=Path(start.directory), **start.arguments)
        self.engine = EmbeddedEngine(options, load_without_text)
        info = await self.engine.start()
        return Ready(
            max_model_len=info.max_model_len,
            kv_tokens_total=info.kv_tokens_total,
            page_tokens=info.page_tokens,
            max_running=info.max_running,
        )

    async def submit(self, request: Generate) -> AsyncGenerator[Output | End, None]:
        ends = () if request.ignore_eos else request.end_ids
        sampling = SamplingParams(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            top_p=request.top_p,
            top_k=request.top_k,
            seed=request.seed,
            stop_token_ids=tuple({*request.stop_token_ids, *ends}),
            ignore_eos=True,
            logprobs=request.logprobs,
        )
        sequence = GenerateRequest(
            request_id=str(request.id),
            prompt_ids=tuple(request.prompt_ids),
            sampling=sampling,
            cache_salt=request.cache_salt,
        )
        async for event in self.engine.generate(sequence):
            if isinstance(event, Tokens):
                scores = None if request.logprobs is None else list(map(_score, event.logprobs))
                yield Output(request.id, list(event.token_ids), scores=scores)
            elif isinstance(event, Done):
                yield End(request.id, finish_reason=event.reason, error=event.error)

    async def abort(self, request_id: int) -> None:
        await self.engine.abort([str(request_id)])

    async def load(self) -> Load | None:
        told = self.engine.load()
        return Load(running=told.running, waiting=told.waiting)

    async def healthy(self) -> str | None:
        await self.engine.check()
        return None

    def cause(self) -> None:
        return None

    def pids(self) -> list[int]:
        return []

    def shutdown(self) -> None:
        pass


def _score(item: TokenLogprob) -> Score:
    return Score(item.logprob, item.rank, [(top.token_id, top.logprob) for top in item.top])
