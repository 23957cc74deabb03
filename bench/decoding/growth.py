"""Step time against batch and context, of our engines alone.

Contexts are not computed: the cache is filled with random latents through its own `write`, because
prefilling 32 thousand tokens per format takes longer than all measurements, and how long a step
takes does not depend on what it reads. The step is the engine's own (`Runner.compute`): batch,
forward pass, sampling; without scheduling and text, which do not depend on the context.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.decoding.lines import answer
from bench.decoding.workers import Worker
from deepseek.engine.engine import EngineOptions, LLMEngine
from deepseek.engine.kv_cache import token_bytes
from deepseek.engine.request import Request, SamplingParams
from deepseek.engine.request import Sequence as Text
from deepseek.engine.scheduler import Chunk, Schedule

CONTEXTS = (512, 2048, 8192, 32768)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
KV_FORMATS = ("bf16", "int8", "fp8")
_WRITTEN_AT_ONCE = 4096


@dataclass(frozen=True, slots=True)
class Point:
    """Median seconds of a step of `batch` sequences with `context` tokens each, and bytes of
    context that it reads."""

    model: str
    kv_cache: str
    batch: int
    context: int
    seconds: float
    bytes: int


class Grown:
    """A worker (workers.py) with other calls: `open`, and `step` at a batch and a context."""

    def open(
        self,
        directory: str,
        *,
        is_engine: bool,
        kv_cache: str,
        threads: int,
        tokens: int,
        batch: int,
    ) -> int:
        """Bytes of one token of context. The cache holds `tokens`."""
        opened = LLMEngine.load if is_engine else LLMEngine.from_checkpoint
        options = EngineOptions(
            kv_cache=kv_cache,
            max_batch_size=batch,
            max_batched_tokens=max(512, batch),
            max_kv_tokens=tokens,
            num_threads=threads,
            prefix_cache=False,
        )
        self._engine = opened(Path(directory), options)
        self._write()
        return token_bytes(self._engine.config, self._engine._runner.cache.layout)

    @torch.inference_mode()
    def _write(self) -> None:
        """Random latents in every slot but those of the page of zeros."""
        cache, config = self._engine._runner.cache, self._engine.config
        num_slots = (self._engine._pool.num_pages + 1) * cache.page_tokens
        generator = torch.Generator().manual_seed(0)
        for first in range(cache.page_tokens, num_slots, _WRITTEN_AT_ONCE):
            slots = torch.arange(first, min(first + _WRITTEN_AT_ONCE, num_slots))
            latent = torch.randn((len(slots), config.kv_lora_rank), generator=generator)
            rope = torch.randn((len(slots), config.qk_rope_head_dim), generator=generator)
            for layer in range(config.num_hidden_layers):
                cache.write(layer, slots, latent, rope)

    def step(self, batch: int, context: int, steps: int) -> float:
        """Median seconds of a step."""
        pool, runner = self._engine._pool, self._engine._runner
        sampling = SamplingParams(max_tokens=steps + 2, temperature=0.0, ignore_eos=True)
        words = self._engine.config.vocab_size - 2
        texts = []
        for number in range(batch):
            prompt = tuple(2 + (7919 * number + place) % words for place in range(context))
            request = Request(request_id=str(number), prompt_ids=prompt, sampling=sampling)
            text = Text(request, arrived_s=0.0, num_computed=context - 1)
            pool.grow(text, context + steps + 2)
            texts.append(text)
        times = []
        for _ in range(steps + 1):
            started = time.perf_counter()
            chunks = [Chunk(text, text.num_tokens - 1, 1) for text in texts]
            choices, _ = runner.compute(Schedule(chunks=chunks))
            times.append(time.perf_counter() - started)
            for text in texts:
                choice = choices[text.request.request_id]
                assert choice is not None, "the output is not finite"
                text.output_ids.append(choice.token_id)
        for text in texts:
            pool.release(text)
        return statistics.median(times[1:])


def measure(
    models: Sequence[tuple[str, str, Path, bool]],
    *,
    contexts: Sequence[int],
    batches: Sequence[int],
    base_context: int,
    rounds: int,
    threads: int,
    logs: Path,
    advance: Callable[[str], None],
) -> list[Point]:
    """The points of every model: (name, KV format, directory, whether it is an engine). Batches
    at `base_context`, contexts at batch 1; all models take turns at each point of a round."""
    points = _points(contexts, batches, base_context)
    tokens = max(batch * (context + 64) for batch, context in points)
    workers = []
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    for name, kv_cache, directory, is_engine in models:
        log = logs / f"growth-{name}-{kv_cache}.log"
        worker = Worker(
            [sys.executable, "-m", "bench.decoding.growth"], log, environment, threads=threads
        )
        advance(f"{name}, KV {kv_cache}: loading")
        arguments = {"is_engine": is_engine, "kv_cache": kv_cache, "threads": threads}
        sizes = {"tokens": tokens, "batch": max(batches)}
        size = worker.ask("open", directory=str(directory), **arguments, **sizes)
        workers.append((name, kv_cache, size, worker))
    seconds: dict[tuple[str, str, int, int], list[float]] = {}
    for number in range(rounds):
        for batch, context in points:
            for name, kv_cache, _, worker in workers:
                advance(f"round {number + 1} of {rounds}: {name}, KV {kv_cache}")
                taken = worker.ask("step", batch=batch, context=context, steps=_steps(batch))
                seconds.setdefault((name, kv_cache, batch, context), []).append(taken)
    found = [
        Point(
            name, kv_cache, batch, context,
            statistics.median(seconds[name, kv_cache, batch, context]), batch * context * size,
        )
        for name, kv_cache, size, _ in workers
        for batch, context in points
    ]  # fmt: skip
    for *_, worker in workers:
        worker.__exit__(None, None, None)
    return found


def num_calls(
    models: int, contexts: Sequence[int], batches: Sequence[int], base_context: int, rounds: int
) -> int:
    """How often `measure` calls `advance`."""
    return models * (1 + rounds * len(_points(contexts, batches, base_context)))


def _points(
    contexts: Sequence[int], batches: Sequence[int], base_context: int
) -> list[tuple[int, int]]:
    """Batch and context of each: all batches at the base, all contexts at batch 1."""
    at_one = [(1, context) for context in contexts if context != base_context]
    return [(batch, base_context) for batch in batches] + at_one


def _steps(batch: int) -> int:
    return max(3, 16 // batch)


def as_json(points: Sequence[Point]) -> list[dict[str, Any]]:
    return [asdict(point) for point in points]


if __name__ == "__main__":
    grown = Grown()
    answer({"open": grown.open, "step": grown.step})
